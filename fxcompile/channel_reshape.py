"""The channels of a tensor in another shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import fx

from fxcompile.channel_labels import Axes, Labelling, Labels, rigid


def reshaped(labels: Labelling, node: fx.Node, x: Axes, before: Sequence[int], after: Sequence[int]) -> Axes:
    """The labels of the axes after a reshape.

    Axes whose numbers of entries multiply to the same number make a block: an axis of channels with pixels behind it
    becomes one with several entries for each channel; one that is taken apart keeps its channels on one of the new
    axes, where those that lie in the same place of it go together.
    """
    given: list[Labels | None] = []
    if 0 in before:
        labels.fix_all(x, f"'{node.name}' has nothing in it")
        return rigid(len(after))
    for old, new in blocks(before, after):
        bearing = [axis for axis in old if x[axis] is not None]
        if not bearing:
            given += [None] * len(new)
            continue
        if len(bearing) > 1 and sum(before[axis] > 1 for axis in bearing) > 1:
            for axis in bearing:
                labels.fix(x[axis], f"'{node.name}' makes one axis of two that bear channels")
            given += [None] * len(new)
            continue
        axis = max(bearing, key=lambda item: before[item])
        own = x[axis]
        assert own is not None
        spread = own.reshape([before[item] if item == axis else 1 for item in old])
        flat = np.broadcast_to(spread, [before[item] for item in old]).reshape([after[item] for item in new])
        place = bearer(flat)
        found = np.moveaxis(flat, place, 0).reshape(flat.shape[place], -1)
        given += [None] * place + [labels.tied_over(found, 1)] + [None] * (len(new) - place - 1)
    return tuple(given)


def bearer(flat: Labels) -> int:
    """The axis that channels stay on: that along which nothing new gets tied, else the longest."""
    for axis in range(flat.ndim):
        rows = np.moveaxis(flat, axis, 0).reshape(flat.shape[axis], -1)
        if flat.shape[axis] > 1 and bool((rows == rows[:, :1]).all()):
            return axis
    return int(np.argmax(flat.shape))


def blocks(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Runs of old and of new axes, as short as can be, with the same number of entries."""
    old = new = 0
    while old < len(before) and new < len(after):
        left, right = [old], [new]
        a, b = before[old], after[new]
        old, new = old + 1, new + 1
        while a != b:
            if a < b:
                a *= before[old]
                left.append(old)
                old += 1
            else:
                b *= after[new]
                right.append(new)
                new += 1
        if old == len(before) or new == len(after):  # what is left are ones
            left += range(old, len(before))
            right += range(new, len(after))
            old, new = len(before), len(after)
        yield left, right
    if old < len(before) or new < len(after):
        yield list(range(old, len(before))), list(range(new, len(after)))
