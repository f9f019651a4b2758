"""What the layers of a bottleneck cost."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from ._polyadic import full_rank


@dataclass(frozen=True)
class Work:
    """What decides the cost of a layer: channels in each group, taps of the kernel, positions of the maps."""

    groups: int
    inputs: int
    outputs: int
    taps: int
    before: int
    after: int

    @property
    def dense(self) -> float:
        """MACs of the layer."""
        return self.groups * self.after * self.taps * self.inputs * self.outputs

    @property
    def most(self) -> tuple[int, int]:
        """Channels from which on nothing is gained."""
        return min(self.inputs, self.taps * self.outputs), min(self.outputs, self.taps * self.inputs)

    def macs(self, ranks: Sequence[int]) -> float:
        """MACs of the layers with so many channels between."""
        if len(ranks) == 1:
            return self.groups * ranks[0] * (self.before * self.inputs + self.after * self.taps * self.outputs)
        inner, outer = ranks
        behind = self.after * outer * (self.taps * inner + self.outputs)
        return self.groups * (self.before * self.inputs * inner + behind)

    def share(self, ranks: Sequence[int]) -> float:
        """The same as a share of the layer's."""
        return self.macs(ranks) / self.dense if self.dense else 1.0

    def widths(self, share: float, round_to: int) -> tuple[int, int]:
        """R and S that cost no more than a share of the layer's MACs; one channel each where nothing does.

        Multiples of `round_to` in all groups together, numbers below it, and all that `most` allows, are to choose
        from. Of all pairs it is the one in which the smaller of R / C and S / O is largest, and of those the dearest:
        neither could be larger alone.
        """
        left, firsts, lasts = share * self.dense / self.groups, *(self._allowed(most, round_to) for most in self.most)
        found = [(0.0, 0.0, 1, 1)]
        for inner in firsts:
            each = self.after * (self.taps * inner + self.outputs)
            affordable = (left - self.before * self.inputs * inner) / each if each else math.inf
            behind = bisect_right(lasts, affordable * (1 + 1e-9))
            if behind:
                outer = lasts[behind - 1]
                evenness = min(inner / self.inputs, outer / self.outputs)
                found.append((evenness, self.macs((inner, outer)), inner, outer))
        return max(found)[2:]

    def _allowed(self, most: int, round_to: int) -> list[int]:
        """Channels that a group may have, ascending."""
        step = math.lcm(self.groups, round_to) // self.groups
        return sorted({*range(1, min(step, most)), *range(step, most, step), most})


@dataclass(frozen=True)
class CanonicalWork(Work):
    """The same where each axis of the kernel has a layer of its own.

    Attributes:
        along: MACs of one channel in these layers.
        terms: channels from which on nothing is gained.
    """

    along: int
    terms: int

    @classmethod
    def of(cls, work: Work, kernel: Sequence[int], before: Sequence[int], after: Sequence[int]) -> CanonicalWork:
        """From that of a layer with this kernel, and maps of these sizes."""
        size = [(early if taps > 1 else late) for taps, early, late in zip(kernel, before, after, strict=True)]
        first, along = math.prod(size), 0
        for axis, taps in enumerate(kernel):
            size[axis] = after[axis]
            along += math.prod(size) * taps if taps > 1 else 0
        terms = full_rank([work.outputs, work.inputs, *kernel])
        return cls(work.groups, work.inputs, work.outputs, work.taps, first, work.after, along, terms)

    @property
    def most(self) -> tuple[int, int]:
        """Channels from which on nothing is gained."""
        return self.terms, self.terms

    def macs(self, ranks: Sequence[int]) -> float:
        """MACs of the layers with so many channels between."""
        return self.groups * ranks[0] * (self.before * self.inputs + self.along + self.after * self.outputs)
