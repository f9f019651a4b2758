"""From a PyTorch model to a `Program`: `torch.fx.symbolic_trace` first, `torch.export` where that cannot follow.

Either road gives a raw graph; `functional` removes in-place operations and `canonical` spells it. The result is run
against the model itself before anyone sees it, on the example inputs and on others with another batch size, because a
symbolic trace can silently bake in what it should not: a random number, a branch, a size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from fxcompile.calibration import InputSpec
from fxcompile.canonical import canonicalise
from fxcompile.contracts import tolerance
from fxcompile.errors import FxcompileError, TraceError
from fxcompile.exported import export, exported_graph, functionalised, has_fixed_batch, module_of
from fxcompile.functional import Unfollowable, make_functional
from fxcompile.lowering import NoSpelling
from fxcompile.program import FEATURE, Program, flatten_tensors, output_node, shape_of
from fxcompile.reference import ModelState, Reference, left_alone
from fxcompile.refusals import Impure, Refused, one_line, quiet_torch, refusal
from fxcompile.signature import Signature
from fxcompile.symbolic import changing_line, symbolic_graph
from fxcompile.timing import Stopwatch
from fxcompile.verification import relative_maximum

__all__ = ["one_line", "quiet_torch", "trace"]


def trace(
    model: nn.Module | ExportedProgram,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
) -> Program:
    """Bring a model to canonical form.

    The model is traced in eval mode; its own mode, attributes and buffers are left as they were, and its tensors are
    shared, not copied.

    Args:
        model: any `nn.Module` or GraphModule, or an ExportedProgram.
        example_inputs: the positional arguments of one call (a single tensor, or a tuple), or a mapping of keyword
            arguments. Tensors become inputs; anything else is fixed at the value given. An ExportedProgram needs none
            if it carries its own.
        example_kwargs: keyword arguments of that call.

    Raises:
        TraceError: neither road could follow the model; names the file and line of the model and what to change.
    """
    watch = Stopwatch()
    with watch.stage("tracing"):
        args, kwargs = normalise_examples(example_inputs, example_kwargs)
        if isinstance(model, ExportedProgram):
            program = _trace_exported(model, args, kwargs)
        else:
            program = _trace_module(unwrapped(model), args, kwargs)
    return replace(program, seconds=watch.seconds)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what spreads it over devices or compiles it."""
    spread = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    name = "module" if spread else COMPILED
    return unwrapped(model.get_submodule(name)) if name in model._modules else model


def _trace_module(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    refuse_unsupported(model)
    signature = Signature.of(model, args, kwargs)
    with left_alone(model):
        reference = Reference(model, signature)
        state = ModelState(model)
        try:
            return _finish(symbolic_graph(model, signature), signature, reference)
        except FxcompileError:
            raise
        except Exception as error:  # symbolic tracing runs the user's code on proxies: anything may come out
            first = error
        state.restore()
        try:
            return _from_exported(export(model, signature), signature, reference, model)
        except FxcompileError:
            raise
        except Exception as error:
            suspects = dict(reference.suspects)
            if isinstance(error, Impure) and not suspects.keys() & {"random", "value"}:
                line = changing_line(model, signature, between=lambda: reference.run(reference.examples))
                suspects |= {"changing": line} if line else {}
            raise refusal(model, error, first, suspects) from error


def _trace_exported(exported: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    if not args and not kwargs:
        if exported.example_inputs is None:
            raise TraceError("the exported program carries no example inputs", mend="give them with --input-shape")
        args, kwargs = exported.example_inputs
    signature = Signature.of_exported(exported, tuple(args), dict(kwargs))
    reference = Reference(_exported_call(exported), signature)
    try:
        return _from_exported(exported, signature, reference, None)
    except FxcompileError:
        raise
    except Exception as error:
        raise refusal(None, error, error, {}) from error


def _exported_call(exported: ExportedProgram) -> Callable[..., Any]:
    """An exported program as a function; other batch sizes are refused where they were not exported."""
    module = module_of(exported)
    fixed = has_fixed_batch(exported)
    inputs = exported.graph_signature.user_inputs
    values = [node.meta.get("val") for node in exported.graph.nodes if node.name in inputs]
    expected = [value.shape for value in values if isinstance(value, Tensor)][:1]

    def call(*args: Any, **kwargs: Any) -> Any:
        given = flatten_tensors((args, kwargs))[:1]
        if fixed and expected and given and tuple(given[0].shape[:1]) != tuple(expected[0][:1]):
            raise ValueError(f"the program was exported for a batch of {expected[0][0]}")
        return type(module).forward(module, *args, **kwargs)

    return call


def normalise_examples(
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any], example_kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments of the example call."""
    kwargs = dict(example_kwargs or {})
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), kwargs
    if isinstance(example_inputs, Mapping):
        return (), {**example_inputs, **kwargs}
    return tuple(example_inputs), kwargs


COMPILED = "_orig_mod"
"""Where the modules that `torch.compile` makes hold the original; to import their class would load all of dynamo."""


def refuse_unsupported(model: nn.Module) -> None:
    """Raise TraceError for models of what no tracer follows: TorchScript, compiled, quantised, sparse or lazy parts."""
    for name, module in model.named_modules():
        place = f"layer '{name}'" if name else f"model {type(module).__name__}"
        if isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
            raise TraceError(
                "TorchScript holds no Python to trace",
                place=place,
                mend="put the nn.Module it was made from in its place",
            )
        if COMPILED in module._modules:
            raise TraceError(
                "it was compiled, which leaves no Python to trace",
                place=place,
                mend=f"put the module it was made from, its `.{COMPILED}`, in its place",
            )
        if ".quantized." in type(module).__module__ and type(module).__module__.startswith("torch."):
            raise TraceError("it is quantised already", place=place, mend="trace the model before it was quantised")
        for key, value in (*vars(module).items(), *module._buffers.items()):
            if type(value).__name__ == "FakeTensor":
                raise TraceError(
                    "it is a fake tensor that torch.export left there, and has no values",
                    place=f"tensor '{name}.{key}'" if name else f"tensor '{key}'",
                    mend="delete that attribute, or make the model anew",
                )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        place = f"tensor '{name}'"
        if is_lazy(tensor):
            raise TraceError(
                "a lazy layer has no weights yet",
                place=place,
                mend="run the model once on an example before tracing it",
            )
        if tensor.is_quantized:
            raise TraceError("it is quantised already", place=place, mend="trace the model before it was quantised")
        if tensor.layout != torch.strided:
            raise TraceError("it is a sparse tensor", place=place, mend="make it dense with .to_dense()")
        if tensor.is_meta:
            raise TraceError("it is on the meta device and has no values", place=place, mend="load its weights first")


def _from_exported(
    exported: ExportedProgram, signature: Signature, reference: Reference, model: nn.Module | None
) -> Program:
    updates = exported.graph_signature.buffers_to_mutate
    if updates:
        raise Refused(f"forward updates the model's own tensor '{next(iter(updates.values()))}'")
    try:
        return _finish(exported_graph(exported, signature, model), signature, reference)
    except Unfollowable:
        return _finish(exported_graph(functionalised(exported), signature, model), signature, reference)


def _finish(raw: fx.GraphModule, signature: Signature, reference: Reference) -> Program:
    """Functional, canonical, checked against the model."""
    make_functional(raw, signature.tensors)
    _unwrap_dataclass_output(raw.graph)
    module = canonicalise(raw, raw)
    signature.set_convention(module.graph)
    module.recompile()
    for node in module.graph.nodes:
        node.meta[FEATURE] = node.name
    inputs = tuple(
        InputSpec(name, tuple(tensor.shape), tensor.dtype, batch_axis=None)
        for name, tensor in zip(signature.names, signature.tensors, strict=True)
    )
    return _check(Program(module, signature.tensors, inputs, reference.output_names), reference)


def _unwrap_dataclass_output(graph: fx.Graph) -> None:
    """A model may return its own class of output: its fields become a mapping."""
    output = output_node(graph)
    maker = output.args[0]
    if isinstance(maker, fx.Node) and maker.op == "call_function" and isinstance(maker.target, type):
        fields = dict(maker.kwargs)
        fields.update(zip(getattr(maker.target, "__dataclass_fields__", {}), maker.args, strict=False))
        output.args = ({key: value for key, value in fields.items() if value is not None},)
        graph.erase_node(maker)


def _check(program: Program, reference: Reference) -> Program:
    """Hold the program against the model, and find whether the batch is free.

    Raises:
        Refused: it does not compute what the model computes.
    """
    _same(program, reference.examples, reference.output, "on the example inputs")
    inputs, where = reference.other(0, seed=1), "on other values than the examples"
    try:
        expected = reference.run(inputs)
    except Exception:  # the model takes no other values (indices, say): the examples have to do
        inputs, where = list(reference.examples), "when it runs twice on the same inputs"
        expected = reference.run(inputs)
    _same(program, inputs, expected, where)
    note = _batch_obstacle(program, reference)
    batched = set(reference.batch_inputs())
    axes = [0 if note is None and index in batched else None for index in range(len(program.inputs))]
    specs = tuple(replace(spec, batch_axis=axis) for spec, axis in zip(program.inputs, axes, strict=True))
    return replace(program, inputs=specs, notes=(f"the batch stays fixed: {note}",) if note else ())


def _batch_obstacle(program: Program, reference: Reference) -> str | None:
    """Why the program takes no other batch size than the example's, or None."""
    larger = reference.other(1, seed=2)
    if not reference.batch_inputs():
        return "the first input has no axis for it"
    try:
        expected = reference.run(larger)
    except Exception:
        return _stacking_obstacle(program, reference)
    try:
        _same(program, larger, expected, "for another batch size")
    except Refused as reason:
        return str(reason)
    except Exception as error:
        return f"the graph fails for another one ({one_line(error)})"
    return None


def _stacking_obstacle(program: Program, reference: Reference) -> str | None:
    """The same where the model itself takes only the example's batch: two of those must give their two outputs."""
    batched = set(reference.batch_inputs())
    other = reference.other(0, seed=1)
    stacked = [
        torch.cat([first, second]) if index in batched else first
        for index, (first, second) in enumerate(zip(reference.examples, other, strict=True))
    ]
    other = [tensor if index in batched else reference.examples[index] for index, tensor in enumerate(other)]
    fixed = "the model was written or exported for the example's batch size"
    try:
        parts = zip(flatten_tensors(reference.output), flatten_tensors(reference.run(other)), strict=True)
        shapes = [output.shape for output in _outputs(program, stacked)]
    except Exception:
        return fixed
    expected = []
    for (first, second), shape in zip(parts, shapes, strict=True):
        if first.shape == shape and torch.equal(first, second):
            expected.append(first)
            continue
        axes = [axis for axis, (old, new) in enumerate(zip(first.shape, shape, strict=False)) if old != new]
        if len(first.shape) != len(shape) or len(axes) != 1 or shape[axes[0]] != 2 * first.shape[axes[0]]:
            return "not every output has an axis for it"
        expected.append(torch.cat([first, second], axes[0]))
    try:
        _same(program, stacked, tuple(expected), "for another batch size")
    except Exception:
        return fixed
    return None


def _outputs(program: Program, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a program node by node: the module's own call prints its code to stderr if something fails."""
    copies = [tensor.clone() for tensor in inputs]
    same_shapes = all(ours.shape == theirs.shape for ours, theirs in zip(inputs, program.examples, strict=True))
    run = (ShapeKeeper if same_shapes else fx.Interpreter)(program.module)
    with torch.no_grad():
        return flatten_tensors(run.run(*copies, enable_io_processing=False))


class ShapeKeeper(fx.Interpreter):
    """Runs a program on other values of the examples' shapes; every node must give the shape that it gave for them."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and shape_of(n) not in (None, tuple(value.shape)):
            raise NoSpelling(n, f"the shape of what '{n.name}' gives as its result depends on values")
        return value


def _same(program: Program, inputs: Sequence[Tensor], expected: Any, where: str) -> None:
    """Raises Refused unless the program gives what the model gave."""
    wanted = tuple(tensor.detach() for tensor in flatten_tensors(expected))
    given = _outputs(program, inputs)
    if len(given) != len(wanted):
        raise Refused(f"the traced program has {len(given)} outputs and the model {len(wanted)}")
    for name, ours, theirs in zip(program.output_names, given, wanted, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise Refused(
                f"output '{name}' is {tuple(ours.shape)} {ours.dtype} in the traced program and "
                f"{tuple(theirs.shape)} {theirs.dtype} in the model {where}"
            )
        if not close(ours, theirs):
            raise Impure(f"output '{name}' differs between the traced program and the model {where}")


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to ten times the rounding that exact rewrites are allowed; non-finite values at the same places."""
    if not theirs.is_floating_point():
        return torch.equal(ours, theirs)
    return relative_maximum(ours, theirs) <= 10 * tolerance(ours.dtype)
