"""From a program to an ONNX model in memory, by `torch.onnx.export`."""

from __future__ import annotations

import copy
import math
import re
import warnings
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, fx, nn

from fxcompile.errors import EmitError, one_line
from fxcompile.program import Program, flatten_tensors, shape_of
from fxcompile.refusals import quiet_torch


class _Flat(nn.Module):
    """The program with flat tensors in and out; node meta reaches the exported nodes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.program = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.fx.traceback.preserve_node_meta():
            value = fx.Interpreter(self.program).run(*inputs, enable_io_processing=False)
        taken: set[int] = {id(tensor) for tensor in inputs}
        outputs = []
        for tensor in flatten_tensors(value):
            # An output that is an input, or another output, needs a value of its own to carry its name.
            outputs.append(tensor.clone() if id(tensor) in taken else tensor)
            taken.add(id(tensor))
        return tuple(outputs)


_NAME = "fxcompile.node"
_FIXED = re.compile(r"Constraints violated \(L\['inputs'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
"""How torch.export names the first input, and its axis, whose size turned out to be a constant."""


def drop_zero_biases(model: ir.Model) -> None:
    """Take out the zeros that the exporter adds where a convolution has no bias.

    It expands them to the output channels, wrongly so for one channel (a scalar) and for three dimensions ([O, 2]).
    """
    for node in model.graph:
        if node.op_type == "Conv" and len(node.inputs) == 3 and is_expanded_zero(node.inputs[2]):
            node.resize_inputs(2)
    RemoveUnusedNodesPass()(model)


def is_expanded_zero(value: ir.Value | None) -> bool:
    """Whether a value is a constant zero, made larger."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Expand":
        return False
    while node is not None and node.op_type in ("Expand", "CastLike") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    constant = None if node is None else ir.convenience.get_const_tensor(node.outputs[0])
    return constant is not None and not constant.numpy().any()


def give_attention_four_axes(module: fx.GraphModule) -> None:
    """Let attention over other than [batch, heads, positions, width] run on that: the exporter knows no other."""
    for node in module.graph.nodes:
        source = node.args[0] if node.target is F.scaled_dot_product_attention else None
        if isinstance(source, fx.Node) and len(shape_of(source) or ()) != 4:
            node.target = attention


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """`F.scaled_dot_product_attention`, all axes ahead of the last three taken for one batch."""
    batch = query.shape[:-2]
    key, value = (tensor.expand(*batch, *tensor.shape[-2:]) for tensor in (key, value))
    if attn_mask is not None and attn_mask.dim() > 2:
        attn_mask = with_four_axes(attn_mask.expand(*batch, *attn_mask.shape[-2:]))
    query, key, value = with_four_axes(query), with_four_axes(key), with_four_axes(value)
    made = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)
    return made.reshape(*batch, *made.shape[-2:])


def with_four_axes(tensor: Tensor) -> Tensor:
    """A tensor with the first axes merged into one, or axes of one put ahead of the last two."""
    if tensor.dim() > 4:
        return tensor.flatten(0, -4)
    return tensor.reshape(*tensor.shape[:-2], *(1,) * (4 - tensor.dim()), *tensor.shape[-2:])


class _Divided(nn.Module):
    """An average pool with a divisor of its own, which the exporter would leave out."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.pool = copy.copy(pool)
        size = (pool.kernel_size,) * _POOLS[type(pool)] if isinstance(pool.kernel_size, int) else pool.kernel_size
        self.factor = math.prod(size) / pool.divisor_override
        self.pool.divisor_override, self.pool.count_include_pad = None, True

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, *positions] -> [N, C, *positions]"""
        scaled: Tensor = self.pool(x) * self.factor
        return scaled


_POOLS = {nn.AvgPool2d: 2, nn.AvgPool3d: 3}


def divide_in_sight(module: fx.GraphModule) -> None:
    """Multiply after average pools that divide by another number than that of their pixels.

    One with `ceil_mode` stays: its last window may hang over the padding, and that is averaged over fewer pixels.
    """
    for node in module.graph.nodes:
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, (nn.AvgPool2d, nn.AvgPool3d)) and layer.divisor_override and not layer.ceil_mode:
            module.set_submodule(str(node.target), _Divided(layer))


class _LogSigmoid(nn.Module):
    """-softplus(-x): the exporter takes the logarithm of a sigmoid, which ONNX Runtime has as 0 below -18 or so."""

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> [...]"""
        return -F.softplus(-x)


def keep_log_sigmoids_finite(module: fx.GraphModule) -> None:
    """Write log-sigmoids so that they are right far below zero."""
    for node in module.graph.nodes:
        if node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), nn.LogSigmoid):
            module.set_submodule(str(node.target), _LogSigmoid())


def export(program: Program, opset: int | None) -> Any:
    """The program as an `onnx_ir` model, each node naming the program's node that it comes from.

    Raises:
        EmitError: an operation has no ONNX form, or an axis that is to be free cannot be.
    """
    module = program.snapshot().module
    give_attention_four_axes(module)
    divide_in_sight(module)
    keep_log_sigmoids_finite(module)
    for node in module.graph.nodes:
        node.meta["custom"] = {_NAME: node.name}
    examples, dims = [], []
    for spec, example in zip(program.inputs, program.examples, strict=True):
        free = set(spec.dynamic_axes) | ({spec.batch_axis} if spec.batch_axis is not None else set())
        for axis in free:
            if example.shape[axis] == 1:  # torch.export takes a size of 1 for a constant
                example = torch.cat([example, example], axis)
        examples.append(example)
        dims.append(dict.fromkeys(sorted(free), torch.export.Dim.DYNAMIC) or None)
    names = [spec.name for spec in program.inputs]
    outputs = [name if name not in names else f"{name}_out" for name in program.output_names]
    with warnings.catch_warnings(), quiet_torch(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(_Flat(module), tuple(examples), dynamic_shapes=(tuple(dims),), strict=False)
            for node in exported.graph.nodes:
                name = (node.meta.get("custom") or {}).get(_NAME)
                if name is not None:
                    node.meta["nn_module_stack"] = {name: (name, _NAME)}
            made = torch.onnx.export(
                exported, dynamo=True, input_names=names, output_names=outputs, opset_version=opset, verbose=False,
                optimize=False,
            )  # fmt: skip
        except Exception as error:
            fixed = _FIXED.search(str(error))
            if fixed is not None:
                raise EmitError(
                    f"the network takes no other size along axis {fixed[2]} of input '{names[int(fixed[1])]}'",
                    mend="leave that axis out of --dynamic",
                ) from error
            raise EmitError(
                f"torch.onnx cannot export the network: {reason_of(error)}",
                mend="replace that operation, or pass --dynamic none if it is about a size",
            ) from error
    assert made is not None
    drop_zero_biases(made.model)
    return made.model


def reason_of(error: BaseException) -> str:
    """The sentence in a chain of exporter errors that says what it choked on."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for item in reversed(chain):
        text = one_line(item)
        if text and "step" not in text.lower()[:12]:
            return text
    return one_line(error)
