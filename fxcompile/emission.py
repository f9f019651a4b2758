"""From a program to a file: export, simplify, check, verify in ONNX Runtime, write.

The file is written tensor by tensor, so that memory stays at the model, its rewritten copy, and what ONNX Runtime
loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from google.protobuf.message import DecodeError

from fxcompile.comparing import Broken
from fxcompile.cost import program_cost
from fxcompile.drawing import Case, Inputs, cases, most_samples, search
from fxcompile.errors import EmitError, UsageError, did_you_mean, one_line
from fxcompile.exporting import export
from fxcompile.given import Given
from fxcompile.labels import dtype_name
from fxcompile.layers import is_finite
from fxcompile.onnxfile import OnnxFile, write_onnx
from fxcompile.packing import pack
from fxcompile.program import InputSpec, Program
from fxcompile.report import FileReport, PackedReport
from fxcompile.rounding import Seen, compare_noisy
from fxcompile.runtime import feeds_of, open_session, run_session
from fxcompile.simplifying import OPAQUE_BYTES, SIMPLIFICATIONS, put_metadata, simplify
from fxcompile.writing import check_writable, publish, scratch_beside

if TYPE_CHECKING:
    from fxcompile.manager import Result

Dynamic = str | Mapping[str, Sequence[int]]

OPSETS = range(18, 25)


def save_onnx(
    result: Result,
    path: Path,
    *,
    dynamic: Dynamic = "batch",
    opset: int | None = None,
    verify: bool = True,
    simplified: bool = True,
    packed: bool = True,
) -> FileReport:
    """Write a result's program as a simplified ONNX file which ONNX Runtime has been seen to run.

    Args:
        dynamic: which input dimensions stay free: "batch" (the default; fixed, with a note in the report, where the
            model fixes it), "none", or axes by input name.
        opset: the ONNX opset; by default the exporter's own.
        verify: hold the file against the program in ONNX Runtime before it is written.
        simplified: by onnxsim; else as the exporter makes it.
        packed: weights with many zeros as a bit each and what is not zero, decoded when the file is loaded.

    Raises:
        EmitError: the exporter cannot express the program, or the file does not compute what the program does.
        WriteError: the file cannot be written; whatever was at `path` is untouched.
        UsageError: `dynamic` or `opset` is wrong.
    """
    program = with_dynamic(result.program, dynamic)
    check_opset(opset)
    check_writable(path)
    try:
        with result.watch.stage("export"):
            model = export(program, opset)
    except EmitError:
        if dynamic != "batch" or not program.batch_is_free:
            raise
        program = with_dynamic(result.program, "none")
        with result.watch.stage("export"):
            model = export(program, opset)
        result.record.notes.append("the batch is fixed in the file: the exporter could not keep it free")
    metadata = {"fxcompile.pipeline": result.pipeline, "fxcompile.seed": str(result.seed)}
    for options in SIMPLIFICATIONS if simplified else (None,):
        try:
            report = _write(model, program, options, metadata, result, path, verify, packed)
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
    packed: bool,
) -> FileReport:
    """Simplify, pack, write beside the output, check there, and only then put it in its place."""
    watch = result.watch
    with watch.stage("simplify"):
        file = simplify(model, program, options)
    file.proto.producer_name, file.proto.producer_version = "fxcompile", version()
    put_metadata(file.proto.metadata_props, metadata)
    nodes = len(file.proto.graph.node)
    with watch.stage("pack"):
        forms = pack(file) if packed else []
    with scratch_beside(path) as folder:
        scratch = folder / path.name
        with watch.stage("write"):
            write_onnx(file, scratch)
        examples = result.examples if verify else 0
        try:
            with watch.stage("check"):
                check_model(file, scratch)
            with watch.stage("runtime"):
                seen = Seen()
                if verify:
                    seen = verify_file(scratch, program, result.inputs, examples, result.seed, result.given)
        except EmitError as refused:
            raise with_mend(refused, program) from refused
        with watch.stage("write"):
            size = publish(scratch, path)
    result.record.amplified = max(result.record.amplified, seen.amplified)
    graph = file.proto.graph
    weights = PackedReport(len(forms), sum(form.before for form in forms), sum(form.after for form in forms))
    opset = next(item.version for item in file.proto.opset_import if item.domain == "")
    return FileReport(
        str(path), size, nodes, opset, seen.error, examples, shapes(graph.input), shapes(graph.output), weights
    )


def with_mend(error: EmitError, program: Program) -> EmitError:
    """The same error, with a mend if it has none: another dtype where ONNX Runtime hardly knows the network's."""
    if error.mend is not None:
        return error
    rare = sorted({dtype_name(tensor.dtype) for tensor in program.module.parameters()} & {"float64", "bfloat16"})
    mend = "report it with the model, or try another --opset"
    if rare:
        mend = f"it knows few operators in {rare[0]}: convert the model with .float()"
    return EmitError(error.problem, place=error.place, mend=mend)


def version() -> str:
    """The version of the installed package."""
    from importlib.metadata import version as installed

    return installed("fxcompile")


def check_opset(opset: int | None) -> None:
    """Raises UsageError unless the exporter has that opset; None is its own choice."""
    if opset is not None and opset not in OPSETS:
        raise UsageError(f"opset {opset} is not supported", mend=f"choose {OPSETS.start} to {OPSETS.stop - 1}")


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
    batched = [name for name, spec in known.items() if spec.batch_axis is not None]
    fixed = [name for name in batched if specs[name].batch_axis is None]
    if fixed and len(fixed) < len(batched):
        both = " ".join(f"--dynamic {name}={axes_text(specs[name])}" for name in batched)
        raise UsageError(
            f"inputs {', '.join(batched)} share their batch, and --dynamic frees it in some", mend=f"give {both}"
        )
    return replace(program, inputs=tuple(specs.values()))


def axes_text(spec: InputSpec) -> str:
    """The free axes of an input with a free batch, as --dynamic takes them."""
    return ",".join(map(str, sorted({0, *spec.dynamic_axes})))


def check_model(file: OnnxFile, path: Path) -> None:
    """Raises EmitError unless the ONNX checker accepts the file. It would copy large weights, so it sees no values."""
    try:
        onnx.checker.check_model(file.with_weights_as_inputs() if file.weights else str(path), full_check=True)
    except Exception as error:
        raise EmitError(f"the ONNX checker refuses the emitted file: {one_line(error)}") from error


def verify_file(path: Path, program: Program, inputs: Inputs, examples: int, seed: int, given: Given) -> Seen:
    """Search for an input on which ONNX Runtime and the program disagree; returns the largest differences seen.

    See `compare_noisy` for how far apart they may be.

    Args:
        given: what the program was seen to give, which is not computed again.

    Raises:
        EmitError: there is such an input, or ONNX Runtime cannot run the file.
    """
    session = open_session(path, lean=program_cost(program).bytes > OPAQUE_BYTES)
    drawn = Inputs(program.inputs, inputs.examples, inputs.calibration)
    known = given.of(program)
    seen, compared = Seen(), 0

    def check(case: Case) -> None:
        nonlocal compared
        tensors = drawn.make(case)
        try:
            own = known[case] if case in known else program.outputs(*tensors)
        except RuntimeError:
            return  # a free dimension of a size that the network does not take
        if not all(map(is_finite, own)):
            return
        try:
            theirs = run_session(session, feeds_of(session, program, tensors))
        except Exception as error:
            raise Broken(f"ONNX Runtime fails: {one_line(error)}") from error
        seen.add(compare_noisy(theirs, own, program, tensors))
        compared += 1

    strategy = cases(drawn.kinds(), most_samples(program, examples))
    broken = search(check, strategy, examples, seed)
    if broken is not None:
        case, evidence = broken
        raise EmitError(
            f"the exported file does not compute what the program does: {evidence}; the smallest input found is {case}",
            mend="report it with the model, or try another --opset",
        )
    if not compared:
        raise EmitError(
            "nothing could be verified: on every input that was drawn the network fails, or gives NaN or infinity",
            mend="look for a negative variance or a division by zero in it, or pass --verify off",
        )
    return seen


def shapes(values: Sequence[onnx.ValueInfoProto]) -> dict[str, list[int | str]]:
    """Names and shapes of a graph's inputs or outputs; free dimensions by their names."""
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }
