"""Rules for writes to places that tensors of indices name."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcompile.lowering import Canonicaliser, rule
from fxcompile.program import dtype_of, shape_of
from fxcompile.raw_nodes import Call


def lower_index_put(self: Canonicaliser, call: Call) -> Any:
    """`x[:, index] = y`, whose first axis `torch.index_put` cannot leave out: what is indexed is moved to the front.

    As in numpy, the axes of the indices (together, where several broadcast) stand in the values where the first
    indexed axis was, or first if the indexed axes are apart.
    """
    bound = call.bind("indices values accumulate")
    indices, values = bound.get("indices"), bound.get("values")
    if not isinstance(indices, (tuple, list)) or None not in indices or not isinstance(values, fx.Node):
        return NotImplemented
    given = [(at, item) for at, item in enumerate(indices) if item is not None]
    axes: list[int] = []
    broadcast = 0
    for at, item in given:
        mask = dtype_of(item) == torch.bool
        rank = len(shape_of(item) or ())
        first = at + len(axes) - sum(other < at for other, _ in given)  # a mask of several axes takes as many
        axes += range(first, first + (rank if mask else 1))
        broadcast = max(broadcast, 1 if mask else rank)
    together = given[-1][0] - given[0][0] == len(given) - 1
    order = (*axes, *(axis for axis in range(call.rank) if axis not in axes))
    back = tuple(order.index(axis) for axis in range(call.rank))
    moved = self.make_part(torch.permute, (self.value(call.source), order), call.node)
    put = self.value(values)
    start, rank = axes[0] if together else 0, call.rank - len(axes) + broadcast
    held = len(shape_of(values) or ())
    if start and held > rank - start - broadcast:
        for _ in range(rank - held):
            put = self.make_part(torch.unsqueeze, (put, 0), call.node)
        front = (*range(start, start + broadcast), *range(start), *range(start + broadcast, rank))
        put = self.make_part(torch.permute, (put, front), call.node)
    tail = (True,) if bound.get("accumulate") else ()
    written = [self.value(item) for _, item in given]
    moved = self.make_part(torch.index_put, (moved, written, put, *tail), call.node)
    return self.make(torch.permute, (moved, back), call.node)


def register() -> None:
    """Enter this rule."""
    rule("index_put")(lower_index_put)
