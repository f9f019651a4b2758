"""Which channels hold a number that is known from the weights alone, whatever the input.

Such a filter has no weights, or none on what is not known itself; its norm, activation and pooling make other numbers
of it, until zeros from outside of the map come in. What is not known here to be constant counts as not constant.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompile import channel_functions, channel_layers
from fxcompile.channel_calls import arguments, by_name, shape
from fxcompile.layers import BATCH_NORMS, INSTANCE_NORMS, as_double, converted
from fxcompile.program import Program, dtype_of, fetch, shape_of

from ._known import (
    UNKNOWN,
    Known,
    along,
    evaluated,
    filters,
    normalised,
    per_channel,
    pooled,
    settled,
    times,
    uniform,
    widened,
)
from .fold_batchnorm import LINEAR, channel_axis, in_channels

JUMPS = (
    *(torch.floor, torch.ceil, torch.round, torch.trunc, torch.frac, torch.sign, torch.fmod),
    *(operator.floordiv, operator.mod, nn.Hardshrink, nn.Threshold, torch.nan_to_num),
)
"""Functions with steps, where rounding may fall on the other side, and one that hides NaN."""

POOLS = {
    **{getattr(nn, f"{kind}Pool{dims}d"): dims for kind in ("AdaptiveAvg", "AdaptiveMax") for dims in (1, 2, 3)},
    **{getattr(nn, f"{kind}Pool{dims}d"): dims for kind in ("Avg", "Max") for dims in (1, 2, 3)},
}
"""By class, over how many axes a pool goes."""


def constants(program: Program) -> dict[fx.Node, Any]:
    """For each node its constants: a tensor or None, or a list of these where it gives several tensors."""
    found: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        value = Walk(program, found).value(node)
        found[node] = [settled(item) for item in value] if isinstance(value, (list, tuple)) else settled(value)
    return found


class Walk:
    """One step from what the nodes before are known to hold."""

    def __init__(self, program: Program, found: dict[fx.Node, Any]) -> None:
        self.program = program
        self.found = found

    def value(self, node: fx.Node) -> Any:
        """What is constant of a node's value."""
        if node.op == "get_attr":
            held = fetch(self.program.module, str(node.target)).detach()
            return held.double() if held.is_floating_point() else None
        source = node.args[0] if node.args else None
        if node.op == "call_module":
            plain = isinstance(source, fx.Node) and shape_of(source) is not None and shape_of(node) is not None
            return self.layer(self.program.layer(node), source) if plain else None
        if node.op != "call_function" or not floating(node):
            return None
        rule = FUNCTIONS.get(node.target)
        if rule is not None:
            return rule(self, node)
        known = channel_functions.FUNCTIONS.get(node.target) is channel_functions.elementwise
        return self.elementwise(node) if known and node.target not in JUMPS else None

    def layer(self, layer: Any, source: Any) -> Known:
        """The output of a layer."""
        x: Known = self.found[source]
        kind, rank = type(layer), len(shape(source))
        if kind in LINEAR:
            axis = channel_axis(layer, source)
            return along(filters(layer, per_channel(x, axis, in_channels(layer))), axis, rank)
        if kind in (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm):
            axis = rank - 1 - int(kind.__name__[-2]) if kind in INSTANCE_NORMS else 1
            given = per_channel(None if kind is nn.GroupNorm else x, axis, shape(source)[axis])
            return along(normalised(layer, given), axis, rank)
        if x is None or kind in JUMPS:
            return None
        if kind in POOLS:
            return pooled(layer, x, POOLS[kind])
        if channel_layers.LAYERS.get(kind) is channel_layers.elementwise or kind is nn.PReLU:
            wide = widened(x, 1, shape(source)[1]) if kind is nn.PReLU and rank > 1 else x
            return evaluated(lambda: converted(layer, as_double)(wide), wide)
        if kind in (nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle):
            moved: Tensor = layer(x.expand(shape(source)))
            return moved
        if kind is nn.GLU:
            first, second = widened(x, layer.dim, shape(source)[layer.dim]).chunk(2, layer.dim)
            return times(first, second.sigmoid())
        return None

    def elementwise(self, node: fx.Node) -> Known:
        """A function of numbers in the same place."""
        nodes = node.all_input_nodes
        if not all(map(floating, nodes)):
            return None
        held = {item: self.spread(item, full=False) for item in nodes}
        args, kwargs = fx.map_arg((node.args, node.kwargs), held.__getitem__)
        if node.target is operator.mul:
            return times(*(torch.as_tensor(item, dtype=torch.float64) for item in args))
        if all(self.found[item] is None for item in nodes):
            return None
        return evaluated(lambda: call(node, *args, **kwargs), *held.values())

    def spread(self, node: fx.Node, full: bool = True) -> Tensor:
        """A node's constants as a tensor: of the value's own size, or one that is broadcast to it."""
        value = self.found[node]
        if value is None:
            value = torch.full([1] * len(shape(node)), UNKNOWN, dtype=torch.float64)
        whole: Tensor = value.expand(shape(node)) if full else value
        return whole

    def moved(self, node: fx.Node) -> Any:
        """A function that moves numbers, or takes some of them."""
        source, *rest = arguments(node)
        known = self.found[source] if isinstance(source, fx.Node) else None
        if known is None or isinstance(known, list):
            return known[rest[0]] if known is not None and isinstance(rest[0], (int, slice)) else None
        others = [item for item in node.all_input_nodes if item is not source]
        if any(item.op != "get_attr" for item in others):
            return None
        args, kwargs = fx.map_arg((rest, node.kwargs), lambda item: fetch(self.program.module, str(item.target)))
        return call(node, self.spread(source), *args, **kwargs)

    def reshaped(self, node: fx.Node) -> Known:
        """A reshape or flatten."""
        source = arguments(node)[0]
        return None if self.found[source] is None else self.spread(source).reshape(shape(node))

    def expanded(self, node: fx.Node) -> Known:
        """An expansion: what is new is the same everywhere."""
        source = arguments(node)[0]
        return None if self.found[source] is None else self.spread(source).expand(shape(node))

    def joined(self, node: fx.Node) -> Known:
        """A concatenation."""
        parts, axis = arguments(node)[:2]
        nodes = [item for item in parts if isinstance(item, fx.Node)]
        if all(self.found[item] is None for item in nodes):
            return None
        axis %= len(shape(node))
        own = [widened(self.spread(item, full=False), axis, shape(item)[axis]) for item in nodes]
        others: list[int] = list(torch.broadcast_shapes(*(item.select(axis, 0).shape for item in own)))
        return torch.cat([item.expand([*others[:axis], item.shape[axis], *others[axis:]]) for item in own], axis)

    def averaged(self, node: fx.Node) -> Known:
        """A mean or an extreme over axes."""
        source, *rest = arguments(node)
        x = self.found[source]
        if x is None:
            return None
        over = by_name(node, "dim", rest[0] if rest else None)
        axes = range(x.dim()) if over is None else over if isinstance(over, (tuple, list)) else (over,)
        averaged: Tensor = call(node, uniform(x, axes), *rest, **node.kwargs)
        return averaged

    def resized(self, node: fx.Node) -> Known:
        """An interpolation of maps: its weights add up to one."""
        x = self.found[arguments(node)[0]]
        return None if x is None else uniform(x, range(2, x.dim()))


def call(node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """What a node's function gives for these arguments."""
    function: Any = node.target
    return function(*args, **kwargs)


def floating(node: fx.Node) -> bool:
    """Whether a node gives real numbers, in one tensor or several."""
    meta = node.meta.get("tensor_meta")
    if type(meta) is tuple:
        return all(item is not None and item.dtype.is_floating_point for item in meta)
    dtype = dtype_of(node)
    return dtype is not None and dtype.is_floating_point


FUNCTIONS: dict[Any, Callable[[Walk, fx.Node], Any]] = {
    **dict.fromkeys((torch.permute, torch.squeeze, torch.unsqueeze, torch.flip, torch.roll, F.pad), Walk.moved),
    **dict.fromkeys((torch.split, torch.chunk, torch.unbind, torch.index_select, operator.getitem), Walk.moved),
    **dict.fromkeys((torch.reshape, torch.flatten), Walk.reshaped),
    Tensor.expand: Walk.expanded,
    Tensor.repeat: Walk.moved,
    torch.cat: Walk.joined,
    **dict.fromkeys((torch.mean, torch.amax, torch.amin), Walk.averaged),
    F.interpolate: Walk.resized,
}
"""Functions that are followed beside those that go number by number."""
