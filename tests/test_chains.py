"""Statistics behind a chain of convolutions, against statistics collected by running it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompile.chains import patch_map, splits_patches, statistics_behind
from fxcompile.layer_stats import LayerStats
from fxcompile.patches import patches

KINDS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv(inputs: int, outputs: int, kernel: Any, **options: Any) -> Any:
    kind = KINDS[len(kernel)]
    torch.manual_seed(inputs + 10 * outputs)
    return kind(inputs, outputs, tuple(kernel), dtype=torch.float64, **options).requires_grad_(False)


@st.composite
def splits(draw: st.DrawFn) -> tuple[Any, list[Any], Tensor, Tensor]:
    """A layer, a chain for its place, inputs and wanted outputs."""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    kernels = [[draw(st.sampled_from([1, 2, 3])) for _ in range(dims)] for _ in range(draw(st.integers(2, 3)))]
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    mode = draw(st.sampled_from(["zeros", "circular", "replicate"]))
    padding = [draw(st.integers(0, 2)) for _ in range(dims)]
    channels = [groups * draw(st.integers(1, 3)) for _ in range(len(kernels) + 1)]
    whole = [1 + sum(k[axis] - 1 for k in kernels) for axis in range(dims)]
    # An axis may be padded as late as the first layer that mixes along it, and have its stride as early as the last.
    mixing = [[at for at, k in enumerate(kernels) if k[axis] > 1] for axis in range(dims)]
    turns = [draw(st.integers(0, min(at, default=len(kernels) - 1))) for at in mixing]
    strided = [draw(st.integers(max([turn, *at]), len(kernels) - 1)) for turn, at in zip(turns, mixing, strict=True)]
    chain = [
        conv(
            channels[at], channels[at + 1], kernel, stride=tuple(stride if item == at else 1 for item in strided),
            dilation=dilation, groups=groups, bias=at == len(kernels) - 1, padding_mode=mode,
            padding=tuple(p if turn == at else 0 for p, turn in zip(padding, turns, strict=True)),
        )
        for at, kernel in enumerate(kernels)
    ]  # fmt: skip
    layer = conv(
        channels[0], channels[-1], whole, stride=stride, dilation=dilation, groups=groups, padding=tuple(padding),
        padding_mode=mode,
    )  # fmt: skip
    x = randn(3, channels[0], *[dilation * (size - 1) + 3 for size in whole], seed=draw(st.integers(0, 99))) + 1
    return layer, chain, x, randn(*layer(x).shape, seed=5)


@settings(max_examples=150, deadline=None)
@given(splits())
def test_they_are_those_that_running_the_chain_gives(case: tuple[Any, list[Any], Tensor, Tensor]) -> None:
    layer, chain, x, y = case
    seen, wanted, middle = LayerStats.of(layer), LayerStats.of(chain[-1]), x
    seen.update(x, y)
    for item in chain[:-1]:
        middle = item(middle)
    wanted.update(middle, y)
    found = statistics_behind(seen, layer, chain)
    assert found is not None
    assert (found.rows, found.channels, found.groups) == (wanted.rows, wanted.channels, wanted.groups)
    for mine, theirs in zip((*found.raw(), *found.centred()), (*wanted.raw(), *wanted.centred()), strict=True):
        assert mine.shape == theirs.shape
        assert float((mine - theirs).abs().max()) <= 1e-10 * (1 + float(theirs.abs().max()))
    assert float((found.mean_in - wanted.mean_in).abs().max()) < 1e-10
    assert torch.equal(found.centred().gram, found.centred().gram.mT)


@settings(max_examples=50, deadline=None)
@given(splits())
def test_the_map_takes_each_patch_to_what_the_last_layer_sees(case: tuple[Any, list[Any], Tensor, Tensor]) -> None:
    layer, chain, x, _ = case
    middle = x
    for item in chain[:-1]:
        middle = item(middle)
    found = patch_map(chain)(patches(layer, x).permute(1, 2, 0)).permute(2, 0, 1)
    assert float((found - patches(chain[-1], middle)).abs().max()) < 1e-11


def test_a_single_layer_sees_what_the_old_one_saw() -> None:
    layer = conv(2, 3, (3, 3), padding=1)
    stats = LayerStats.of(layer)
    stats.update(randn(2, 2, 5, 5), randn(2, 3, 5, 5))
    assert statistics_behind(stats, layer, [conv(2, 3, (3, 3), padding=1)]) is stats


WHOLE: dict[str, Any] = {"stride": 2, "padding": 2, "dilation": 1, "groups": 1}
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "padding shared out": ({"padding": 1}, {"padding": 1}),
    "padding forgotten": ({"padding": 0}, {}),
    "padding on the last layer": ({"padding": 0}, {"padding": 2}),
    "another padding mode": ({"padding_mode": "circular"}, {}),
    "stride on the first layer": ({"stride": 2}, {"stride": 1}),
    "no stride": ({}, {"stride": 1}),
    "another stride": ({}, {"stride": 3}),
    "stride on both layers": ({"stride": 2}, {}),
    "stride on one axis of the first layer": ({"stride": (1, 2)}, {"stride": (2, 1)}),
    "dilation on one layer": ({"dilation": 2}, {}),
    "bias between": ({"bias": True}, {}),
    "a smaller kernel": ({}, {"kernel_size": 1}),
    "groups": ({"groups": 2}, {}),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_linear_map_of_patches_is_not_taken_for_one(case: str) -> None:
    layer = nn.Conv2d(4, 4, 5, **WHOLE)
    right: list[dict[str, Any]] = [{"kernel_size": 3, "padding": 2, "bias": False}, {"kernel_size": 3, "stride": 2}]
    assert splits_patches(layer, [nn.Conv2d(4, 4, **options) for options in right])
    changed = [nn.Conv2d(4, 4, **{**options, **change}) for options, change in zip(right, WRONG[case], strict=True)]
    assert not splits_patches(layer, changed)
    assert statistics_behind(LayerStats.of(layer), layer, changed) is None


def test_padding_behind_a_stride_is_not_that_of_the_layer() -> None:
    """Though nothing is mixed along the axis: a row of zeros at the border is none of those between."""
    layer = nn.Conv2d(4, 4, (1, 3), stride=(2, 1), padding=(2, 1))
    first, last = nn.Conv2d(4, 4, (1, 3), padding=(0, 1), bias=False), nn.Conv2d(4, 4, 1)
    first.stride, last.padding = (2, 1), (2, 0)
    assert not splits_patches(layer, [first, last])
    first.padding, last.padding = (2, 1), (0, 0)
    assert splits_patches(layer, [first, last])


def test_other_layers_between_are_not_linear() -> None:
    layer, first, last = nn.Conv2d(4, 4, 5, padding=2), nn.Conv2d(4, 4, 3, padding=2, bias=False), nn.Conv2d(4, 4, 3)
    assert splits_patches(layer, [first, last])
    assert not splits_patches(layer, [first, nn.ReLU(), last])
    assert not splits_patches(nn.Linear(4, 4), [nn.Linear(4, 4), nn.Linear(4, 4)])
