"""What rules for functions read of a call, and the rule for those that no rule knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fxcompile.channel_labels import Axes, Kept, Labelling, Labels, Value, rigid
from fxcompile.labels import function_name
from fxcompile.program import shape_of

FunctionRule = Callable[[Labelling, fx.Node], Value]
"""(labels, the node) -> what is known of the result"""


def shape(node: object) -> tuple[int, ...]:
    """Of a node's tensor; () of numbers."""
    return (shape_of(node) or ()) if isinstance(node, fx.Node) else ()


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """What a call is given by position, in the form that canonical form has for it."""
    return node.args


def by_name(node: fx.Node, name: str, default: Any) -> Any:
    """What a call is given by keyword, else what it has by position."""
    return node.kwargs.get(name, default)


def kept_sizes(sizes: Sequence[Any], axes: Axes) -> Callable[[Kept], tuple[Any, ...]]:
    """Sizes as a call has them, in numbers where these stood, from what stays of each axis."""

    def sized(kept: Kept) -> tuple[Any, ...]:
        return tuple(
            int(kept(axis).sum()) if axis is not None and isinstance(size, int) and size > 0 else size
            for size, axis in zip(sizes, axes, strict=True)
        )

    return sized


def whole(labels: Labelling, axis: Labels | None, size: int) -> Labels:
    """The labels of an axis, new ones that cannot go if it is rigid."""
    if axis is not None:
        return axis
    found = labels.fresh(size)
    labels.fix(found, "no layer makes them")
    return found


def unknown(labels: Labelling, node: fx.Node) -> Value:
    """What goes into an operation that is not known here stays."""
    reason = f"'{node.name}' calls {function_name(node)}, which they are not followed through"
    for item in node.all_input_nodes:
        labels.fix_all(labels.values.get(item), reason)
    outputs = node.meta.get("tensor_meta")
    if type(outputs) is tuple:
        return [None if item is None else rigid(len(item.shape)) for item in outputs]
    return None if shape_of(node) is None else rigid(len(shape(node)))
