"""Branches in a convolution's place, each with one axis of its kernel: what they have in common is the middle tap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxcompile.fitting import solve
from fxcompile.layer_stats import LayerStats
from fxcompile.patches import padding_amounts

from ._branches import Branches, pad_ahead
from ._convolutions import convolution, float64
from ._stack_refining import cholesky_factor

Merge = Literal["sum", "concat"]


def branches(conv: Any, merge: Merge, stats: LayerStats | None, channel_axis: int = 1) -> nn.Module:
    """The branches for a convolution, solved on its statistics if there are any."""
    return joined(conv, merge, partial(on_taps, conv, stats=stats), partial(lost, conv, stats=stats), channel_axis)[0]


def draft(
    conv: Any, merge: Merge, weight: Tensor, gram: Tensor | None = None, channel_axis: int = 1
) -> tuple[nn.Module, Tensor]:
    """Those near a weight [O, C/g, *k], in the norm of S [g, F, F] if given, and the dense weight that they compute."""
    bias, target = float64(conv)[1], weight.flatten(1).unflatten(0, (conv.groups, -1))

    def on(taps: Tensor) -> tuple[Tensor, Tensor | None]:
        if gram is None:
            return weight * taps, bias
        features = taps.expand(weight.shape[1:]).flatten().nonzero().flatten()
        factor = cholesky_factor(gram[:, features][:, :, features], 1e-10)
        solved = torch.cholesky_solve((target @ gram[:, :, features]).mT, factor).mT
        return torch.zeros_like(target).index_copy(2, features, solved).reshape(weight.shape), bias

    def lacking(near: Tensor, _: Tensor | None) -> Tensor:
        lacks = target - near.reshape(target.shape)
        errors: Tensor = lacks * (lacks if gram is None else lacks @ gram)
        return errors.sum(2).flatten()

    return joined(conv, merge, on, lacking, channel_axis)


def share(kernel: Sequence[int], outputs: int, merge: Merge) -> float:
    """What branches for a kernel with so many outputs in each group cost, as a share of its MACs."""
    sides = [size for size in kernel if size > 1]
    own = [outputs] * len(sides) if merge == "sum" else rooms(outputs, len(sides))
    return sum(room * size for room, size in zip(own, sides, strict=True)) / (outputs * math.prod(sides))


def joined(
    conv: Any,
    merge: Merge,
    on: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    lost: Callable[[Tensor, Tensor | None], Tensor],
    channel_axis: int,
) -> tuple[nn.Module, Tensor]:
    """The branches, and the dense weight that they compute.

    Args:
        on: the best weight with nothing but these taps, and bias.
        lost: what each output [O] is off with these.
    """
    axes = [axis for axis, size in enumerate(conv.kernel_size) if size > 1]
    lines = [line(conv.kernel_size, axis) for axis in axes]
    if merge == "sum":
        weight, bias = on(torch.stack(lines).any(0))
        made: list[nn.Module] = []
        left = weight
        for axis, own in zip(axes, lines, strict=True):
            made.append(branch(conv, along(left, axis), None if made else bias, axis))
            left = left * ~own
        return Branches(made), weight
    solved = [on(own) for own in lines]
    owners = share_out(torch.stack([lost(*item) for item in solved]), conv.groups)
    dense = torch.stack([weight for weight, _ in solved])[owners, torch.arange(len(owners))]
    made = []
    for index, (axis, (weight, bias)) in enumerate(zip(axes, solved, strict=True)):
        mine = owners == index
        made.append(branch(conv, along(weight[mine], axis), None if bias is None else bias[mine], axis))
    return Branches(made, owners.argsort(stable=True).argsort(), channel_axis), dense


def line(kernel: Sequence[int], axis: int) -> Tensor:
    """The taps of a kernel [*k] on the line along an axis through its middle."""
    taps = torch.zeros(*kernel, dtype=torch.bool)
    taps[tuple(slice(None) if item == axis else (size - 1) // 2 for item, size in enumerate(kernel))] = True
    return taps


def along(weight: Tensor, axis: int) -> Tensor:
    """The line of a kernel [O, C, *k] along an axis, as a kernel of its own."""
    for item in range(weight.dim() - 2):
        if item != axis:
            weight = weight.narrow(2 + item, (weight.shape[2 + item] - 1) // 2, 1)
    return weight


def on_taps(conv: Any, taps: Tensor, stats: LayerStats | None) -> tuple[Tensor, Tensor | None]:
    """The weight [O, C/g, *k] that is zero but on these taps, and bias: least squares, or what the weight has there."""
    weight, bias = float64(conv)
    weight = weight * taps
    if stats is None:
        return weight, bias
    features = taps.expand(weight.shape[1:]).flatten().nonzero().flatten()
    solved, bias = solve(stats.select_features(features), weight.flatten(1)[:, features], bias)
    return weight.flatten(1).index_copy(1, features, solved).reshape(weight.shape), bias


def lost(conv: Any, weight: Tensor, bias: Tensor | None, stats: LayerStats | None) -> Tensor:
    """[O]: the squared error of each output, or of its weights where there are no data."""
    if stats is None:
        return (float64(conv)[0] - weight).flatten(1).square().sum(1)
    return stats.squared_errors(weight, bias)


def share_out(errors: Tensor, groups: int) -> Tensor:
    """For each of O outputs the branch that gives it, from errors [branches, O]: equally many each, in every group.

    Greedily, those that lose the most by not getting their best branch first; for two branches that is the optimum.
    """
    count, outputs = errors.shape
    each = outputs // groups
    owners = torch.empty(outputs, dtype=torch.long)
    for group in range(groups):
        own = errors[:, group * each : (group + 1) * each]
        room = rooms(each, count)
        best = own.topk(2, dim=0, largest=False).values
        for output in (best[1] - best[0]).argsort(descending=True, stable=True).tolist():
            free = [index for index in range(count) if room[index]]
            chosen = min(free, key=lambda index: float(own[index, output]))
            room[chosen] -= 1
            owners[group * each + output] = chosen
    return owners


def rooms(outputs: int, count: int) -> list[int]:
    """How many outputs each of so many branches gives."""
    return [outputs // count + (index < outputs % count) for index in range(count)]


def branch(conv: Any, weight: Tensor, bias: Tensor | None, axis: int) -> nn.Module:
    """A convolution with a kernel along one axis, which sees of the others what the kernel's middle saw.

    Where that takes other padding before than after, or less than none, it is done ahead of the layer.
    """
    sides = []
    shape = zip(padding_amounts(conv), conv.kernel_size, conv.dilation, strict=True)
    for item, ((before, after), size, dilation) in enumerate(shape):
        middle = 0 if item == axis else (size - 1) // 2
        rest = 0 if item == axis else size - 1 - middle
        sides.append((before - dilation * middle, after - dilation * rest))
    even = all(before == after >= 0 for before, after in sides)
    padding = [before if even else 0 for before, _ in sides]
    made: nn.Module = convolution(
        conv, weight, bias, stride=conv.stride, padding=padding, dilation=conv.dilation, groups=conv.groups
    )
    if even:
        return made
    return nn.Sequential(pad_ahead(sides), made)
