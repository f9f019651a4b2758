"""The second road: `torch.export`, for models that symbolic tracing cannot follow, and for files of that kind."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from fxcompile.errors import TraceError
from fxcompile.functional import Unfollowable
from fxcompile.lowering import NoSpelling
from fxcompile.program import output_node
from fxcompile.reference import RESERVED
from fxcompile.refusals import current_line, model_frames, quiet_torch, text_at
from fxcompile.signature import Signature, plain_containers

_FRAMES = "_filter_traceback_frames", staticmethod(model_frames)
"""Of all frames in which an operation was traced, those that `torch.fx` keeps as the node's stack trace."""


@contextmanager
def quietly() -> Iterator[None]:
    """Export without gradients, warnings, and the fused attention that no exporter knows."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), quiet_torch(), torch.no_grad():
            warnings.simplefilter("ignore")
            # It prints the graph that it could not finish, and notes no lines but those of methods named forward.
            with redirect_stderr(io.StringIO()), mock.patch.object(fx.Tracer, *_FRAMES, create=True):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Assertions(TorchFunctionMode):
    """Takes what a model asserts about values for true: it computes nothing, and it held when the model ran."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        line = text_at(current_line()) if func is Tensor.__bool__ else ""
        if line.startswith("assert "):
            return not line.startswith("assert not ")
        return func(*args, **(kwargs or {}))


def export(model: nn.Module, signature: Signature) -> ExportedProgram:
    """Export a model, its batch free if that works."""
    args, kwargs = signature.call([tensor.clone() for tensor in signature.tensors])
    batch = _dynamic_batch(signature, args, kwargs)
    with quietly(), _plain_output(model), Assertions():
        if batch is not None:
            try:
                return torch.export.export(model, args, kwargs, dynamic_shapes=batch, strict=False)
            except Exception:
                pass  # the batch may be fixed by the model; the second attempt says what else is wrong
        return torch.export.export(model, args, kwargs, strict=False)


@contextmanager
def _plain_output(model: nn.Module) -> Iterator[None]:
    """A model that returns a class of its own returns plain containers meanwhile: `torch.export` knows no others."""
    forward = model.forward
    held = {"forward": forward} if "forward" in model.__dict__ else {}

    @functools.wraps(forward)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return plain_containers(forward(*args, **kwargs))

    model.__dict__["forward"] = plain
    try:
        yield
    finally:
        del model.__dict__["forward"]
        model.__dict__.update(held)


def _dynamic_batch(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`dynamic_shapes` of an export that leaves the first axis free where it is the batch's."""
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
            return [mark(item) for item in value]
        return None

    if signature.takes_any_number:
        return ([mark(value) for value in args], *(mark(value) for value in kwargs.values()))
    return dict(zip(signature.parameters, map(mark, (*args, *kwargs.values())), strict=True))


def functionalised(exported: ExportedProgram) -> ExportedProgram:
    """The same program without writes to memory, as `torch.export` removes them."""
    with quietly():
        functional: ExportedProgram = exported.run_decompositions({})
        return functional


def module_of(exported: ExportedProgram) -> fx.GraphModule:
    """The exported program as a graph module, weights as its attributes.

    Raises:
        TraceError: a part has a name that no graph module can hold.
    """
    for name in exported.state_dict:
        if name.partition(".")[0] in RESERVED:
            raise TraceError(
                f"the exported program has a part '{name}', and torch runs none of that name",
                mend="rename it in the model and export that again",
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return exported.module(check_guards=False)


def exported_graph(exported: ExportedProgram, signature: Signature, model: nn.Module | None = None) -> fx.GraphModule:
    """The raw graph of an exported program: weights as `get_attr`, inputs flat and named like the model's."""
    raw = module_of(exported)
    raw.graph.set_codegen(fx.graph.CodeGen())
    _inline_blocks(raw)
    placeholders = [node for node in raw.graph.nodes if node.op == "placeholder"]
    kept = signature.keep(placeholders)
    for node, name in zip(kept, signature.names, strict=True):
        node.target = name
    for node in placeholders:
        if node not in kept and not node.users:
            raw.graph.erase_node(node)
    for node in reversed(raw.graph.nodes):
        if node.op == "call_module" and not node.users and "guard" in str(node.target):
            raw.graph.erase_node(node)
    signature.restore_output(output_node(raw.graph), exported)
    _name_like_model(raw.graph, model)
    raw.recompile()
    return raw


def _inline_blocks(module: fx.GraphModule) -> None:
    """Put back in the graph what `torch.export` holds apart from it: blocks that set the gradient mode or autocast.

    Raises:
        NoSpelling: a block that is more than its operations one after the other.
        Unfollowable: operations over the axis of `torch.vmap`, which functionalisation writes out.
    """
    for node in list(module.graph.nodes):
        if "functorch" in str(getattr(node.target, "__module__", "")):
            raise Unfollowable(node, "it maps a function over an axis")
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        name = node.target.name()
        at = next(index for index, item in enumerate(node.args) if getattr(item, "op", "") == "get_attr")
        target = str(node.args[at].target)
        block = module.get_submodule(target)
        assert isinstance(block, fx.GraphModule)
        node.stack_trace = node.stack_trace or next(
            (item.stack_trace for item in block.graph.nodes if item.stack_trace), None
        )
        if name == "wrap_with_autocast" and node.args[2] is True:
            raise NoSpelling(node, "forward computes under autocast")
        if name not in ("wrap_with_autocast", "wrap_with_set_grad_enabled"):
            raise NoSpelling(node, f"forward calls the higher-order operation '{name}'")
        _inline_blocks(block)
        inputs = [item for item in block.graph.nodes if item.op == "placeholder"]
        mapping: dict[fx.Node, Any] = dict(zip(inputs, node.args[at + 1 :], strict=True))
        with module.graph.inserting_before(node):
            outputs = module.graph.graph_copy(block.graph, mapping)
        for item in block.graph.nodes:
            if item.op in ("get_attr", "call_module"):
                mapping[item].target = f"{target}.{item.target}"
        for user in list(node.users):
            user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index]
            module.graph.erase_node(user)
        module.graph.erase_node(node)


def _name_like_model(graph: fx.Graph, model: nn.Module | None) -> None:
    """Call a module that the model holds under several names by the first, as symbolic tracing does."""
    if model is None:
        return
    first = {id(module): name for name, module in model.named_modules()}
    aliases = {name: first[id(module)] for name, module in model.named_modules(remove_duplicate=False)}
    aliases = {name: known for name, known in aliases.items() if name != known}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack and aliases:
            node.meta["nn_module_stack"] = {
                key: (aliases.get(str(path), path), kind) for key, (path, kind) in stack.items()
            }


def has_fixed_batch(exported: ExportedProgram) -> bool:
    """Whether an exported program takes no other size of its first input's first axis."""
    users = set(exported.graph_signature.user_inputs)
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in users:
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                return not value.dim() or isinstance(value.shape[0], int)
    return True
