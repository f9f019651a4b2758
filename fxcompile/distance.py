"""How far two computations of the same tensors are apart, over any number of batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Distance:
    """`||ours - theirs|| / ||theirs||` over all batches given to `add`; for integers, the share that differs.

    Values that are not finite in both are left out; infinite where a value is finite in one of them only.
    """

    difference: float = 0.0
    total: float = 0.0
    torn: bool = False
    counts: bool = False

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """One more batch of both."""
        if not (theirs.is_floating_point() or theirs.is_complex()):
            self.counts = True
            self.difference += int((ours != theirs).sum())
            self.total += theirs.numel()
            return
        if theirs.is_complex():
            ours, theirs = torch.view_as_real(ours), torch.view_as_real(theirs)
        a, b = ours.detach().double(), theirs.detach().double()
        square = float(b.square().sum())
        difference = float((a - b).square().sum())
        if not (difference < float("inf") and square < float("inf")):
            finite = a.isfinite()
            self.torn = self.torn or not torch.equal(finite, b.isfinite())
            finite &= b.isfinite()
            square = float(b[finite].square().sum())
            difference = float((a[finite] - b[finite]).square().sum())
        self.difference += difference
        self.total += square

    def join(self, other: Distance) -> None:
        """Take in the batches of another."""
        self.difference += other.difference
        self.total += other.total
        self.torn, self.counts = self.torn or other.torn, self.counts or other.counts

    @property
    def value(self) -> float:
        """The relative error; 0 where nothing was added."""
        if self.torn or (self.difference and not self.total):
            return float("inf")
        if not self.difference:
            return 0.0
        share = self.difference / self.total
        return share if self.counts else float(share**0.5)


def distances(ours: Iterable[Sequence[Tensor]], theirs: Iterable[Sequence[Tensor]]) -> list[Distance]:
    """How far each output of one computation is from another's, over batches of outputs that are taken one by one."""
    found: list[Distance] = []
    for given, wanted in zip(ours, theirs, strict=True):
        found = found or [Distance() for _ in wanted]
        for distance, a, b in zip(found, given, wanted, strict=True):
            distance.add(a, b)
    return found
