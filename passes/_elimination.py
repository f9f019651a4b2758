"""Which channels the layers behind can do without best, given all others: backward elimination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._stack_refining import held

AT_ONCE, CROWDED = 1 / 32, 0.8
"""The share of the channels left that goes at one step, one where that is less; and that of those in memory which are
left, below which the others are dropped from there.
"""

Units = Mapping[int, Tensor]
"""By the number of a group, some of its units."""


@dataclass
class Taker:
    """A layer that takes the channels of some groups, as elimination sees it.

    Attributes:
        weight: [g, o, F], what is left of it given all that is gone.
        inverse: [g, F, F], of S, of what is left.
        places: by group [units, n], the features of each unit, alike in all groups of a convolution.
        scale: what a squared error of its outputs counts.
    """

    weight: Tensor
    inverse: Tensor
    places: dict[int, Tensor]
    scale: float

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor, places: Mapping[int, Tensor], matters: float = 1.0) -> Taker:
        """From W [g, o, F] and the second moments S [g, F, F] of its inputs, held by a small ridge.

        Args:
            matters: what it counts that an error is as large as the outputs.
        """
        size = float((weight @ gram * weight).sum())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(held(gram)))
        return cls(weight.clone(), inverse, dict(places), matters / size if size > 0 else 0.0)

    def costs(self, group: int, units: Tensor) -> Tensor:
        """[units], what is lost with each: tr(B_u [P_uu]⁻¹ B_uᵀ), P = S⁻¹."""
        if group not in self.places:
            return torch.zeros(len(units), dtype=torch.float64)
        places = self.places[group][units]
        blocks = self.inverse[:, places.unsqueeze(2), places.unsqueeze(1)]  # [g, units, n, n]
        columns = self.weight[:, :, places].permute(0, 2, 3, 1)  # [g, units, n, o]
        solved = torch.cholesky_solve(columns, torch.linalg.cholesky(blocks))
        return (columns * solved).sum((0, 2, 3)).clamp_min(0) * self.scale

    def remove(self, units: Units) -> None:
        """Take units out: what the others can do for them goes into their weights, W -= W_u [P_uu]⁻¹ P_u."""
        parts = [self.places[group][own].flatten() for group, own in units.items() if group in self.places]
        if not parts:
            return
        gone = torch.cat(parts)
        rows = self.inverse[:, gone]
        solved = torch.cholesky_solve(rows, torch.linalg.cholesky(rows[:, :, gone]))  # [g, gone, F]
        self.weight -= self.weight[:, :, gone] @ solved
        self.inverse -= rows.mT @ solved

    def compact(self, left: Units) -> None:
        """Forget the features of units that are gone."""
        stays = torch.ones(self.inverse.shape[1], dtype=torch.bool)
        for places in self.places.values():
            stays[places.flatten()] = False
        for group, places in self.places.items():
            stays[places[left[group]].flatten()] = True
        self.weight, self.inverse = self.weight[:, :, stays], self.inverse[:, stays][:, :, stays]
        numbers = stays.cumsum(0) - 1
        self.places = {group: numbers[places] for group, places in self.places.items()}  # of those gone, anything


@dataclass(frozen=True)
class Step:
    """A unit that goes, and what that costs for what it saves: no less than any before it."""

    group: int
    unit: int
    rate: float


def eliminate(
    takers: Sequence[Taker], sizes: Sequence[int], most: Sequence[int], prices: Sequence[float]
) -> list[Step]:
    """The order in which units of some groups go: always those next that are missed the least for what they save.

    What is missed is what the layers that take them lose of their squared outputs if the weights that are left make up
    for it as well as they can: the optimal brain surgeon's saliency of whole channels (Hassibi and Stork 1993).

    Args:
        takers: which are used up.
        sizes: of the groups.
        most: how many units of each may go.
        prices: what a unit of each saves.
    """
    left = {group: torch.arange(size) for group, size in enumerate(sizes)}
    room = list(most)
    steps: list[Step] = []
    rate, crowd = 0.0, sum(sizes)
    while any(room):
        found: list[tuple[float, int, int]] = []
        for group, units in left.items():
            if room[group]:
                costs = torch.stack([taker.costs(group, units) for taker in takers]).sum(0) / max(prices[group], 1e-300)
                found += [(cost, group, place) for place, cost in enumerate(costs.tolist())]
        count = max(int(AT_ONCE * len(found)), 1)
        chosen: dict[int, list[int]] = {}
        for cost, group, place in sorted(found):
            if not count:
                break
            if room[group]:
                room[group] -= 1
                count -= 1
                rate = max(rate, cost)
                chosen.setdefault(group, []).append(place)
                steps.append(Step(group, int(left[group][place]), rate))
        gone = {group: left[group][places] for group, places in chosen.items()}
        for taker in takers:
            taker.remove(gone)
        for group, places in chosen.items():
            stays = torch.ones(len(left[group]), dtype=torch.bool)
            stays[places] = False
            left[group] = left[group][stays]
        if sum(map(len, left.values())) < CROWDED * crowd:
            crowd = sum(map(len, left.values()))
            for taker in takers:
                taker.compact(left)
    return steps
