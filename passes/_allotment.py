"""Shares out a budget: for each place one of several choices, so that the sum of the errors is small."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Choice(NamedTuple):
    """What a choice costs, and the error that it brings, in any units."""

    cost: float
    error: float


def allot(choices: Sequence[Sequence[Choice]], budget: float) -> list[int]:
    """For each place the index of a choice: costs within the budget, with an error near the least sum there is.

    From the choice of the least error at each place, along the lower convex hulls of their choices, always the step
    that costs the least error for what it saves, until the sum fits (the Lagrangian bound of Shoham and Gersho 1988);
    then what is left of the budget buys back error, the most first. The error is at most that of the last step above
    the least there is. Where the budget is below the sum of the cheapest, those.
    """
    hulls = [lower_hull(options) for options in choices]
    chosen = [hull[0] for hull in hulls]
    steps: list[tuple[float, int, int, int]] = []
    for place, (options, hull) in enumerate(zip(choices, hulls, strict=True)):
        steepest = 0.0
        for number, (first, second) in enumerate(pairwise(hull)):
            steepest = max(steepest, slope(options[first], options[second]))  # whatever rounding does to it
            steps.append((steepest, place, number, second))
    total = sum(options[index].cost for options, index in zip(choices, chosen, strict=True))
    for _, place, _, index in sorted(steps):
        if total <= budget:
            break
        total += choices[place][index].cost - choices[place][chosen[place]].cost
        chosen[place] = index
    return bought_back(choices, chosen, budget)


def bought_back(choices: Sequence[Sequence[Choice]], chosen: Sequence[int], budget: float) -> list[int]:
    """The same with what is left of the budget spent, each time on what lowers the error the most."""
    chosen = list(chosen)
    while True:
        left = budget - sum(options[index].cost for options, index in zip(choices, chosen, strict=True))
        better = [
            (options[chosen[place]].error - option.error, -place, -index)
            for place, options in enumerate(choices)
            for index, option in enumerate(options)
            if option.error < options[chosen[place]].error and option.cost - options[chosen[place]].cost <= left
        ]
        if not better:
            return chosen
        _, place, index = max(better)
        chosen[-place] = -index


def lower_hull(options: Sequence[Choice]) -> list[int]:
    """The choices on the lower convex hull, from that of the least error to the cheapest."""
    hull: list[int] = []
    for index in sorted(range(len(options)), key=lambda item: (-options[item].cost, options[item].error)):
        if hull and options[hull[-1]].cost == options[index].cost:
            continue
        while hull and options[index].error <= options[hull[-1]].error:
            hull.pop()
        while len(hull) > 1 and slope(options[hull[-2]], options[hull[-1]]) >= slope(options[hull[-2]], options[index]):
            hull.pop()
        hull.append(index)
    return hull


def slope(dearer: Choice, cheaper: Choice) -> float:
    """The error that it takes to save a unit of cost."""
    return (cheaper.error - dearer.error) / (dearer.cost - cheaper.cost)
