"""From a PyTorch model to a `Program`: `torch.fx.symbolic_trace` first, `torch.export` where that cannot follow.

Either road gives a raw graph; `functional` removes in-place operations, `canonical` spells it, and `agreement` holds it
against the model itself before anyone sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxcompile.agreement import checked
from fxcompile.canonical import canonicalise
from fxcompile.errors import FxcompileError, TraceError
from fxcompile.exported import export, exported_graph, functionalised, has_fixed_batch, module_of
from fxcompile.functional import Unfollowable, make_functional
from fxcompile.program import FEATURE, InputSpec, Program, flatten_tensors, output_node
from fxcompile.reference import ModelState, Reference, left_alone
from fxcompile.refusals import Impure, Refused, refusal
from fxcompile.signature import Signature
from fxcompile.symbolic import changing_line, symbolic_graph
from fxcompile.timing import Stopwatch
from fxcompile.unsupported import refuse_unsupported, unwrapped


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
            if not isinstance(model, nn.Module):
                kind = f"class {model.__name__}" if isinstance(model, type) else type(model).__name__
                raise TraceError(f"a {kind} is no model", mend="give an instance of nn.Module, or an ExportedProgram")
            program = _trace_module(unwrapped(model), args, kwargs)
    return replace(program, seconds=watch.seconds)


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
    """Arguments and keyword arguments of the example call.

    Raises:
        TraceError: they are neither a tensor nor a collection of arguments.
    """
    kwargs = dict(example_kwargs or {})
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), kwargs
    if isinstance(example_inputs, Mapping):
        return (), {**example_inputs, **kwargs}
    if not isinstance(example_inputs, Sequence) or isinstance(example_inputs, str):
        raise TraceError(
            f"example inputs cannot be a {type(example_inputs).__name__}",
            mend="give a tensor, a tuple of positional arguments, or a dict of keyword arguments",
        )
    return tuple(example_inputs), kwargs


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
    observed = make_functional(raw, signature.tensors)
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
    return checked(Program(module, signature.tensors, inputs, reference.output_names), reference, observed)


def _unwrap_dataclass_output(graph: fx.Graph) -> None:
    """A model may return its own class of output: its fields become a mapping."""
    output = output_node(graph)
    maker = output.args[0]
    if isinstance(maker, fx.Node) and maker.op == "call_function" and isinstance(maker.target, type):
        fields = dict(maker.kwargs)
        fields.update(zip(getattr(maker.target, "__dataclass_fields__", {}), maker.args, strict=False))
        output.args = ({key: value for key, value in fields.items() if value is not None},)
        graph.erase_node(maker)
