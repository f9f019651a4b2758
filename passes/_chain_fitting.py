"""A chain of convolutions fitted to the data that the layer which it replaces sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from fxcompile.fitting import enough_rows, solve
from fxcompile.layer_stats import LayerStats, grouped, mean_output
from fxcompile.rewriting import Site

from ._stacking import compose, refine

Made = TypeVar("Made")

MOST_FEATURES = 4608
"""Largest number of inputs to one output (C/g * kernel) for which a Gram matrix of them is made: 170 MB."""

_STEP = 1e10
"""Operations of a joint step above which a start that is fitted to the data already stays as it is: steps bring it a
few percent, and a dozen take longer than all else.
"""


def fit_statistics(site: Site) -> LayerStats | None:
    """The statistics that a site's layer is fitted to; None without data, and where they would be too large."""
    return site.statistics() if site.pairs and site.layer.weight[0].numel() <= MOST_FEATURES else None


def inputs_seen(layer: Any, xs: Sequence[Tensor]) -> LayerStats:
    """Statistics of a layer's inputs alone, from a third of the rows that a fit needs."""
    stats = LayerStats.of(layer)
    rows = math.ceil(enough_rows(stats.features) / (3 * len(xs)))
    for x in xs:
        stats.update_inputs(x, max_rows=rows)
    return stats


def mean_gram(stats: LayerStats, about_mean: bool) -> Tensor:
    """S [g, F, F] of a row: about the mean, as it counts where a bias keeps that, or about zero."""
    moments = stats.centred() if about_mean else stats.raw()
    return moments.gram / max(stats.rows, 1)


def drafted(
    stages: Sequence[Tensor], weight: Tensor, gram: Tensor | None, groups: int, steps: int, *, near: bool = True
) -> list[Tensor]:
    """Stages after so many joint steps; as they are without S, or where `fitted` takes none, with the same `near`."""
    if gram is None or not steps or (near and too_large(weight)):
        return list(stages)
    return refine(stages, weight, gram, groups, steps=steps, starts=1)


def too_large(weight: Tensor) -> bool:
    """Whether a joint step towards a weight [O, C/g, *k] takes too long."""
    return 2 * weight.numel() * weight[0].numel() > _STEP


def fitted_by(
    stats: LayerStats,
    weight: Tensor,
    bias: Tensor | None,
    fit: Callable[[Tensor, Tensor], tuple[Made, Tensor]],
) -> tuple[Made, Tensor | None]:
    """What a fit makes of a layer, and the bias, so that the outputs come nearest to the wanted ones.

    sum |V x + b - y|² + a |V - W|² is, but for a constant, tr(E (S + a I) Eᵀ) with E = W* - V and W* the best dense
    weight (`solve`): so what computes V is fitted to W* in the norm that the data give.

    Args:
        stats: of the layer, whose weight [O, C/g, *k] and bias are given.
        fit: from W* and S [g, F, F], which it may overwrite, what it makes, and the dense weight V of that.
    """
    wanted, level = solve(stats, weight, bias)
    gram = (
        stats.raw() if bias is None else stats.centred()
    ).gram / stats.rows  # no sums but its own are held beside it
    made, dense = fit(wanted, gram)
    if level is None:
        return made, None
    return made, level + mean_output(grouped(wanted - dense, stats), None, stats)


def fitted(
    stats: LayerStats,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    start: Callable[[Tensor, Tensor], Sequence[Tensor]],
    *,
    near: bool = False,
) -> tuple[list[Tensor], Tensor | None]:
    """Stages and bias whose outputs come nearest to the wanted ones, as `fitted_by` says.

    Args:
        stats: of the layer, whose weight [O, C/g, *k] and bias are given.
        start: from W* and S [g, F, F], the stages to start at.
        near: whether these are fitted to the data already. Then no random ones are tried beside them, which never ended
            lower for a singular value decomposition; and no steps are taken where one takes too long.
    """

    def fit(wanted: Tensor, gram: Tensor) -> tuple[list[Tensor], Tensor]:
        stages = list(start(wanted, gram))
        if not near or not too_large(weight):
            stages = refine(stages, wanted, gram, groups, starts=1 if near else None)
        return stages, compose(stages, groups)

    return fitted_by(stats, weight, bias, fit)
