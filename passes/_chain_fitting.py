"""A chain of convolutions fitted to the data that the layer which it replaces sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fxcompile.fitting import solve
from fxcompile.layer_stats import LayerStats, grouped, mean_output

from ._stacking import compose, refine

MOST_FEATURES = 4608
"""Largest number of inputs to one output (C/g * kernel) for which a Gram matrix of them is made: 170 MB."""


def fitted(
    stats: LayerStats,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    start: Callable[[Tensor, Tensor], Sequence[Tensor]],
    starts: int | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """Stages and bias whose outputs come nearest to the wanted ones.

    sum |chain x + b - y|² + a |chain - W|² is, but for a constant, tr(E (S + a I) Eᵀ) with E = W* - chain and W* the
    best dense weight (`solve`): so the chain is fitted to W* in the norm that the data give.

    Args:
        stats: of the layer, whose weight [O, C/g, *k] and bias are given.
        start: from W* and S [g, F, F], the stages to start at.
        starts: see `refine`.
    """
    moments = stats.raw() if bias is None else stats.centred()
    gram = moments.gram / stats.rows
    wanted, level = solve(stats, weight, bias)
    stages = refine(start(wanted, gram), wanted, gram, groups, starts=starts)
    if level is None:
        return stages, None
    return stages, level + mean_output(grouped(wanted - compose(stages, groups), stats), None, stats)
