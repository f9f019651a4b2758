"""What a stack of 3 x 3 convolutions computes: its kernels, widths, cost, exact forms and biases.

A chain of stages X_1 [M_1, C, *k_1], ..., X_n [O, M_{n-1}, *k_n] (cross-correlations, with nothing between them) equals
one convolution whose kernel is their full convolution,

    W[o, c, w] = sum_m sum_{u + v = w} X_2[o, m, u] X_1[m, c, v]          k - 1 = sum_i (k_i - 1) on each axis,

borders included if the first stage takes all the padding, in any padding mode. A stride belongs to the last stage, a
dilation to all. Derivation and measurements: methods.md, section 1. `_stack_fitting` finds the stages of a given W.

Results are float64. Inside, weights are [g, O, C, *k] (all groups as a batch), here called split.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product

import torch
from torch import Tensor

from fxcompile import chains

from ._ranks import rounded_down


def stage_kernels(kernel: Sequence[int]) -> list[tuple[int, ...]]:
    """Kernel of each stage: (5, 7) -> (3, 3), (3, 3), (1, 3). An axis that needs fewer stages ends with ones."""
    if any(k % 2 == 0 for k in kernel) or max(kernel) < 5:
        raise ValueError(f"a stack of 3s needs odd kernel sizes, one of them at least 5, not {tuple(kernel)}")
    return [tuple(3 if k // 2 > stage else 1 for k in kernel) for stage in range(max(kernel) // 2)]


def exact_width(weight_shape: Sequence[int], groups: int = 1) -> list[int]:
    """Channels between the stages from which a weight [O, C/g, *k] generically has an exact stack.

    Two counts must allow it: the rank of W^(f), min(O, C) / g, and parameters less the GL(M) freedom between
    neighbours, sum_i |k_i| M_{i-1} M_i - sum_i M_i^2 >= |k| C O. For C = O: 1.517 C (5 x 5), C (length 5),
    1.66 C (7 x 7). These are what *generic* weights need; just above them the fit converges slowly.
    """
    outputs, inputs, kernels = weight_shape[0] // groups, weight_shape[1], stage_kernels(weight_shape[2:])
    width = min(outputs, inputs)
    while _freedom([inputs, *[width] * (len(kernels) - 1), outputs], kernels) < math.prod(weight_shape) // groups:
        width += 1
    return [width * groups] * (len(kernels) - 1)


def _freedom(channels: Sequence[int], kernels: Sequence[Sequence[int]]) -> int:
    free = sum(math.prod(k) * i * o for k, i, o in zip(kernels, channels, channels[1:], strict=False))
    return free - sum(m * m for m in channels[1:-1])


def widths_for(
    weight_shape: Sequence[int],
    padded_size: Sequence[int],
    out_size: Sequence[int],
    rank: float,
    groups: int = 1,
    dilation: Sequence[int] | int = 1,
    round_to: int = 1,
) -> list[int]:
    """Channels between the stages: `rank` channels if an int, else those that cost that share of the dense layer.

    Equal widths, a multiple of `groups`, at least one a group. Where that leaves any, a multiple of `round_to` too.
    Always rounded down, so that a share is not exceeded. Costs are those that `stack_macs` counts.
    """
    kernels = stage_kernels(weight_shape[2:])
    if isinstance(rank, int):
        each = rank // groups
    else:
        outputs, inputs = weight_shape[0] // groups, weight_shape[1]
        maps = stage_maps(weight_shape[2:], padded_size, out_size, dilation)
        sizes = [math.prod(m) * math.prod(k) for m, k in zip(maps, kernels, strict=True)]
        budget = rank * math.prod(out_size) * math.prod(weight_shape) / groups
        square, linear = sum(sizes[1:-1]), sizes[0] * inputs + sizes[-1] * outputs
        exact = (math.sqrt(linear**2 + 4 * square * budget) - linear) / (2 * square) if square else budget / linear
        each = math.floor(exact + 1e-9)
    return [rounded_down(each, groups, round_to) * groups] * (len(kernels) - 1)


def stack_macs(
    weight_shape: Sequence[int],
    widths: Sequence[int],
    padded_size: Sequence[int],
    out_size: Sequence[int],
    groups: int = 1,
    dilation: Sequence[int] | int = 1,
) -> int:
    """Multiply-accumulates for one sample of a stack that replaces a weight [O, C/g, *k].

    With the larger maps that the early stages work on: the first takes all the padding, and the stride is the last
    one's.
    """
    kernel = weight_shape[2:]
    maps, kernels = stage_maps(kernel, padded_size, out_size, dilation), stage_kernels(kernel)
    channels = [weight_shape[1] * groups, *widths, weight_shape[0]]
    parts = zip(maps, kernels, channels, channels[1:], strict=False)
    return sum(math.prod(m) * math.prod(k) * o * (i // groups) for m, k, i, o in parts)


def stage_maps(
    kernel: Sequence[int], padded_size: Sequence[int], out_size: Sequence[int], dilation: Sequence[int] | int = 1
) -> list[tuple[int, ...]]:
    """Spatial size of what each stage puts out, from that of the input with its padding and that of the output."""
    steps = [dilation] * len(kernel) if isinstance(dilation, int) else dilation
    size, maps = tuple(padded_size), []
    for stage in stage_kernels(kernel)[:-1]:
        size = tuple(n - d * (k - 1) for n, d, k in zip(size, steps, stage, strict=True))
        maps.append(size)
    return [*maps, tuple(out_size)]


def split(weight: Tensor, groups: int) -> Tensor:
    """[g*O, C, *k] of any dtype -> float64 [g, O, C, *k]."""
    return weight.detach().double().reshape(groups, -1, *weight.shape[1:])


def compose(stages: Sequence[Tensor], groups: int = 1) -> Tensor:
    """The dense kernel [O, C/g, *k] of the chain `stages` [M_i, M_{i-1}/g, *k_i]; zeros stay exact zeros."""
    return chains.compose([split(stage, groups) for stage in stages]).flatten(0, 1)


def amplification(stages: Sequence[Tensor], groups: int = 1) -> float:
    """sqrt(sum compose(X_i^2)) / |compose(X_i)|: what independent relative errors of the weights grow by.

    One where no terms cancel, whatever the width. (The ratio with |X_i| in place of the root of squares grows as the
    root of the number of terms: 11 at width 64 for independent factors.)
    """
    dense, grouped = compose(stages, groups), [split(x, groups) for x in stages]
    return float((squares(grouped).sum() / dense.square().sum().clamp_min(1e-300)).sqrt())


def cut(x: Tensor, spans: Iterable[tuple[int, int]]) -> Tensor:
    """A view of `x` [g, O, C, *k] with (start, length) on each spatial axis."""
    for axis, (start, length) in enumerate(spans):
        x = x.narrow(3 + axis, start, length)
    return x


def squares(stages: Sequence[Tensor]) -> Tensor:
    """[g]: the sum over all taps of compose(X_i^2), for split stages."""
    total = stages[0].square().flatten(3).sum((2, 3))
    for stage in stages[1:]:
        total = (stage.square().flatten(3).sum(3) @ total[:, :, None])[:, :, 0]
    return total.sum(1)


def corner_stack(weight: Tensor, groups: int = 1) -> list[Tensor]:
    """An exact stack, by construction and without rounding: the taps of W are shared out among shifted copies.

    With C <= O the first stage copies each input to the 2^d corners of its kernel (M = 2^d C; to all 3 taps of an axis
    that is 3 long), and the rest, smaller by 2 on each axis, takes at each corner the taps it is the first to reach.
    With O < C the same from the other end.
    """
    return [x.flatten(0, 1) for x in _corners(split(weight, groups), stage_kernels(weight.shape[2:]))]


def _corners(weight: Tensor, kernels: list[tuple[int, ...]]) -> list[Tensor]:
    """`weight` [g, O, C, *k] -> stages with these kernels."""
    if len(kernels) == 1:
        return [weight]
    if weight.shape[1] < weight.shape[2]:
        return [x.transpose(1, 2) for x in reversed(_corners(weight.transpose(1, 2), kernels[::-1]))]
    groups, _, inputs, *full = weight.shape
    rest = [k - s + 1 for k, s in zip(full, kernels[0], strict=True)]
    copies: list[Tensor] = []
    taken: list[Tensor] = []
    left = weight.clone()
    for corner in product(*[range(0, s, min(2, n)) for s, n in zip(kernels[0], rest, strict=True)]):
        copy = weight.new_zeros(groups, inputs, inputs, *kernels[0])
        cut(copy, [(at, 1) for at in corner]).flatten(3)[..., 0].diagonal(dim1=1, dim2=2).fill_(1)
        window = cut(left, zip(corner, rest, strict=True))
        copies.append(copy)
        taken.append(window.clone())
        window.zero_()
    return [torch.cat(copies, 1), *_corners(torch.cat(taken, 2), kernels[1:])]
