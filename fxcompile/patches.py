"""A convolution as a matrix product: its input patches as rows, its weight as a matrix, its outputs as rows.

Every layer that `FITTED` lists computes, for each output position (a *row*) and each group g,

    y[row, g, :] = M[g] @ patch[row, g, :] + bias[g]        patch: F numbers, M[g]: [O/g, F]

with F = (in_channels / groups) * taps for convolutions and F = in_features, groups = 1, for `nn.Linear`. Padding is
part of the patches (zeros, mirrored, repeated or wrapped values), so borders are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxcompile.errors import FitError
from fxcompile.layers import CONVOLUTIONS, TRANSPOSED

FITTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
"""Layers that are a matrix product over patches."""


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's input patches, [rows, groups, F], in the dtype of `x` (float16 and integers become wider).

    Rows run over the batch, then over output positions, last axis fastest. Features are in the order of
    `weight_matrix(layer)`, which is `weight.flatten(1)` unless the layer is a transposed convolution.
    """
    view, leading = windows(layer, x)
    rows = view.shape[:leading]
    return view.reshape(math.prod(rows), view.shape[leading], math.prod(view.shape[leading + 1 :]))


def windows(layer: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """The patches without copying them: a strided view [*rows, groups, channels/groups, *kernel], and len(rows).

    Raises:
        FitError: no such layer, or an input it does not take.
    """
    if not (x.is_floating_point() or x.is_complex()):
        x = x.double()
    elif x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    channels, groups = input_channels(layer), group_count(layer)
    if isinstance(layer, nn.Linear):
        if x.dim() == 0 or x.shape[-1] != channels:
            raise FitError(f"an input of shape {list(x.shape)} does not fit {channels} input features")
        return x.unsqueeze(-2), x.dim() - 1
    assert isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED))
    dims = len(layer.kernel_size)
    if x.dim() == dims + 1:
        x = x.unsqueeze(0)
    if x.dim() != dims + 2 or x.shape[1] != channels:
        raise FitError(f"an input of shape {list(x.shape)} does not fit {channels} channels in {dims} dimensions")
    stride = layer.stride
    if isinstance(layer, TRANSPOSED):
        x, stride = _stuffed(layer, x), (1,) * dims
    else:
        x = _padded(layer, x)
    for axis, (size, step, gap) in enumerate(zip(layer.kernel_size, stride, layer.dilation, strict=True), start=2):
        span = gap * (size - 1) + 1
        if x.shape[axis] < span:
            raise FitError(f"an input of {x.shape[axis]} with its padding is smaller than the kernel's span of {span}")
        x = x.unfold(axis, span, step)[..., ::gap]
    x = x.unflatten(1, (groups, channels // groups))  # [N, g, C/g, *positions, *kernel]
    positions = range(3, 3 + dims)
    return x.permute(0, *positions, 1, 2, *range(3 + dims, 3 + 2 * dims)), 1 + dims


def _padded(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    sides = [amount for pair in reversed(padding_amounts(layer)) for amount in pair]  # functional.pad: last axis first
    if not any(sides):
        return x
    return functional.pad(x, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def padding_amounts(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[tuple[int, int]]:
    """Pixels that a convolution adds before and after its input, for each axis."""
    if not isinstance(layer.padding, str):
        return [(amount, amount) for amount in layer.padding]
    same = layer.padding == "same"
    totals = [gap * (size - 1) if same else 0 for gap, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def _stuffed(layer: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d, x: Tensor) -> Tensor:
    """The input of the ordinary stride-1 convolution that a transposed one equals: zeros between and around."""
    spread = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], layer.stride, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *spread)
    places: list[Any] = [..., *(slice(None, None, step) for step in layer.stride)]
    stuffed[tuple(places)] = x
    sides: list[int] = []
    for axis in reversed(range(len(spread))):
        padding = layer.padding[axis]
        assert isinstance(padding, int)
        before = layer.dilation[axis] * (layer.kernel_size[axis] - 1) - padding  # below zero, it crops
        sides += [before, before + layer.output_padding[axis]]
    return functional.pad(stuffed, sides)


def output_rows(layer: nn.Module, y: Tensor) -> Tensor:
    """An output of the layer, [N, O, *positions] or [..., O], as a view [*rows, O] over the rows of `windows`."""
    if isinstance(layer, nn.Linear):
        return y
    assert isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED))
    if y.dim() == len(layer.kernel_size) + 1:
        y = y.unsqueeze(0)
    return y.movedim(1, -1)


def chunks(
    view: Tensor, wanted: Tensor | None, leading: int, limit: int, drawn: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """Parts of at most `limit` rows, each with the number of its leading axes.

    Args:
        view: [*rows, ...], as `windows` gives it.
        wanted: [*rows, O], or None; cut alike.
        leading: how many axes the rows have.
        limit: rows in a part, at least 1.
        drawn: numbers of the rows to take, or None for all. Parts of drawn rows are copies with one leading axis,
            others are views.
    """
    shape = view.shape[:leading]
    if drawn is not None:
        for part in drawn.split(limit):
            index = torch.unravel_index(part, shape)
            yield view[index], None if wanted is None else wanted[index], 1
    elif shape.numel() <= limit:
        yield view, wanted, leading
    else:
        axis = next(axis for axis, size in enumerate(shape) if size > 1)
        step = max(1, limit * shape[axis] // shape.numel())
        for start in range(0, shape[axis], step):
            size = min(step, shape[axis] - start)
            outputs = None if wanted is None else wanted.narrow(axis, start, size)
            yield from chunks(view.narrow(axis, start, size), outputs, leading, limit, None)


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight as [O, F], features in the order of `patches`.

    For a convolution and a linear layer that is `weight.flatten(1)`. A transposed convolution's weight
    [C, O/g, *kernel] is flipped along the kernel and transposed within each group: [O, C/g, *kernel], flattened.
    """
    groups = group_count(layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, TRANSPOSED):
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        weight = weight.flip(*range(2, weight.dim()))
    return weight.flatten(1)


def matrix_weight(layer: nn.Module, matrix: Tensor) -> Tensor:
    """The inverse of `weight_matrix`: [O, F] as the layer stores its weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if not isinstance(layer, TRANSPOSED):
        return matrix.reshape(weight.shape)
    groups = group_count(layer)
    kernels = matrix.reshape(groups, -1, weight.shape[0] // groups, *weight.shape[2:])
    return kernels.transpose(1, 2).flatten(0, 1).flip(*range(2, weight.dim()))


def group_count(layer: nn.Module) -> int:
    """The number of groups; 1 for a linear layer.

    Raises:
        FitError: the layer is not one of `FITTED`.
    """
    if isinstance(layer, nn.Linear):
        return 1
    if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        return layer.groups
    raise FitError(
        f"a layer of type {type(layer).__name__} has no patches", mend="fit convolutions and linear layers only"
    )


def input_channels(layer: nn.Module) -> int:
    """The channels, or features, of the layer's input."""
    group_count(layer)
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    assert isinstance(channels, int)
    return channels


def output_channels(layer: nn.Module) -> int:
    """The channels, or features, of the layer's output."""
    group_count(layer)
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert isinstance(channels, int)
    return channels
