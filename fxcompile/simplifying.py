"""Simplifies an exported model with onnxsim, and restores what the tools on the way lose: names and origins.

Above `OPAQUE_BYTES` of weights the simplifier sees them as inputs, so that they are never copied.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx

from fxcompile.errors import EmitError, one_line
from fxcompile.onnxfile import OnnxFile, read_weights
from fxcompile.program import ORIGIN, Program

OPAQUE_BYTES = 100_000_000
"""Bytes of weights above which the simplifier does not see their values, to keep them in memory once."""

SMALL_BYTES = 1024
"""Initializers up to this size are shapes, axes and scalars, which the simplifier folds."""

SIMPLIFICATIONS: tuple[dict[str, bool] | None, ...] = (
    {},
    {"skip_constant_folding": True},
    {"skip_constant_folding": True, "perform_optimization": False},
    None,
)
"""Options of onnxsim, from the strongest simplification to none: the first whose result verifies is written."""


def simplify(model: Any, program: Program, options: dict[str, bool] | None) -> OnnxFile:
    """Simplify an exported model with onnxsim, and take its weights apart.

    Args:
        options: of `onnxsim.simplify`; None leaves the model as it was exported.

    Raises:
        EmitError: the simplifier failed.
    """
    import onnxsim

    weights = read_weights(model)
    opaque = sum(tensor.nbytes for tensor in weights.values()) > OPAQUE_BYTES
    hidden = {name: tensor for name, tensor in weights.items() if opaque and tensor.nbytes > SMALL_BYTES}
    proto = proto_without(model, hidden)
    origins = take_origins(proto, program)
    # onnxsim 0.8 takes the exporter's shapes of inner values as fixed where a free dimension has a symbol there, and
    # folds a free batch to 1; without them it infers the shapes itself.
    del proto.graph.value_info[:]
    simplified = proto
    if options is not None:
        try:
            with silent_output():
                simplified, _ = onnxsim.simplify(proto, check_n=0, certify=False, **options)
        except Exception as error:
            raise EmitError(f"onnxsim cannot simplify the exported network: {one_line(error)}") from error
    del proto
    del simplified.metadata_props[:]  # what onnxsim says of itself
    put_origins(simplified, origins)
    file = OnnxFile(simplified, {})
    inputs = [value for value in simplified.graph.input if value.name not in hidden]
    del simplified.graph.input[:]
    simplified.graph.input.extend(inputs)
    used = {name for node in simplified.graph.node for name in node.input}
    used |= {value.name for value in simplified.graph.output}
    file.weights.update({name: tensor for name, tensor in hidden.items() if name in used})
    tidy(simplified, program, file)
    return file


def proto_without(model: Any, hidden: Mapping[str, Any]) -> onnx.ModelProto:
    """The exported model as a protobuf in which some weights are inputs."""
    from onnxscript import ir

    graph = model.graph
    initializers = dict(graph.initializers)
    try:
        for name in hidden:
            del graph.initializers[name]
            graph.inputs.append(initializers[name])
        proto: onnx.ModelProto = ir.to_proto(model)
        return proto
    finally:
        while graph.inputs and graph.inputs[-1].name in hidden:
            graph.inputs.pop()
        for name in hidden:
            graph.initializers[name] = initializers[name]


ORIGIN_KEY = "fxcompile.origin"
"""Key of a node's metadata in the file: the layers of the original model that it computes, comma-separated."""


def take_origins(proto: onnx.ModelProto, program: Program) -> dict[str, str]:
    """Drop the exporter's metadata; returns, for each value, the layers of the original model which compute it."""
    known = {node.name: ", ".join(node.meta.get(ORIGIN, ())) for node in program.graph.nodes}
    origins: dict[str, str] = {}
    for node in proto.graph.node:
        scopes = next((item.value for item in node.metadata_props if item.key == "pkg.torch.onnx.name_scopes"), "[]")
        names = ast.literal_eval(scopes)
        origin = next((known[name] for name in reversed(names) if name in known), "")
        origins.update(dict.fromkeys(node.output, origin))
        del node.metadata_props[:]
    for message in (proto, proto.graph, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del message.metadata_props[:]
    return {name: origin for name, origin in origins.items() if origin}


def put_origins(proto: onnx.ModelProto, origins: dict[str, str]) -> None:
    """Name each node's origin; a node that the simplifier made has that of the next one, or of the one before."""
    found = dict(origins)
    for node in reversed(proto.graph.node):
        origin = next((found[name] for name in node.output if name in found), None)
        if origin is not None:
            for name in node.input:
                found.setdefault(name, origin)
    for node in proto.graph.node:
        outputs = (found[name] for name in node.output if name in found)
        inputs = (found[name] for name in node.input if name in found)
        origin = next(outputs, None) or next(inputs, None)
        if origin is not None:
            found.update(dict.fromkeys(node.output, origin))
            put_metadata(node.metadata_props, {ORIGIN_KEY: origin})


def put_metadata(properties: Any, values: Mapping[str, str]) -> None:
    """Append key-value pairs to a protobuf's metadata."""
    for key, value in values.items():
        item = properties.add()
        item.key, item.value = key, value


def tidy(proto: onnx.ModelProto, program: Program, file: OnnxFile) -> None:
    """The model's own names: weights without the exporter's prefix, free dimensions named, no stray metadata."""
    graph = proto.graph
    prefix = "program."
    names = {tensor.name for tensor in graph.initializer} | set(file.weights)
    renamed = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    taken = {name for node in graph.node for name in (*node.input, *node.output)} | names
    renamed = {old: new for old, new in renamed.items() if new not in taken}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in renamed:
                node.input[index] = renamed[name]
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    file.weights = {renamed.get(name, name): tensor for name, tensor in file.weights.items()}
    symbols: dict[str, str] = {}
    for value, spec in zip(graph.input, program.inputs, strict=True):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if axis == spec.batch_axis:
                symbols.setdefault(dim.dim_param, "batch")
            elif axis in spec.dynamic_axes:
                symbols.setdefault(dim.dim_param, f"{spec.name}_{axis}")
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = symbols[dim.dim_param]
    graph.name = type(program.module).__name__
    del graph.value_info[:]


@contextmanager
def silent_output() -> Iterator[None]:
    """Stdout and stderr of the process swallowed: libraries in C++ print banners and warnings there."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(stream, os.dup(stream)) for stream in (1, 2)]
    try:
        with open(os.devnull, "wb") as nowhere:
            for stream, _ in saved:
                os.dup2(nowhere.fileno(), stream)
            yield
    finally:
        for stream, copy in saved:
            os.dup2(copy, stream)
            os.close(copy)
