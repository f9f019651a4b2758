"""What nodes and layers are called in reports, errors and dumps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompile.masks import keeps_zeros
from fxcompile.program import Program


def node_name(node: fx.Node) -> str:
    """The name of the layer that a node calls, or the node's own where it calls none."""
    return str(node.target) if node.op == "call_module" else node.name


def describe_node(program: Program, node: fx.Node) -> str:
    """What a node computes, in a few characters: its layer, or its function's name."""
    layer = program.layer(node)
    return describe_layer(layer) if layer is not None else function_name(node)


def function_name(node: fx.Node) -> str:
    """The name of the function that a node calls, as its module has it."""
    return str(getattr(node.target, "__name__", node.target))


def describe_layer(layer: nn.Module) -> str:
    """A layer in a few characters: `Conv2d 32->64 5x5 /2`."""
    text = _describe(layer)
    return f"{text}, {zeros_share(layer.weight):.1%} zeros" if keeps_zeros(layer) else text


def zeros_share(weight: Any) -> float:
    """The share of a weight's numbers that are zero."""
    return float((weight == 0).double().mean())


def _describe(layer: nn.Module) -> str:
    kind = str(layer._get_name())
    weight = getattr(layer, "weight", None)
    kernel = getattr(layer, "kernel_size", None)
    if isinstance(weight, Tensor) and isinstance(kernel, tuple):
        inputs, outputs = layer.in_channels, layer.out_channels
        text = f"{kind} {inputs}->{outputs} {'x'.join(map(str, kernel))}"
        stride = layer.stride
        if isinstance(stride, tuple) and max(stride) > 1:
            text += f" /{'x'.join(map(str, stride)) if len(set(stride)) > 1 else stride[0]}"
        return f"{text} groups={layer.groups}" if layer.groups != 1 else text
    if isinstance(layer, nn.Linear):
        return f"{kind} {layer.in_features}->{layer.out_features}"
    return kind


def dtype_name(dtype: torch.dtype | None) -> str:
    """A dtype without its module: `float32`."""
    return str(dtype).removeprefix("torch.")
