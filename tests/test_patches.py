"""Patches as rows and weights as matrices give what PyTorch's own layers compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn_layers import (
    CONVOLUTIONS,
    close,
    convolutions,
    layers,
    linears,
    noise,
    quick,
    transposed,
    without_bias,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompile.errors import FitError
from fxcompile.patches import matrix_weight, output_rows, patches, weight_matrix

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def check_patches(layer: Any, x: Tensor) -> None:
    want = output_rows(layer, without_bias(layer, x)).reshape(-1, weight_matrix(layer).shape[0])
    rows = patches(layer, x)
    matrix = weight_matrix(layer).detach().unflatten(0, (rows.shape[1], -1))
    got = torch.einsum("rgf,gof->rgo", rows, matrix).flatten(1)
    assert close(got, want, 1e-12)


@given(convolutions())
@settings(max_examples=300, deadline=None)
def test_patches_times_weight_is_the_convolution(case: tuple[Any, Tensor]) -> None:
    check_patches(*case)


@given(st.one_of(transposed(), linears()))
@settings(max_examples=150, deadline=None)
def test_patches_times_weight_is_the_transposed_or_linear_layer(case: tuple[Any, Tensor]) -> None:
    check_patches(*case)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", "numbers"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_padding_in_every_dimension(dims: int, padding: str, mode: str) -> None:
    """Even kernels, so that "same" pads more after than before, and different numbers on each axis."""
    sides, stride = (0, 2, 1)[:dims], 1 if padding == "same" else (3, 1, 2)[:dims]
    pad: Any = sides if padding == "numbers" else padding
    layer = CONVOLUTIONS[dims](
        4, 6, (4, 2, 3)[:dims], stride, pad, (1, 3, 2)[:dims], groups=2, padding_mode=mode
    ).double()
    check_patches(layer, noise(2, 4, *(7, 8, 9)[:dims]))


@given(layers)
@quick
def test_features_are_in_the_order_of_the_weight(case: tuple[Any, Tensor]) -> None:
    layer, _ = case
    assert torch.equal(matrix_weight(layer, weight_matrix(layer)), layer.weight)
    if "Transpose" not in type(layer).__name__:
        assert torch.equal(weight_matrix(layer), layer.weight.flatten(1))


def test_unbatched_half_and_integer_inputs_have_patches() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1)
    x = torch.arange(2 * 4 * 4).view(2, 4, 4)
    exact = patches(layer.double(), x.double()[None])
    assert torch.equal(patches(layer, x), exact)
    assert torch.equal(patches(layer, x.half()).double(), exact)


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (nn.BatchNorm2d(3), (2, 3, 4, 4), "BatchNorm2d has no patches"),
        (nn.Conv2d(3, 4, 3), (2, 4, 8, 8), "does not fit 3 channels"),
        (nn.Conv2d(3, 4, 3), (2, 3, 8), "does not fit 3 channels"),
        (nn.Conv2d(3, 4, 3), (2, 3, 2, 8), "smaller than the kernel"),
        (nn.Linear(3, 4), (2, 4), "does not fit 3 input features"),
    ],
)
def test_what_has_no_patches_is_refused(layer: nn.Module, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(FitError, match=words):
        patches(layer, torch.zeros(shape))
