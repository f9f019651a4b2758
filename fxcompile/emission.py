"""From a program to a file: export, simplify, check, verify in ONNX Runtime, write.

Weights never pass through the exporter's or the simplifier's hands more than they must: above `OPAQUE_BYTES` of
weights, the simplifier sees them as inputs, and the file is written tensor by tensor. So memory stays at the model,
its rewritten copy, and what ONNX Runtime loads.
"""

from __future__ import annotations

import ast
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from torch import Tensor, fx, nn

from fxcompile.errors import EmitError, UsageError, did_you_mean
from fxcompile.files import check_writable, publish, scratch_beside
from fxcompile.onnxfile import OnnxFile, read_weights, write_onnx
from fxcompile.program import ORIGIN, Program, flatten_tensors
from fxcompile.report import FileReport
from fxcompile.tracing import one_line, quiet_torch
from fxcompile.verification import Broken, Case, Inputs, cases, compare_noisy, search

if TYPE_CHECKING:
    from fxcompile.manager import Result

OPAQUE_BYTES = 100_000_000
"""Bytes of weights above which the simplifier does not see their values, to keep them in memory once."""

SMALL_BYTES = 1024
"""Initializers up to this size are shapes, axes and scalars, which the simplifier folds."""

Dynamic = str | Mapping[str, Sequence[int]]

OPSETS = range(18, 25)


def save_onnx(
    result: Result,
    path: Path,
    *,
    dynamic: Dynamic = "batch",
    opset: int | None = None,
    verify: bool = True,
) -> FileReport:
    """Write a result's program as a simplified ONNX file which ONNX Runtime has been seen to run.

    Args:
        dynamic: which input dimensions stay free: "batch" (the default; fixed, with a note in the report, where the
            model fixes it), "none", or axes by input name.
        opset: the ONNX opset; by default the exporter's own.
        verify: hold the file against the program in ONNX Runtime before it is written.

    Raises:
        EmitError: the exporter cannot express the program, or the file does not compute what the program does.
        WriteError: the file cannot be written; whatever was at `path` is untouched.
        UsageError: `dynamic` or `opset` is wrong.
    """
    program = with_dynamic(result.program, dynamic)
    if opset is not None and opset not in OPSETS:
        raise UsageError(f"opset {opset} is not supported", mend=f"choose {OPSETS.start} to {OPSETS.stop - 1}")
    check_writable(path)
    try:
        model = export(program, opset)
    except EmitError:
        if dynamic != "batch" or not program.batch_is_free:
            raise
        program = with_dynamic(result.program, "none")
        model = export(program, opset)
        result.record.notes.append("the batch is fixed in the file: the exporter could not keep it free")
    metadata = {"fxcompile.pipeline": result.record.pipeline, "fxcompile.seed": str(result.seed)}
    for options in SIMPLIFICATIONS:
        try:
            report = _write(model, program, options, metadata, result, path, verify)
        except (EmitError, DecodeError):
            if options is None:
                raise
            result.record.notes.append("a simplification by onnxsim did not verify; a weaker one was used")
            continue
        return report
    raise AssertionError("the last simplification raises its own error")


def _write(
    model: Any,
    program: Program,
    options: dict[str, bool] | None,
    metadata: dict[str, str],
    result: Result,
    path: Path,
    verify: bool,
) -> FileReport:
    """Simplify, write beside the output, check there, and only then put it in its place."""
    file = simplify(model, program, options)
    file.proto.producer_name, file.proto.producer_version = "fxcompile", version()
    put_metadata(file.proto.metadata_props, metadata)
    with scratch_beside(path) as folder:
        scratch = folder / path.name
        write_onnx(file, scratch)
        check_model(scratch)
        examples = max(2, min(result.examples, 8)) if verify else 0
        error = verify_file(scratch, program, result.inputs, examples, result.seed) if verify else 0.0
        size = publish(scratch, path)
    graph = file.proto.graph
    opset = next(item.version for item in file.proto.opset_import if item.domain == "")
    return FileReport(
        str(path), size, len(graph.node), opset, error, examples, shapes(graph.input), shapes(graph.output)
    )


def version() -> str:
    """The version of the installed package."""
    from importlib.metadata import version as installed

    return installed("fxcompile")


def with_dynamic(program: Program, dynamic: Dynamic) -> Program:
    """The program with its inputs' free dimensions as the user wants them.

    Raises:
        UsageError: an unknown input or axis.
    """
    if dynamic == "batch":
        return program
    if dynamic == "none":
        return replace(program, inputs=tuple(replace(spec, batch_axis=None) for spec in program.inputs))
    if isinstance(dynamic, str):
        raise UsageError(f"--dynamic {dynamic} is unknown", mend="give batch, none, or NAME=AXIS,AXIS")
    known = {spec.name: spec for spec in program.inputs}
    specs = {name: replace(spec, batch_axis=None) for name, spec in known.items()}
    for name, axes in dynamic.items():
        if name not in known:
            raise UsageError(f"--dynamic names no input '{name}'", mend=did_you_mean(name, known))
        rank = len(known[name].shape)
        if any(not -rank <= axis < rank for axis in axes):
            raise UsageError(f"input '{name}' has {rank} axes, --dynamic names {max(axes)}", mend="count from 0")
        wanted = {axis % rank for axis in axes}
        if 0 in wanted and known[name].batch_axis is None:
            raise UsageError(f"the batch of input '{name}' cannot stay free", mend="; ".join(program.notes) or None)
        specs[name] = replace(known[name], batch_axis=0 if 0 in wanted else None, dynamic_axes=frozenset(wanted - {0}))
    return replace(program, inputs=tuple(specs.values()))


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


def export(program: Program, opset: int | None) -> Any:
    """The program as an `onnx_ir` model, each node naming the program's node that it comes from.

    Raises:
        EmitError: an operation has no ONNX form.
    """
    module = program.snapshot().module
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
            raise EmitError(
                f"torch.onnx cannot export the network: {reason_of(error)}",
                mend="replace that operation, or pass --dynamic none if it is about a size",
            ) from error
    assert made is not None
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


def check_model(path: Path) -> None:
    """Raises EmitError unless the ONNX checker accepts the file."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise EmitError(f"the ONNX checker refuses the emitted file: {one_line(error)}") from error


def verify_file(path: Path, program: Program, inputs: Inputs, examples: int, seed: int) -> float:
    """Search for an input on which ONNX Runtime and the program disagree; returns the largest error seen.

    See `compare_noisy` for how far apart they may be.

    Raises:
        EmitError: there is such an input, or ONNX Runtime cannot run the file.
    """
    session = open_session(path)
    names = [item.name for item in session.get_inputs()]
    drawn = Inputs(program.inputs, inputs.examples, inputs.calibration)
    worst = 0.0

    def check(case: Case) -> None:
        nonlocal worst
        tensors = drawn.make(case)
        try:
            own = program.outputs(*tensors)
        except RuntimeError:
            return  # a free dimension of a size that the network does not take
        if not all(tensor.isfinite().all() for tensor in own if tensor.is_floating_point()):
            return
        feeds = {
            spec.name: tensor.numpy()
            for spec, tensor in zip(program.inputs, tensors, strict=True)
            if spec.name in names
        }
        try:
            given = [torch.from_numpy(np.array(item)) for item in session.run(None, feeds)]
        except Exception as error:
            raise Broken(f"ONNX Runtime fails: {one_line(error)}") from error
        worst = max(worst, compare_noisy(given, own, program, tensors))

    most = 3 if program.batch_is_free else 1
    broken = search(check, cases(drawn.kinds(), most), examples, seed)
    if broken is not None:
        case, evidence = broken
        raise EmitError(
            f"the exported file does not compute what the program does: {evidence}; the smallest input found is {case}",
            mend="report it with the model, or try another --opset",
        )
    return worst


def open_session(path: Path) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        EmitError: ONNX Runtime does not load the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EmitError(f"ONNX Runtime does not load the emitted file: {one_line(error)}") from error


def shapes(values: Sequence[onnx.ValueInfoProto]) -> dict[str, list[int | str]]:
    """Names and shapes of a graph's inputs or outputs; free dimensions by their names."""
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }


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
