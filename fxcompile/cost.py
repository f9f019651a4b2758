"""What a program costs: parameters, multiply-accumulates and bytes, counted from the canonical graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import OpOverload

from fxcompile.layers import CONVOLUTIONS, TRANSPOSED
from fxcompile.program import Program, fetch, shape_of

Shape = tuple[int, ...]


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
    """The cost of some nodes of a graph module: the MACs of each call, each tensor once."""
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


def layer_macs(layer: Any, node: fx.Node) -> int:
    """Multiply-accumulates of one call of a layer, over the whole batch of the example inputs."""
    inputs = [shape_of(item) or () for item in node.args if isinstance(item, fx.Node)]
    outputs = shape_of(node) or ()
    if not inputs:
        return 0
    if isinstance(layer, CONVOLUTIONS):
        return math.prod(outputs) * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    if isinstance(layer, TRANSPOSED):
        return math.prod(inputs[0]) * layer.out_channels // layer.groups * math.prod(layer.kernel_size)
    if isinstance(layer, nn.Linear):
        return math.prod(outputs) * layer.in_features
    if isinstance(layer, nn.Bilinear):
        return math.prod(outputs) * layer.in1_features * layer.in2_features
    if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
        weights = sum(weight.numel() for name, weight in layer.named_parameters() if name.startswith("weight"))
        return math.prod(inputs[0][:-1]) * weights
    if isinstance(layer, nn.MultiheadAttention):
        return _multihead(layer, inputs)
    return 0


def _multihead(layer: nn.MultiheadAttention, inputs: list[Shape]) -> int:
    """Four projections, and for each query its products with all keys and with all values."""
    query, key, value = (*inputs, inputs[-1], inputs[-1])[:3]
    width: int = layer.embed_dim
    queries, keys = math.prod(query[:-1]), math.prod(key[:-1])
    length = key[-2] if layer.batch_first or len(key) == 2 else key[0]
    return 2 * queries * width * width + keys * width * (key[-1] + value[-1]) + 2 * queries * length * width


def function_macs(node: fx.Node) -> int:
    """Multiply-accumulates of matrix products, and of layers that the program calls with computed weights."""
    target = node.target
    name = (
        target._schema.name.rpartition("::")[2] if isinstance(target, OpOverload) else getattr(target, "__name__", "")
    )
    count = _FUNCTIONS.get(name)
    operands = [shape_of(item) or () for item in node.args if isinstance(item, fx.Node)]
    return count(node, operands) if count is not None and len(operands) > 1 else 0


def _product(node: fx.Node, operands: list[Shape]) -> int:
    """`[..., m, k]` by `[..., k, n]`: the last two operands, as `baddbmm` adds a first."""
    return math.prod(shape_of(node) or ()) * operands[-2][-1]


def _attention(node: fx.Node, operands: list[Shape]) -> int:
    query, key = operands[:2]
    return (math.prod(query) + math.prod(shape_of(node) or ())) * key[-2]


def _linear(node: fx.Node, operands: list[Shape]) -> int:
    return math.prod(shape_of(node) or ()) * operands[1][-1]


def _convolution(node: fx.Node, operands: list[Shape]) -> int:
    return math.prod(shape_of(node) or ()) * math.prod(operands[1][1:])


def _transposed(node: fx.Node, operands: list[Shape]) -> int:
    return math.prod(operands[0]) * math.prod(operands[1][1:])


def _einsum(node: fx.Node, operands: list[Shape]) -> int:
    """A product for each value of all indices together, and another one for each operand beyond two."""
    terms = str(node.args[0]).replace(" ", "").partition("->")[0].split(",")
    sizes: dict[object, int] = {}
    for term, shape in zip(terms, operands, strict=True):
        before, dots, after = term.partition("...")
        hidden = range(len(shape) - len(before) - len(after) if dots else 0)
        labels = [*before, *((dots, len(hidden) - axis) for axis in hidden), *after]
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
    total: int = math.prod(sizes.values())
    return total * (len(operands) - 1)


def _any_convolution(node: fx.Node, operands: list[Shape]) -> int:
    """`aten.convolution(x, weight, bias, stride, padding, dilation, transposed, ...)`"""
    return (_transposed if node.args[6] else _convolution)(node, operands)


_FUNCTIONS: dict[str, Callable[[fx.Node, list[Shape]], int]] = {
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm", "baddbmm"), _product),
    "scaled_dot_product_attention": _attention,
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    "convolution": _any_convolution,
    "einsum": _einsum,
}
"""By the operation's name, which functions of `torch` and operators of `aten` share."""
