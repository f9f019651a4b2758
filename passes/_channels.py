"""Follows channels forward through operations that treat all of them alike.

An operation *carries* channels if it moves them, or averages inside each of them: then `scale * x + shift`, with a
number for each channel, may stand before it as well as after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompile.labels import node_name
from fxcompile.program import Program, shape_of

Rule = Callable[[Any, int, int], int | None]
"""(the layer, or the call's arguments after the input; axis of the channels; rank of the input) -> axis after it, or
None where it mixes channels or something else into them."""


@dataclass(frozen=True)
class Way:
    """Where the channels of a node's value go.

    Attributes:
        between: the nodes that carry them, in order.
        end: the only node that takes them then; None where they are used several times, or not at all.
        axis: on which they arrive there.
        reason: why there is no end.
    """

    between: tuple[fx.Node, ...]
    end: fx.Node | None
    axis: int
    reason: str = ""


def follow(program: Program, node: fx.Node, axis: int) -> Way:
    """The way of a node's channels, which lie on this axis of its value."""
    between: list[fx.Node] = []
    while len(node.users) == 1:
        following = next(iter(node.users))
        carried = carry(program, following, axis)
        if carried is None:
            return Way(tuple(between), following, axis)
        between.append(following)
        node, axis = following, carried
    return Way(tuple(between), None, axis, f"the output of '{node_name(node)}' is used {len(node.users)} times")


def carry(program: Program, node: fx.Node, axis: int) -> int | None:
    """The axis of the channels after a node that carries them, or None."""
    layer = program.layer(node)
    rule = LAYERS.get(type(layer)) if layer is not None else FUNCTIONS.get(node.target)
    if rule is None or len(node.all_input_nodes) != 1 or (layer is not None and (node.kwargs or len(node.args) != 1)):
        return None
    shape = shape_of(node.all_input_nodes[0])
    return None if shape is None else rule(layer if layer is not None else node.args[1:], axis, len(shape))


def _same(what: Any, axis: int, rank: int) -> int:
    return axis


def _average(dims: int) -> Rule:
    """Pools over the last axes, unless zeros from outside the map get into the average."""

    def rule(pool: Any, axis: int, rank: int) -> int | None:
        padding = getattr(pool, "padding", 0)
        padded = any(padding) if isinstance(padding, tuple) else bool(padding)
        zeros = padded and pool.count_include_pad
        return axis if axis < rank - dims and not zeros and getattr(pool, "divisor_override", None) is None else None

    return rule


def _flatten(args: Any, axis: int, rank: int) -> int | None:
    start, end = args
    if axis <= start:
        return axis  # of several pixels a channel, each is a channel after it
    return axis - (end - start) if axis > end else None


def _permute(args: Any, axis: int, rank: int) -> int:
    return list(args[0]).index(axis)


def _mean(args: Any, axis: int, rank: int) -> int | None:
    if not args or args[0] is None or axis in args[0]:
        return None
    kept = len(args) > 1 and args[1]
    return axis if kept else axis - sum(dim < axis for dim in args[0])


def _unsqueeze(args: Any, axis: int, rank: int) -> int | None:
    return axis + int(args[0] <= axis)


def _pad(args: Any, axis: int, rank: int) -> int | None:
    amounts, mode = args[0], args[1]
    return axis if mode != "constant" and axis < rank - math.ceil(len(amounts) / 2) else None


def _interpolate(args: Any, axis: int, rank: int) -> int | None:
    return axis if axis == 1 else None


LAYERS: dict[type[nn.Module], Rule] = {
    nn.Identity: _same,
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), _same),
    **{getattr(nn, f"AvgPool{dims}d"): _average(dims) for dims in (1, 2, 3)},
    **{getattr(nn, f"AdaptiveAvgPool{dims}d"): _average(dims) for dims in (1, 2, 3)},
}
FUNCTIONS: dict[Any, Rule] = {
    torch.flatten: _flatten,
    torch.permute: _permute,
    torch.mean: _mean,
    torch.squeeze: _mean,  # over axes of one
    torch.unsqueeze: _unsqueeze,
    F.pad: _pad,
    F.interpolate: _interpolate,
}
