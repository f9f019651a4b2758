"""What a program costs: parameters, multiply-accumulates and bytes, counted from the canonical graph."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxcompile.layers import CONVOLUTIONS, TRANSPOSED
from fxcompile.program import Program, fetch, shape_of


@dataclass(frozen=True)
class Cost:
    """Parameters (count), multiply-accumulates for one sample (count), and the bytes of all stored tensors."""

    parameters: int = 0
    macs: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.macs + other.macs, self.bytes + other.bytes)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.parameters - other.parameters, self.macs - other.macs, self.bytes - other.bytes)


def program_cost(program: Program) -> Cost:
    """The cost of a whole program; a tensor that several layers hold counts once."""
    return nodes_cost(program.module, program.graph.nodes, samples(program))


def samples(program: Program) -> int:
    """How many samples the example inputs hold: MACs are given for one."""
    for spec in program.inputs:
        if spec.batch_axis is not None:
            return max(spec.shape[spec.batch_axis], 1)
    return 1


def nodes_cost(module: nn.Module, nodes: Iterable[fx.Node], batch: int) -> Cost:
    """The cost of some nodes of a graph module, tensors counted once."""
    stored: dict[int, Tensor] = {}
    macs = 0
    for node in nodes:
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            for tensor in (*layer.parameters(), *layer.buffers()):
                stored[id(tensor)] = tensor
            macs += layer_macs(layer, node)
        elif node.op == "get_attr":
            tensor = fetch(module, str(node.target))
            stored[id(tensor)] = tensor
        elif node.op == "call_function":
            macs += function_macs(node)
    parameters = sum(tensor.numel() for tensor in stored.values() if isinstance(tensor, nn.Parameter))
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    return Cost(parameters, macs // batch, size)


def layer_macs(layer: nn.Module, node: fx.Node) -> int:
    """Multiply-accumulates of one call of a layer, over the whole batch of the example inputs."""
    outputs = shape_of(node)
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    inputs = shape_of(source) if source is not None else None
    if isinstance(layer, CONVOLUTIONS) and outputs is not None:
        return math.prod(outputs) * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    if isinstance(layer, TRANSPOSED) and inputs is not None:
        return math.prod(inputs) * layer.out_channels // layer.groups * math.prod(layer.kernel_size)
    if isinstance(layer, nn.Linear) and outputs is not None:
        return math.prod(outputs) * layer.in_features
    if isinstance(layer, nn.RNNBase) and inputs is not None:
        steps = math.prod(inputs[:-1])
        weights = sum(weight.numel() for name, weight in layer.named_parameters() if name.startswith("weight"))
        return steps * weights
    if isinstance(layer, nn.MultiheadAttention) and inputs is not None:
        width = layer.embed_dim
        length = inputs[1] if layer.batch_first else inputs[0]
        return math.prod(inputs[:-1]) * (4 * width * width + 2 * length * width)
    return 0


def function_macs(node: fx.Node) -> int:
    """Multiply-accumulates of matrix products and functional convolutions."""
    outputs = shape_of(node)
    operands = [shape_of(item) for item in node.all_input_nodes]
    if outputs is None or not operands or operands[0] is None:
        return 0
    if node.target is torch.matmul:
        return math.prod(outputs) * operands[0][-1]
    name = getattr(node.target, "__name__", "")
    if name == "scaled_dot_product_attention" and len(operands) > 2 and operands[1] is not None:
        return math.prod(operands[0]) * operands[1][-2] * 2
    if name.startswith("conv") and len(operands) > 1 and operands[1] is not None:
        return math.prod(outputs) * math.prod(operands[1][1:])
    return 0
