"""Rules for indexing and slicing."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxcompile import schemas
from fxcompile.lowering import Canonicaliser, NoSpelling, rule
from fxcompile.program import dtype_of
from fxcompile.raw_nodes import Call

LARGE = 2**62
"""From here on, `aten` means the end of an axis."""


def lower_getitem(self: Canonicaliser, call: Call) -> Any:
    source, index = self.value(call.args[0]), self.value(call.args[1])
    if isinstance(source, (tuple, list)):  # sizes, or an operation that became a layer
        return source[index]
    tensor = schemas.is_tensor(call.args[0])
    if not isinstance(source, fx.Node) or not tensor:
        if isinstance(index, int) and index < 0 and isinstance(call.args[0], fx.Node):
            parts = call.args[0].meta.get("tensor_meta")
            index += len(parts) if type(parts) is tuple else 0
        return self.make(operator.getitem, (source, index), call.node)
    raw = call.args[1]
    items = list(raw) if isinstance(raw, tuple) else [raw]
    if any(isinstance(item, (list, bool)) for item in items):
        return self.make(operator.getitem, (source, index), call.node)
    return take(self, call.node, source, call.rank, items)


def take(self: Canonicaliser, node: fx.Node, source: fx.Node, rank: int, items: list[Any]) -> fx.Node:
    """Indexing with several axes at once as one step for each axis, then those indices that are tensors."""
    used = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis in [item for item in items if item is Ellipsis]:
        at = next(position for position, item in enumerate(items) if item is Ellipsis)
        items = items[:at] + [slice(None)] * (rank - used) + items[at + 1 :]
    axis = 0
    tensors: dict[int, Any] = {}
    steps: list[tuple[Any, Any]] = []
    for item in items:
        if item is None:
            steps.append((torch.unsqueeze, axis))
            axis += 1
        elif isinstance(item, slice):
            part = whole_or(self, item)
            if part is not None:
                steps.append((operator.getitem, (*(slice(None),) * axis, part)))
            axis += 1
        elif schemas.is_tensor(item):
            if dtype_of(item) == torch.bool:
                raise NoSpelling(node, "the shape of what a boolean mask picks out as its result depends on values")
            tensors[axis] = self.value(item)
            axis += 1
        else:
            steps.append((operator.getitem, (*(slice(None),) * axis, self.value(item))))
    if tensors:
        steps.append(
            (operator.getitem, tuple(tensors.get(position, slice(None)) for position in range(max(tensors) + 1)))
        )
    for number, (target, argument) in enumerate(steps):
        last = number == len(steps) - 1
        source = (self.make if last else self.make_part)(target, (source, argument), node)
    return source


def whole_or(self: Canonicaliser, part: slice) -> slice | None:
    """A slice in the new graph, or None if it is the whole axis."""
    start, stop, step = (self.value(item) for item in (part.start, part.stop, part.step))
    start = None if isinstance(start, int) and start == 0 else start
    stop = None if isinstance(stop, int) and stop >= LARGE else stop
    step = None if isinstance(step, int) and step == 1 else step
    return None if (start, stop, step) == (None, None, None) else slice(start, stop, step)


def lower_slice(self: Canonicaliser, call: Call) -> Any:
    """`aten.slice`, `select` and `narrow` as Python indexing."""
    bound = call.bind({"slice": "dim start end step", "select": "dim index"}.get(call.name, "dim start length"))
    if not call.rank:
        return NotImplemented
    axis = bound.get("dim", 0) % call.rank
    if call.name == "select":
        index: Any = bound["index"]
    elif call.name == "slice":
        index = slice(bound.get("start"), bound.get("end"), bound.get("step"))
    else:
        start, length = self.value(bound["start"]), self.value(bound["length"])
        if not isinstance(start, int) or start < 0:
            return NotImplemented
        if isinstance(length, fx.Node) and start:
            length = self.make_part(operator.add, (length, start), call.node)
        elif not isinstance(length, fx.Node):
            length = start + length
        index_value = slice(start or None, length, None)
        position = (*(slice(None),) * axis, index_value)
        return self.make(operator.getitem, (self.value(call.source), position), call.node)
    return take_or_same(self, call, [slice(None)] * axis + [index])


def take_or_same(self: Canonicaliser, call: Call, items: list[Any]) -> Any:
    return take(self, call.node, self.value(call.source), call.rank, items)


def lower_scatter_all(self: Canonicaliser, call: Call) -> Any:
    """`slice_scatter` over a whole axis gives what is scattered."""
    bound = call.bind("src dim start end step")
    step = bound.get("step", 1)
    whole = self.plain(bound.get("start", 0)) == 0 and self.plain(bound.get("end", LARGE)) >= LARGE and step == 1
    same = isinstance(bound["src"], fx.Node) and dtype_of(bound["src"]) == dtype_of(call.node)
    return self.value(bound["src"]) if whole and same else NotImplemented


def lower_index(self: Canonicaliser, call: Call) -> Any:
    """`aten.index(x, [None, indices])`."""
    if len(call.args) != 2 or not isinstance(call.args[1], (tuple, list)):
        return NotImplemented
    if any(isinstance(item, fx.Node) and dtype_of(item) == torch.bool for item in call.args[1]):
        raise NoSpelling(call.node, "the shape of what a boolean mask picks out as its result depends on values")
    index = tuple(slice(None) if item is None else self.value(item) for item in call.args[1])
    return self.make(operator.getitem, (self.value(call.source), index), call.node)


def register() -> None:
    """Enter these rules."""
    rule("getitem")(lower_getitem)
    rule("slice", "select", "narrow")(lower_slice)
    rule("slice_scatter")(lower_scatter_all)
    rule("index")(lower_index)
