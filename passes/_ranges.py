"""What range the values of a node lie in, whatever the input, and on what range an activation changes nothing."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompile.program import Program, shape_of

Range = tuple[float, float]
POSITIVE: Range = (0.0, math.inf)
UNIT: Range = (0.0, 1.0)

Bounds = Callable[[Any], Range | None]
"""From a layer, or the arguments of a call after its input."""


def _clamp(args: Any) -> Range | None:
    low, high = (*args, None, None)[:2]
    numbers = all(item is None or isinstance(item, (int, float)) for item in (low, high))
    return (-math.inf if low is None else low, math.inf if high is None else high) if numbers else None


def _even_power(args: Any) -> Range | None:
    return POSITIVE if isinstance(args[0], int) and args[0] >= 0 and args[0] % 2 == 0 else None


CLIPS: dict[Any, Bounds] = {
    nn.ReLU: lambda layer: POSITIVE,
    nn.ReLU6: lambda layer: (0.0, 6.0),
    nn.Hardtanh: lambda layer: (layer.min_val, layer.max_val),
    torch.clamp: _clamp,
}
"""Functions that give the nearest value of a range."""

UNCHANGED: dict[Any, Bounds] = {
    **CLIPS,
    **dict.fromkeys((nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, torch.abs), lambda what: POSITIVE),
}
"""Functions f with f(x) = x on a range."""

BOUNDED: dict[Any, Bounds] = {
    **CLIPS,
    **dict.fromkeys((nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmin), lambda what: UNIT),
    nn.Tanh: lambda what: (-1.0, 1.0),
    **dict.fromkeys((nn.Softplus, torch.exp, torch.sqrt, torch.abs), lambda what: POSITIVE),
    torch.pow: _even_power,
}
"""Functions whose values lie in a range."""

_LAYERS_INSIDE = {
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.PixelShuffle, nn.PixelUnshuffle,
    nn.ChannelShuffle, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
}  # fmt: skip
_FUNCTIONS_INSIDE = {
    torch.reshape, torch.flatten, torch.permute, torch.squeeze, torch.unsqueeze, torch.mean,
    torch.amax, torch.amin, torch.Tensor.expand, operator.getitem,
}  # fmt: skip


def what_of(program: Program, node: fx.Node) -> tuple[Any, Any]:
    """The class of the layer that a node calls, or its function; and the layer, or the arguments after the input."""
    layer = program.layer(node)
    return (type(layer), layer) if layer is not None else (node.target, node.args[1:])


def lookup(table: dict[Any, Bounds], program: Program, node: fx.Node) -> Range | None:
    """The range that a table gives for a node, if any."""
    kind, what = what_of(program, node)
    bounds = table.get(kind) if node.op in ("call_module", "call_function") and not node.kwargs else None
    return None if bounds is None else bounds(what)


def stays_inside(program: Program, node: fx.Node, limits: Range) -> bool:
    """Whether a node of one input keeps it within limits: it moves, drops, repeats or averages values."""
    kind, what = what_of(program, node)
    if len(node.all_input_nodes) != 1 or shape_of(node.all_input_nodes[0]) is None or shape_of(node) is None:
        return False
    zero = limits[0] <= 0 <= limits[1]
    if kind in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d):
        return zero and getattr(what, "divisor_override", None) is None
    if kind is F.pad:
        value = what[2] if len(what) > 2 else 0.0
        return what[1] != "constant" or (isinstance(value, (int, float)) and limits[0] <= value <= limits[1])
    if kind is F.interpolate:
        return node.kwargs.get("mode", "nearest") != "bicubic"
    return kind in _LAYERS_INSIDE or kind in _FUNCTIONS_INSIDE


def evidence(program: Program, node: fx.Node, limits: Range) -> list[fx.Node] | None:
    """The nodes from which it follows that a node's values lie within limits, the node itself last; None where none."""
    found = [node]
    while True:
        bounds = lookup(BOUNDED, program, found[0])
        if bounds is not None and limits[0] <= bounds[0] and bounds[1] <= limits[1]:
            return found
        if found[0].op not in ("call_module", "call_function") or not stays_inside(program, found[0], limits):
            return None
        found.insert(0, found[0].all_input_nodes[0])
