"""Tensors of which some numbers are known: NaN stands for those that are not; and what layers make of them.

A value's constants are a tensor with the axes of the value, of one entry along those over which they do not vary, in
float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fxcompile.layers import TRANSPOSED

from .fold_batchnorm import pads_zeros

Known = Tensor | None
"""None where nothing is constant."""

UNKNOWN = torch.nan

LEAST_EPS = 1e-6
"""Where a norm adds less than this to the variance of a constant, rounding counts."""


def settled(value: Known) -> Known:
    """The same with one entry along each axis over which nothing varies; None where nothing is constant."""
    if value is None or not value.numel():
        return None
    value = torch.where(value.isfinite(), value, UNKNOWN)
    if bool(value.isnan().all()):
        return None
    for axis in range(value.dim()):
        first = value.narrow(axis, 0, 1)
        if value.shape[axis] > 1 and bool(((value == first) | (value.isnan() & first.isnan())).all()):
            value = first
    return value


def uniform(value: Tensor, axes: Iterable[int]) -> Tensor:
    """The same, with one entry along these axes: what varies over them is not constant."""
    for axis in axes:
        first = value.narrow(axis, 0, 1)
        value = torch.where((value == first).all(axis, keepdim=True), first, UNKNOWN)
    return value


def per_channel(value: Known, axis: int, count: int) -> Tensor:
    """[count]: the constants along an axis, which are the same everywhere else."""
    if value is None:
        return torch.full((count,), UNKNOWN, dtype=torch.float64)
    axis %= value.dim()
    found: Tensor = uniform(value, (item for item in range(value.dim()) if item != axis))
    return found.flatten().expand(count)


def along(numbers: Tensor, axis: int, rank: int) -> Tensor:
    """[C] -> the same along this axis of so many"""
    return numbers.reshape([-1 if item == axis % rank else 1 for item in range(rank)])


def times(a: Tensor, b: Tensor) -> Tensor:
    """Zero times whatever is zero."""
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


def widened(x: Tensor, axis: int, count: int) -> Tensor:
    """The same with all entries along an axis."""
    return x.expand([count if item == axis % x.dim() else size for item, size in enumerate(x.shape)])


def evaluated(function: Callable[[], Tensor], *operands: Tensor) -> Tensor:
    """What a function gives, where it was given constants alone."""
    with torch.no_grad():
        value = function().double()
    for operand in operands:
        value = torch.where(operand.isnan(), UNKNOWN, value)
    return value


def columns(layer: Any) -> Tensor:
    """The weight of a convolution, transposed or not, or linear layer as [g, O/g, I/g, taps]."""
    weight = layer.weight.detach()
    groups = getattr(layer, "groups", 1)
    apart: Tensor = weight.unflatten(0, (groups, -1))
    apart = apart.transpose(1, 2) if isinstance(layer, TRANSPOSED) else apart
    return apart.unsqueeze(-1).flatten(3)


def has_border(layer: Any) -> bool:
    """Whether some outputs of a linear layer or convolution see fewer taps of the input than others."""
    return isinstance(layer, TRANSPOSED) or pads_zeros(layer)


def filters(layer: Any, given: Tensor) -> Tensor:
    """[O]: which outputs of a convolution, transposed or not, or linear layer are constant, from its inputs [I]."""
    weight = columns(layer)
    reads = (weight != 0).any(-1)  # [g, O/g, I/g]
    into = given.reshape(len(weight), 1, -1)
    spoils = into.isnan() | (into != 0 if has_border(layer) else False)
    outputs = torch.full(reads.shape[:2], 0.0, dtype=torch.float64)
    counts = (into != 0) & ~into.isnan()
    if bool(counts.any()):
        outputs = torch.where(reads & counts, weight.double().sum(-1) * into.nan_to_num(), 0.0).sum(-1)
    outputs[(reads & spoils).any(-1)] = UNKNOWN
    return outputs.flatten() if layer.bias is None else outputs.flatten() + layer.bias.detach().double()


def normalised(norm: Any, given: Tensor) -> Tensor:
    """[C]: which outputs of a norm per channel are constant: by its statistics; without these, zero times its scale, as
    the mean goes; and whatever it takes where it has no scale.
    """
    scale = torch.ones((), dtype=torch.float64) if norm.weight is None else norm.weight.detach().double()
    shift = torch.zeros((), dtype=torch.float64) if norm.bias is None else norm.bias.detach().double()
    if getattr(norm, "running_mean", None) is None:
        centred = torch.where((given == 0) | (given.isfinite() & (norm.eps >= LEAST_EPS)), 0.0, UNKNOWN)
    else:
        centred = (given - norm.running_mean.double()) * torch.rsqrt(norm.running_var.double() + norm.eps)
    return times(scale.expand(len(given)), centred) + shift


def pooled(pool: Any, x: Tensor, dims: int) -> Tensor:
    """The output of a pool; one that counts zeros from outside, or divides by another number, leaves zeros alone."""
    within = uniform(x, range(-dims, 0))
    padding = getattr(pool, "padding", 0)
    padded = any(padding) if isinstance(padding, tuple) else bool(padding)
    mixes = (padded and getattr(pool, "count_include_pad", False)) or getattr(
        pool, "divisor_override", None
    ) is not None
    return torch.where(within == 0, within, UNKNOWN) if mixes else within
