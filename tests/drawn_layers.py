"""Convolutions and linear layers of any geometry with inputs, and what holds matrices against each other."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fxcompile.fitting import LayerStats

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, Tensor]:
    """A float64 convolution of any geometry, and an input that it takes."""
    dims = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    groups = draw(st.integers(1, 3))
    kernel, dilation, stride = each(1, 3), each(1, 2), each(1, 3)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers", "numbers"]))
    if padding == "numbers":
        padding = each(0, 3)
    if padding == "same":
        stride = (1,) * dims
    size = tuple(gap * (k - 1) + 1 + extra for gap, k, extra in zip(dilation, kernel, each(3, 5), strict=True))
    layer = CONVOLUTIONS[dims](
        groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)), kernel, stride, padding, dilation, groups,
        bias=draw(st.booleans()), padding_mode=mode, dtype=torch.float64,
    )  # fmt: skip
    return _randomised(draw, layer, (draw(st.integers(1, 3)), layer.in_channels, *size))


@st.composite
def transposed(draw: st.DrawFn) -> tuple[Any, Tensor]:
    """A float64 transposed convolution of any geometry, and an input."""
    dims = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    groups, stride, dilation = draw(st.integers(1, 3)), each(1, 3), each(1, 2)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    layer = TRANSPOSED[dims](
        groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)), each(1, 3), stride, each(0, 2), extra,
        groups, bias=draw(st.booleans()), dilation=dilation, dtype=torch.float64,
    )  # fmt: skip
    return _randomised(draw, layer, (draw(st.integers(1, 2)), layer.in_channels, *each(5, 6)))


@st.composite
def linears(draw: st.DrawFn) -> tuple[Any, Tensor]:
    """A float64 linear layer, and an input with any leading axes."""
    layer = nn.Linear(draw(st.integers(1, 5)), draw(st.integers(1, 5)), bias=draw(st.booleans()), dtype=torch.float64)
    return _randomised(draw, layer, (*draw(st.lists(st.integers(1, 3), max_size=3)), layer.in_features))


def _randomised(draw: st.DrawFn, layer: Any, shape: tuple[int, ...]) -> tuple[Any, Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer, torch.randn(shape, generator=generator, dtype=torch.float64)


layers = st.one_of(convolutions(), transposed(), linears())


def without_bias(layer: Any, x: Tensor) -> Tensor:
    """The layer's output less its bias, from PyTorch's own forward."""
    with torch.no_grad():
        y: Tensor = layer(x)
        if layer.bias is None:
            return y
        bias: Tensor = layer.bias
        return y - (bias if isinstance(layer, nn.Linear) else bias.view(-1, *[1] * (x.dim() - 2)))


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Largest difference against the largest number wanted."""
    assert got.shape == want.shape
    scale = want.abs().max().item() if want.numel() else 0.0
    return bool((got - want).abs().max() <= tolerance * max(scale, 1e-300)) if want.numel() else True


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def conv_case(groups: int = 1, samples: int = 6) -> tuple[Any, Tensor, Tensor]:
    """A float64 convolution, inputs with a large mean, and wanted outputs that it does not compute."""
    torch.manual_seed(3)
    layer = nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1, groups=groups).double()
    x = noise(samples, 4, 7, 6, seed=1).relu() + 5
    y = functional.conv2d(x, noise(6, 4 // groups, 3, 3, seed=2), None, (2, 1), 1, groups=groups)
    return layer, x, (y + noise(*y.shape, seed=4)).detach()


def direct_rows(layer: Any, x: Tensor) -> numpy.ndarray:
    """Patches [rows, groups, F] by `functional.unfold`, another code path than the module's."""
    columns = functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # [N, C k k, L]
    return columns.transpose(1, 2).reshape(-1, layer.groups, columns.shape[1] // layer.groups).numpy()


def same_moments(got: LayerStats, want: LayerStats, tolerance: float = 1e-12) -> bool:
    pairs = [*zip(got.centred(), want.centred(), strict=True), (got.mean_in, want.mean_in)]
    pairs.append((got.mean_out, want.mean_out))
    return got.rows == want.rows and all(close(mine, theirs, tolerance) for mine, theirs in pairs)
