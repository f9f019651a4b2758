"""From a PyTorch model to a `Program`: `torch.fx.symbolic_trace` first, `torch.export` where that cannot follow.

Either road gives a raw graph; `functional` removes in-place operations and `canonical` spells it. The result is run
against the model itself before anyone sees it, on the example inputs and on others with another batch size, because a
symbolic trace can silently bake in what it should not: a random number, a branch, a size.
"""

from __future__ import annotations

import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxcompile.calibration import InputSpec
from fxcompile.canonical import canonicalise
from fxcompile.contracts import tolerance
from fxcompile.errors import FxcompileError, TraceError
from fxcompile.functional import Unfollowable, make_functional
from fxcompile.program import FEATURE, Program, flatten_tensors, output_node
from fxcompile.signature import Signature
from fxcompile.verification import random_like, relative_maximum


def trace(
    model: nn.Module | ExportedProgram,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
) -> Program:
    """Bring a model to canonical form.

    The model is traced in eval mode; its own mode, weights and buffers are left as they were, and its tensors are
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
    args, kwargs = normalise_examples(example_inputs, example_kwargs)
    if isinstance(model, ExportedProgram):
        return _trace_exported(model, args, kwargs)
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            "TorchScript modules hold no Python to trace", mend="trace the nn.Module it was made from, or its .pt2"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    signature = Signature.of(model, args, kwargs)
    with evaluating(model):
        reference = Reference(model, signature)
        try:
            return _finish(_symbolic_graph(model, signature), model, signature, reference)
        except (_Refused, Unfollowable) as reason:
            first: Exception = reason
        except FxcompileError:
            raise
        except Exception as error:  # symbolic tracing runs the user's code on proxies: anything may come out
            first = error
        try:
            exported = _export(model, signature)
            return _from_exported(exported, signature, reference, model)
        except (_Refused, Unfollowable) as reason:
            raise _refusal(model, reason, first) from reason
        except FxcompileError:
            raise
        except Exception as error:
            raise _refusal(model, error, first) from error


class _Refused(Exception):
    """A road led to a program that is not the model."""


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, each module's own mode restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Reference:
    """What the model itself computes: on the examples, and on other values and batch sizes."""

    def __init__(self, model: Callable[..., Any], signature: Signature) -> None:
        self.model = model
        self.signature = signature
        self.examples = signature.tensors
        if not self.examples:
            raise TraceError("no tensor among the example inputs", mend="give the tensors that forward takes")
        try:
            self.output = self.run(self.examples)
        except Exception as error:
            place, _ = user_line(error)
            raise TraceError(
                f"the model fails on the example inputs {signature.describe()}: {one_line(error)}",
                place=place,
                mend="give inputs of the shape and dtype that forward takes",
            ) from error
        if not flatten_tensors(self.output):
            raise TraceError("the model returns no tensor", mend="return the tensors that shall be the outputs")

    def run(self, tensors: Sequence[Tensor]) -> Any:
        args, kwargs = self.signature.call([tensor.clone() for tensor in tensors])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.model(*args, **kwargs)

    def batch_inputs(self) -> list[int]:
        """Indices of the inputs that share the first axis, if the model may be batched over it."""
        sizes = [tensor.shape[0] if tensor.dim() else None for tensor in self.examples]
        return [index for index, size in enumerate(sizes) if size is not None and size == sizes[0]]

    def other(self, grow: int, seed: int) -> list[Tensor]:
        """Other inputs of the same range, the batch axis longer by `grow`."""
        generator = torch.Generator().manual_seed(seed)
        batched = self.batch_inputs() if grow else []
        made = []
        for index, example in enumerate(self.examples):
            shape = list(example.shape)
            if index in batched:
                shape[0] += grow
            made.append(random_like(example, shape, generator))
        return made


class _Tracer(fx.Tracer):
    """Symbolic tracing with flat placeholders; constants of the example call are baked in."""

    def __init__(self, signature: Signature) -> None:
        super().__init__()
        self.signature = signature

    def create_args_for_root(
        self, root_fn: types.FunctionType, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.signature.names]
        args, kwargs = self.signature.call(proxies)
        return lambda: root_fn(self.root, *args, **kwargs), []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        from fxcompile.layers import is_old_weight_norm

        if type(m).__module__.startswith("torch.nn.utils.parametrize"):
            return True
        if (m._forward_hooks or m._forward_pre_hooks) and not is_old_weight_norm(m):
            return False  # hooks run when the layer is traced through
        return super().is_leaf_module(m, module_qualified_name)


def _symbolic_graph(model: nn.Module, signature: Signature) -> fx.GraphModule:
    tracer = _Tracer(signature)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tracer.trace(model)
    return fx.GraphModule(tracer.root, graph, class_name=type(model).__name__)


def _finish(
    raw: fx.GraphModule,
    root: nn.Module,
    signature: Signature,
    reference: Reference,
) -> Program:
    """Functional, canonical, checked against the model."""
    make_functional(raw, signature.tensors)
    module = canonicalise(raw, raw)
    signature.convention(module)
    names = output_names(reference.output)
    _unwrap_dataclass_output(module.graph)
    module.recompile()
    for node in module.graph.nodes:
        node.meta[FEATURE] = node.name
    inputs = tuple(
        InputSpec(name, tuple(tensor.shape), tensor.dtype, batch_axis=None)
        for name, tensor in zip(signature.names, signature.tensors, strict=True)
    )
    program = Program(module, signature.tensors, inputs, names)
    return _check(program, reference)


def _check(program: Program, reference: Reference) -> Program:
    """Hold the program against the model, and find whether the batch is free."""
    _same(program, reference.examples, reference.output, "on the example inputs")
    again = reference.run(reference.examples)
    _same(program, reference.examples, again, "when it runs twice on the same inputs")
    inputs = reference.other(0, seed=1)
    try:
        expected = reference.run(inputs)
    except Exception:  # the model takes no other values (indices, say): the examples have to do
        expected = None
    if expected is not None:
        _same(program, inputs, expected, "on other values than the examples")
    batched = set(reference.batch_inputs())
    larger = reference.other(1, seed=2)
    note = None
    try:
        expected = reference.run(larger)
    except Exception:
        expected, note = _stacked(program, reference)
    if expected is not None:
        try:
            _same(program, larger if note is None else _twice(reference), expected, "for another batch size")
            note = None
        except _Refused:
            raise
        except Exception as error:
            note = f"the batch stays fixed: the graph fails for another batch size ({one_line(error)})"
    axes = [0 if note is None and index in batched else None for index in range(len(program.inputs))]
    specs = tuple(replace(spec, batch_axis=axis) for spec, axis in zip(program.inputs, axes, strict=True))
    return replace(program, inputs=specs, notes=(note,) if note else ())


def _twice(reference: Reference) -> list[Tensor]:
    batched = set(reference.batch_inputs())
    return [
        torch.cat([tensor, tensor]) if index in batched else tensor for index, tensor in enumerate(reference.examples)
    ]


def _stacked(program: Program, reference: Reference) -> tuple[Any, str | None]:
    """For a model that takes only the example's batch: what the program must give for the examples twice over."""
    size = reference.examples[0].shape[0] if reference.examples[0].dim() else None
    outputs = flatten_tensors(reference.output)
    if size is None or any(not output.dim() or output.shape[0] != size for output in outputs):
        return None, "the batch stays fixed: the model takes no other batch size than the example's"
    expected = tuple(torch.cat([output, output]) for output in outputs)
    try:
        program.outputs(*_twice(reference))
    except Exception:
        return None, "the batch stays fixed: the model was written or exported for the example's batch size"
    return expected, "stacked"


def _same(program: Program, inputs: Sequence[Tensor], expected: Any, where: str) -> None:
    """Raises _Refused unless the program gives what the model gave."""
    wanted = flatten_tensors(expected)
    given = program.outputs(*[tensor.clone() for tensor in inputs])
    if len(given) != len(wanted):
        raise _Refused(f"the traced program has {len(given)} outputs and the model {len(wanted)}")
    for name, ours, theirs in zip(program.output_names, given, wanted, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise _Refused(
                f"output '{name}' is {tuple(ours.shape)} {ours.dtype} in the traced program and "
                f"{tuple(theirs.shape)} {theirs.dtype} in the model {where}"
            )
        if not close(ours, theirs):
            raise _Refused(
                f"output '{name}' differs between the traced program and the model {where}, so forward depends on "
                "something that is not an input (a random number, a global, a value read with .item())"
            )


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to ten times the rounding that exact rewrites are allowed; non-finite values at the same places."""
    if not theirs.is_floating_point():
        return torch.equal(ours, theirs)
    return relative_maximum(ours, theirs) <= 10 * tolerance(ours.dtype)


def output_names(output: Any) -> tuple[str, ...]:
    """Names for all tensors of an output: the keys or fields it has, else `output`, `output_0`, `output_1`, ..."""
    if isinstance(output, Tensor):
        return ("output",)
    names = [name for name, _ in _named(output, "")]
    unique: list[str] = []
    for name in names:
        clean = "".join(char if char.isalnum() or char in "_.:/-" else "_" for char in name)
        while clean in unique:
            clean += "_"
        unique.append(clean)
    return tuple(unique)


def _named(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value
        return
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif hasattr(value, "_fields"):
        items = [(name, getattr(value, name)) for name in value._fields]
    elif isinstance(value, (tuple, list)):
        items = [(f"output_{index}" if not prefix else str(index), item) for index, item in enumerate(value)]
        if len(items) == 1 and not prefix:
            items = [("output", value[0])]
    else:
        return
    for name, item in items:
        yield from _named(item, f"{prefix}_{name}" if prefix else name)


def _unwrap_dataclass_output(graph: fx.Graph) -> None:
    """A model may return its own class of output: its fields become a mapping."""
    output = output_node(graph)
    maker = output.args[0]
    if isinstance(maker, fx.Node) and maker.op == "call_function" and isinstance(maker.target, type):
        fields = dict(maker.kwargs)
        fields.update(zip(getattr(maker.target, "__dataclass_fields__", {}), maker.args, strict=False))
        output.args = ({key: value for key, value in fields.items() if value is not None},)
        graph.erase_node(maker)


# the second road


def _export(model: nn.Module, signature: Signature) -> ExportedProgram:
    args, kwargs = signature.call([tensor.clone() for tensor in signature.tensors])
    with warnings.catch_warnings(), quiet_torch():
        warnings.simplefilter("ignore")
        batch = _dynamic_batch(signature, args, kwargs)
        if batch is not None:
            try:
                return torch.export.export(model, args, kwargs, dynamic_shapes=batch, strict=False)
            except Exception:
                pass  # the batch may be fixed by the model; the second attempt says what else is wrong
        return torch.export.export(model, args, kwargs, strict=False)


def _dynamic_batch(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first = signature.tensors[0]
    if not first.dim() or first.shape[0] < 2:
        return None  # torch.export takes an axis of size 1 for a constant

    def mark(value: Any) -> Any:
        if isinstance(value, Tensor):
            free = value.dim() and value.shape[0] == first.shape[0]
            return {0: torch.export.Dim.AUTO} if free else None
        if isinstance(value, Mapping):
            return {key: mark(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(mark(item) for item in value)
        return None

    shapes: dict[str, Any] = {}
    names = signature.argument_names(args, kwargs)
    for name, value in zip(names, (*args, *kwargs.values()), strict=True):
        shapes[name] = mark(value)
    return shapes


def _from_exported(
    exported: ExportedProgram, signature: Signature, reference: Reference, model: nn.Module | None
) -> Program:
    updates = exported.graph_signature.buffers_to_mutate
    if updates:
        raise _Refused(f"forward updates the buffer '{next(iter(updates.values()))}'")
    try:
        return _finish(_exported_graph(exported, signature), _module(exported), signature, reference)
    except Unfollowable:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            functional = exported.run_decompositions({})
        return _finish(_exported_graph(functional, signature), _module(functional), signature, reference)


def _module(exported: ExportedProgram) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return exported.module(check_guards=False)  # type: ignore[return-value]
        except TypeError:  # torch before 2.9
            return exported.module()  # type: ignore[return-value]


def _exported_graph(exported: ExportedProgram, signature: Signature) -> fx.GraphModule:
    """The raw graph of an exported program: weights as `get_attr`, inputs flat and named like the model's."""
    raw = _module(exported)
    raw.graph.set_codegen(fx.graph.CodeGen())
    placeholders = [node for node in raw.graph.nodes if node.op == "placeholder"]
    kept = signature.keep(placeholders)
    for node, name in zip(kept, signature.names, strict=True):
        node.target = name
    for node in placeholders:
        if node not in kept:
            raw.graph.erase_node(node)
    for node in reversed(raw.graph.nodes):
        if node.op == "call_module" and not node.users and "guard" in str(node.target):
            raw.graph.erase_node(node)
    signature.restore_output(output_node(raw.graph), exported)
    raw.recompile()
    return raw


def _trace_exported(exported: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    if not args and not kwargs:
        if exported.example_inputs is None:
            raise TraceError("the exported program carries no example inputs", mend="give them with --input-shape")
        args, kwargs = exported.example_inputs
    module = _module(exported)
    signature = Signature.of_exported(exported, tuple(args), dict(kwargs))
    reference = Reference(module, signature)
    try:
        return _from_exported(exported, signature, reference, None)
    except (_Refused, Unfollowable) as reason:
        raise _refusal(None, reason, reason) from reason


# errors


def user_line(error: BaseException) -> tuple[str | None, str]:
    """`file:line` of the innermost frame in the user's own code, and that line's text."""
    own = Path(__file__).parent
    skipped = (str(own), str(Path(torch.__file__).parent), "<frozen", "<string", "<eval_with_key", "<fx")
    current: BaseException | None = error
    while current is not None:
        for frame in reversed(traceback.extract_tb(current.__traceback__)):
            library = any(part in frame.filename for part in skipped) or "/lib/python3" in frame.filename
            if not library and frame.filename.endswith(".py"):
                return f"{frame.filename}:{frame.lineno}", (frame.line or "").strip()
        current = current.__cause__ or current.__context__
    return None, ""


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


_MENDS = (
    ("control flow", "replace the Python branch on a tensor's value by torch.where, or move it out of forward"),
    ("data-dependent", "replace the branch or size that depends on a tensor's value (torch.where, a fixed size)"),
    ("GuardOnDataDependent", "replace the branch that depends on a tensor's value by torch.where"),
    ("depends on something", "move random numbers and outside state out of forward, or pass them as inputs"),
    ("updates", "compute the new value and return it instead of writing it to the module"),
    ("writes in place", "use the out-of-place form of that operation"),
    (".item()", "keep the value in a tensor"),
    ("numpy", "use torch operations instead of numpy in forward"),
)


def _refusal(model: nn.Module | None, second: Exception, first: Exception) -> TraceError:
    place: str | None = None
    line = ""
    for error in (second, first):
        place, line = user_line(error)
        if place is None and isinstance(error, Unfollowable) and error.node.stack_trace:
            place = node_place(error.node)
        if place is not None:
            break
    reason = str(second) if isinstance(second, (_Refused, Unfollowable)) else one_line(second)
    text = f"{type(second).__name__} {second} {type(first).__name__} {first}"
    mend = next((mend for key, mend in _MENDS if key in text), "rewrite that line with torch operations on tensors")
    shown = f" (at `{line}`)" if line else ""
    if place is None and model is not None:
        place = f"model {type(model).__name__}"
    return TraceError(f"the model cannot be traced: {reason}{shown}", place=place, mend=mend)


def node_place(node: fx.Node) -> str | None:
    """`file:line` of the model's code that made a node, as far as the tracer recorded it."""
    found = None
    for text in (node.stack_trace or "").splitlines():
        if text.strip().startswith("File "):
            parts = text.strip().split('"')
            if len(parts) > 2 and "/torch/" not in parts[1] and "/fxcompile/" not in parts[1]:
                found = f"{parts[1]}:{parts[2].split('line ')[-1].split(',')[0]}"
    return found


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Torch's own loggers silenced: what they would say comes as one sentence of ours."""
    import logging

    loggers = [logging.getLogger(name) for name in ("torch", "torch.export", "torch._dynamo", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
