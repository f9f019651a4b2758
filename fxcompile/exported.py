"""The second road: `torch.export`, for models that symbolic tracing cannot follow, and for files of that kind."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxcompile.program import output_node
from fxcompile.refusals import quiet_torch
from fxcompile.signature import Signature


@contextmanager
def quietly() -> Iterator[None]:
    """Export without gradients, warnings, and the fused attention that no exporter knows."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), quiet_torch(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def export(model: nn.Module, signature: Signature) -> ExportedProgram:
    """Export a model, its batch free if that works."""
    args, kwargs = signature.call([tensor.clone() for tensor in signature.tensors])
    batch = _dynamic_batch(signature, args, kwargs)
    with quietly():
        if batch is not None:
            try:
                return torch.export.export(model, args, kwargs, dynamic_shapes=batch, strict=False)
            except Exception:
                pass  # the batch may be fixed by the model; the second attempt says what else is wrong
        return torch.export.export(model, args, kwargs, strict=False)


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
    """The exported program as a graph module, weights as its attributes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return exported.module(check_guards=False)
        except TypeError:  # torch before 2.9
            return exported.module()


def exported_graph(exported: ExportedProgram, signature: Signature, model: nn.Module | None = None) -> fx.GraphModule:
    """The raw graph of an exported program: weights as `get_attr`, inputs flat and named like the model's."""
    raw = module_of(exported)
    raw.graph.set_codegen(fx.graph.CodeGen())
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
