"""Who gets what, so that all together cost the least: the linear assignment problem."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from fxcompile.layer_stats import check_finite


def assignment(cost: Tensor) -> Tensor:
    """For each of n rows of a cost [n, m], n <= m, a column of its own, [n]; the sum of their costs is the smallest.

    By shortest augmenting paths with dual prices (Jonker and Volgenant 1987), O(n^2 m).

    Raises:
        FitError: a cost is NaN or infinite.
    """
    check_finite(cost, "costs of an assignment")
    costs = cost.detach().double().cpu().numpy()
    rows, columns = costs.shape
    price = numpy.zeros(columns)
    worth = numpy.zeros(rows)
    owner = numpy.full(columns, -1)
    chosen = numpy.full(rows, -1)
    for row in range(rows):
        reach, before = numpy.full(columns, numpy.inf), numpy.full(columns, -1)
        done = numpy.zeros(columns, dtype=bool)
        reached: list[int] = []
        at, length, column = row, 0.0, -1
        while at >= 0:
            reached.append(at)
            through = length + costs[at] - worth[at] - price
            nearer = ~done & (through < reach)
            reach[nearer], before[nearer] = through[nearer], at
            column = int(numpy.where(done, numpy.inf, reach).argmin())
            length, at = float(reach[column]), int(owner[column])
            done[column] = at >= 0
        worth[row] += length
        for other in reached[1:]:
            worth[other] += length - reach[chosen[other]]
        price[done] -= length - reach[done]
        while column >= 0:
            at = int(before[column])
            owner[column] = at
            chosen[at], column = column, int(chosen[at])
    return torch.from_numpy(chosen)
