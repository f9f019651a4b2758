"""A chain of convolutions fitted to the data that the layer which it replaces sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fxcompile.fitting import solve
from fxcompile.layer_stats import LayerStats, grouped, mean_output

from ._stacking import compose, refine

MOST_FEATURES = 4608
"""Largest number of inputs to one output (C/g * kernel) for which a Gram matrix of them is made: 170 MB."""

_STEP = 1e10
"""Operations of a joint step above which a start that is fitted to the data already stays as it is: steps bring it a
few percent, and a dozen take longer than all else.
"""


def fitted(
    stats: LayerStats,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    start: Callable[[Tensor, Tensor], Sequence[Tensor]],
    *,
    near: bool = False,
) -> tuple[list[Tensor], Tensor | None]:
    """Stages and bias whose outputs come nearest to the wanted ones.

    sum |chain x + b - y|² + a |chain - W|² is, but for a constant, tr(E (S + a I) Eᵀ) with E = W* - chain and W* the
    best dense weight (`solve`): so the chain is fitted to W* in the norm that the data give.

    Args:
        stats: of the layer, whose weight [O, C/g, *k] and bias are given.
        start: from W* and S [g, F, F], the stages to start at.
        near: whether these are fitted to the data already. Then no random ones are tried beside them, which never ended
            lower for a singular value decomposition.
    """
    moments = stats.raw() if bias is None else stats.centred()
    gram = moments.gram / stats.rows
    wanted, level = solve(stats, weight, bias)
    stages = list(start(wanted, gram))
    if not near or 2 * weight.numel() * stats.features <= _STEP:
        stages = refine(stages, wanted, gram, groups, starts=1 if near else None)
    if level is None:
        return stages, None
    return stages, level + mean_output(grouped(wanted - compose(stages, groups), stats), None, stats)
