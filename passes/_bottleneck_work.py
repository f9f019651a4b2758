"""What the layers of a bottleneck cost."""

from __future__ import annotations

import math
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

    def scale(self, share: float) -> float:
        """The part of inputs and of outputs that costs this share: the root of a quadratic."""
        square = self.after * self.taps * self.inputs * self.outputs
        single = self.before * self.inputs**2 + self.after * self.outputs**2
        return (math.sqrt(single**2 + 4 * square * share * square) - single) / (2 * square) if square else 1.0


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
