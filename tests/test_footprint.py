"""How small a map shows all that layers do."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompile as fxc
from fxcompile.contracts import Exact
from fxcompile.errors import ContractError
from fxcompile.footprint import enough_pixels
from fxcompile.program import Program
from fxcompile.rewriting import Pass, Replacement, Site, Skip


@st.composite
def convolutions(draw: st.DrawFn) -> list[nn.Conv2d]:
    """A chain of up to three, with any kernel, stride, padding and dilation."""
    pairs = [
        draw(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))) for _ in range(draw(st.integers(1, 3)))
    ]
    return [
        nn.Conv2d(1, 1, kernel, stride, padding=draw(st.integers(0, dilation * (kernel - 1) // 2)), dilation=dilation,
                  bias=False)
        for kernel, stride, dilation in pairs
    ]  # fmt: skip


@torch.no_grad()
def ones(chain: list[nn.Conv2d], size: tuple[int, ...]) -> Tensor:
    """How many taps see the map, for each output: kernels of ones over a map of ones."""
    value = torch.ones(1, 1, *size)
    for layer in chain:
        nn.init.ones_(layer.weight)
        value = layer(value)
    return value


@settings(deadline=None, max_examples=150)
@given(convolutions())
def test_the_map_has_an_output_that_sees_no_padding_and_borders_where_a_larger_one_has(chain: list[nn.Conv2d]) -> None:
    size = enough_pixels(chain)
    assert size is not None
    small, large = ones(chain, size), ones(chain, tuple(4 * side + 1 for side in size))
    whole = 1
    for layer in chain:
        whole *= layer.kernel_size[0] * layer.kernel_size[1]
    assert small.max() == whole == large.max()
    assert small.flatten()[0] == large.flatten()[0]


def test_sizes_of_common_layers() -> None:
    assert enough_pixels([nn.Conv2d(8, 8, 1)]) == (2, 2)
    assert enough_pixels([nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]) == (5, 5)
    assert enough_pixels([nn.Conv2d(3, 64, 7, 2, padding=3)]) == (14, 14)
    assert enough_pixels([nn.Conv1d(8, 8, 3, dilation=4)]) == (17,)
    assert enough_pixels([nn.Conv3d(8, 8, (1, 3, 5))]) == (2, 5, 9)
    assert enough_pixels([nn.ConvTranspose2d(8, 8, 4, 2, padding=1)]) == (5, 5)


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [nn.BatchNorm2d(8)],
        [nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1)],
        [nn.Conv2d(8, 8, 3), nn.Flatten()],
        [nn.Conv2d(8, 8, 3), nn.Softmax(-1)],
        [nn.Conv1d(8, 8, 3), nn.Conv2d(8, 8, 3)],
    ],
)
def test_layers_that_see_more_than_a_pixel_have_none(layers: list[nn.Module]) -> None:
    assert enough_pixels(layers) is None


class OtherBorder(Pass):
    """Wrong at the border alone: zeros around the map become its outer pixels."""

    name: ClassVar = "other-border"
    contract: ClassVar = Exact()

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        for node, _ in program.layers(nn.Conv2d):
            yield Site.of(program, node)

    def rewrite(self, site: Site) -> Replacement:
        layer = copy.deepcopy(site.layer)
        layer.padding_mode = "replicate"
        layer._reversed_padding_repeated_twice = [1, 1, 1, 1]
        return [layer]


def test_what_is_wrong_at_the_border_of_a_large_map_is_found_at_its_site() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU())
    program = fxc.trace(model, torch.randn(2, 2, 96, 96))
    with pytest.raises(ContractError, match=r"layer '0'.*breaks its contract"):
        fxc.PassManager([OtherBorder()], verify_examples=1).run(program)


def test_a_transposed_layer_that_cuts_off_more_than_it_makes_of_two_pixels_gets_more_of_them() -> None:
    """(2 - 1) * 2 - 2 * 2 + 1 < 0 pixels would come out."""
    layer = nn.ConvTranspose2d(1, 1, (1, 3), stride=2, padding=2, dilation=2)
    size = enough_pixels([layer])
    assert size is not None
    assert min(layer(torch.zeros(1, 1, *size)).shape[2:]) >= 3
    model = nn.Sequential(layer, nn.BatchNorm2d(1)).eval()
    (site,) = fxc.PassManager("fold-batchnorm").run(fxc.trace(model, torch.randn(2, 1, 6, 6))).report().passes[0].sites
    assert site.outcome == "kept"
