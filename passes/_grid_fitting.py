"""Branches of a strided convolution and a pooling, fitted to the data that the site sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxcompile.fitting import RIDGE, enough_rows
from fxcompile.layer_stats import CHUNK_BYTES, LayerStats
from fxcompile.patches import chunks, windows
from fxcompile.rewriting import Pairs

from ._grid import Mix, Moments, Parts, white

_STEPS, _WORK = 8, 4e11
"""Of filling in what an activation hides, and operations in all of them."""

Range = tuple[float, float]


@dataclass(frozen=True)
class Target:
    """What the branches are to give, before an activation behind them.

    Attributes:
        weight: of a strided convolution near to it, [g, o, C, *k].
        bias: [g, o].
        inside: the taps [*k] that the pooling sees too.
        pixels: how many pixels it sees.
        hidden: the activation clamps to this range.
    """

    weight: Tensor
    bias: Tensor
    inside: Tensor
    pixels: int
    hidden: Range = (-math.inf, math.inf)


Fit = tuple[Parts, Tensor]
"""The branches, and the bias [g, o] of the outputs."""


def from_weights(target: Target, width: int, mix: Mix) -> Fit:
    """The branches nearest to a target where its input's pixels vary alike and by themselves."""
    gram, cross = white(target.weight, target.inside, target.pixels)
    return Moments(gram, target.weight[0, 0].numel()).parts(cross, width, mix), target.bias


@torch.no_grad()
def from_data(
    target: Target, width: int, mix: Mix, conv: Any, prepared: Callable[[Tensor], tuple[Tensor, Tensor]], pairs: Pairs
) -> Fit:
    """The branches nearest to the wanted outputs.

    Where an activation clamps, an output at the end of its range may be anything beyond before: it is taken to be what
    the branches give there, or the end if they give less, and the branches are fitted again. Each such step lowers the
    error (Buckley and James 1979 do so for censored data).

    Args:
        conv: a convolution with the geometry of the strided one.
        prepared: from the site's input, what the convolution takes, and the pooled channels.
        pairs: batches of (input, wanted output).
    """
    prior, near = white(target.weight, target.inside, target.pixels)
    groups, features = target.weight.shape[0], target.weight[0, 0].numel()
    layer = nn.Conv1d(prior.shape[1] * groups, conv.out_channels, 1, groups=groups, device="meta")
    stats = LayerStats.of(layer)
    for z, _ in rows_of(conv, prepared, pairs):
        stats.update_inputs(z.flatten(1).T.unsqueeze(0))
    gram = stats.centred().gram / stats.rows
    level = gram[:, :features, :features].diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    level = RIDGE * torch.where(level > 0, level, 1.0)
    moments = Moments(gram + level * prior, features)
    parts, bias = from_weights(target, width, mix)
    low, high = target.hidden
    clamps = low > -math.inf or high < math.inf
    for _ in range(steps_for(stats) if clamps else 1):
        dense = parts.dense
        cross, total = torch.zeros_like(near), torch.zeros_like(bias)
        for z, y in rows_of(conv, prepared, pairs):
            x, wanted = z.double().transpose(0, 1), y.double().unflatten(1, (groups, -1)).transpose(0, 1)
            if clamps:
                given = torch.baddbmm(bias.unsqueeze(1), x, dense.mT)
                wanted = torch.where(wanted <= low, given.clamp_max(low), wanted)
                wanted = torch.where(wanted >= high, given.clamp_min(high), wanted)
            cross.baddbmm_(x.mT, wanted)
            total += wanted.sum(1)
        level_out = total / stats.rows
        about_means = cross / stats.rows - stats.mean_in.unsqueeze(2) * level_out.unsqueeze(1)
        parts = moments.parts(about_means + level * near, width, mix)
        bias = level_out - (parts.dense @ stats.mean_in.unsqueeze(2)).squeeze(2)
    return parts, bias


def steps_for(stats: LayerStats) -> int:
    """How often what an activation hides is filled in: fewer times where each takes seconds."""
    work = 4 * stats.rows * stats.features * stats.outputs
    return min(max(int(_WORK / work), 2), _STEPS)


def rows_of(
    conv: Any, prepared: Callable[[Tensor], tuple[Tensor, Tensor]], pairs: Pairs
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (x, p) of patches with the pooled channels, [n, g, F + P], and wanted outputs [n, O].

    All, or as many as a fit needs, drawn alike each time.
    """
    groups, dims = conv.groups, len(conv.kernel_size)
    wide = conv.weight[0].numel() + conv.weight.shape[1]
    total = sum(y.numel() // conv.out_channels for _, y in pairs)
    share = min(enough_rows(wide) / max(total, 1), 1.0)
    generator = torch.Generator().manual_seed(0)
    for x, y in pairs:
        ahead, pooled = prepared(x)
        view, leading = windows(conv, ahead)
        behind = torch.cat([item.reshape(-1, *item.shape[-1 - dims :]).movedim(1, -1) for item in (pooled, y)], -1)
        count = view.shape[:leading].numel()
        drawn = torch.randperm(count, generator=generator)[: math.ceil(share * count)].sort().values
        limit = max(1, CHUNK_BYTES // (8 * (groups * wide + conv.out_channels)))
        for patch, rest, _ in chunks(view, behind, leading, limit, drawn):
            assert rest is not None
            split = pooled.shape[-1 - dims]
            yield torch.cat([patch.flatten(2), rest[:, :split].unflatten(1, (groups, -1))], 2), rest[:, split:]
