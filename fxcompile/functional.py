"""Turns a raw graph into one without in-place operations, by watching it run on the example inputs.

An in-place operation on node `a` that yields `n` becomes its out-of-place twin, and every later use of `a` (or of
another name for the very same tensor) becomes a use of `n`. Where a *different view* of the same memory is still read
afterwards, no renaming is right; that is `Unfollowable`, and the caller takes the road of `torch.export`, whose
functionalisation rewrites views too.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompile.program import record_shape

VALUE = "fxcompile.value"
"""Key of `node.meta`: the int, dtype, size or tuple of such that a raw node gave when it ran on the examples."""

IN_PLACE_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
}

WRITING = {function for function in IN_PLACE_OPERATORS if hasattr(Tensor, f"__{function.__name__}__")}
"""Those that work in place on tensors: `x @= y` makes another one."""

_ONLY_MARKS = {"detach_", "requires_grad_", "share_memory_", "retain_grad_"}
"""Methods named like in-place ones that write nothing."""

_CHANGES_SHAPE = {"squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_"}
"""Methods that change how the tensor object itself sees its memory, but not what is there."""

_UNSUPPORTED = {"resize_", "resize_as_", "set_", "as_strided_"}
"""Methods that give the tensor object other memory."""

_GIVES_BOOLEANS = {
    "eq_",
    "ne_",
    "lt_",
    "le_",
    "gt_",
    "ge_",
    "logical_and_",
    "logical_or_",
    "logical_not_",
    "logical_xor_",
}
"""Methods whose out-of-place twin has another dtype."""


class Unfollowable(Exception):
    """A write to memory that no renaming of nodes can express; `node` is the writing one."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


class Observer(fx.Interpreter):
    """Runs a raw graph once, recording shapes and values, and what is to be renamed after in-place operations.

    Attributes:
        renamed: pairs of a node whose tensor was overwritten, and the node that did it.
        writers: the nodes that work in place.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.submodules = dict(module.named_modules(remove_duplicate=False))
        self.order = {node: index for index, node in enumerate(module.graph.nodes)}
        self.renamed: list[tuple[fx.Node, fx.Node]] = []
        self.writers: list[fx.Node] = []
        self.own: dict[int, str] = {}
        self._lying: dict[int, list[fx.Node]] = {}  # by place in memory, the nodes whose values lay there

    def run_node(self, n: fx.Node) -> Any:
        outputs = outputs_given(n)
        if len(outputs) > 1 or isinstance(n.kwargs.get("out"), (tuple, list)):
            raise Unfollowable(n, "it writes to several tensors with out=")
        written = written_argument(n, self.submodules)
        before = self.env.get(written) if written is not None else None
        if written is not None and isinstance(before, Tensor):
            self.writers.append(n)
            self._note_write(n, written, before)
        value = super().run_node(n)
        if isinstance(before, Tensor) and isinstance(value, Tensor) and written_name(n) not in _CHANGES_SHAPE:
            self._check_dtype(n, before)
        if n.op == "get_attr" and isinstance(value, Tensor):
            self.own[memory(value)] = str(n.target)
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, Tensor) and item.layout == torch.strided:
                self._lying.setdefault(memory(item), []).append(n)
        record_shape(n, value)
        if is_plain(value):
            n.meta[VALUE] = value
        return value

    def _note_write(self, node: fx.Node, written: fx.Node, tensor: Tensor) -> None:
        name = written_name(node)
        own = self.own.get(memory(tensor))
        if own is not None and name not in _CHANGES_SHAPE:
            raise Unfollowable(node, f"forward updates the model's own tensor '{own}'")
        if name in _UNSUPPORTED:
            raise Unfollowable(node, f"'{name}' gives a tensor other memory")
        now = self.order[node]
        alive = [other for other in dict.fromkeys(self._lying.get(memory(tensor), ())) if other in self.env]
        self._lying[memory(tensor)] = alive
        for other in alive:
            read_later = any(self.order[user] > now for user in other.users)
            if not read_later:
                continue
            value = self.env[other]
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if not isinstance(item, Tensor) or not shares_memory(item, tensor):
                    continue
                if name in _CHANGES_SHAPE and item is not tensor:
                    continue  # another view keeps its shape, and its values too
                if item is not value or geometry(item) != geometry(tensor):
                    raise Unfollowable(node, "it writes in place to memory that another view reads afterwards")
                self.renamed.append((other, node))

    def _check_dtype(self, node: fx.Node, written: Tensor) -> None:
        """Out of place, the result would take the wider dtype of the operands; in place it keeps its own."""
        if written_name(node) in _GIVES_BOOLEANS and written.dtype != torch.bool:
            raise Unfollowable(node, f"it writes booleans in place into a {written.dtype} tensor")
        for source in node.all_input_nodes:
            value = self.env.get(source)
            if isinstance(value, Tensor) and torch.result_type(value, written) != written.dtype:
                raise Unfollowable(node, f"it writes {value.dtype} values in place into a {written.dtype} tensor")


def make_functional(module: fx.GraphModule, examples: Sequence[Tensor]) -> Any:
    """Observe a raw graph module on copies of the examples and remove its in-place operations; returns its output.

    Raises:
        Unfollowable: a write that no renaming of nodes can express.
    """
    observer = Observer(module)
    with torch.no_grad():
        output = observer.run(*(example.clone() for example in examples), enable_io_processing=False)
    newest: dict[fx.Node, fx.Node] = {}  # by node, what stands for its tensor after the writes so far
    for written, writer in observer.renamed:
        name = newest.get(written, written)
        for user in [user for user in name.users if observer.order[user] > observer.order[writer]]:
            user.replace_input_with(name, writer)
        newest[written] = writer
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in IN_PLACE_OPERATORS:
            node.target = IN_PLACE_OPERATORS[node.target]
    for node in observer.writers:
        if isinstance(node.kwargs.get("out"), fx.Node):
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
    return output


def is_plain(value: Any) -> bool:
    """Whether a value is an int, bool, float, dtype, device or a tuple or list of such: no tensor."""
    if isinstance(value, (tuple, list)):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(
        value, (bool, int, float, complex, str, torch.dtype, torch.device, slice, torch.memory_format, torch.layout)
    )


def memory(tensor: Tensor) -> int:
    """Where a tensor's storage lies."""
    return tensor.untyped_storage().data_ptr()


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in the same storage."""
    return a.numel() > 0 and b.numel() > 0 and memory(a) == memory(b)


def geometry(tensor: Tensor) -> tuple[object, ...]:
    """What makes two tensors over one storage the same tensor."""
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def outputs_given(node: fx.Node) -> list[str]:
    """The arguments under which an `aten` operator is given tensors to write its results to."""
    schema = getattr(node.target, "_schema", None)
    return [item.name for item in schema.arguments if item.is_out] if schema is not None else []


def written_argument(node: fx.Node, submodules: dict[str, nn.Module]) -> fx.Node | None:
    """The node whose tensor this node overwrites, or None for an operation that works out of place."""
    if isinstance(node.kwargs.get("out"), fx.Node):
        return node.kwargs["out"]  # type: ignore[return-value]
    first = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(first, fx.Node):
        return None
    if node.op == "call_module":
        return first if getattr(submodules[str(node.target)], "inplace", False) is True else None
    if node.op not in ("call_method", "call_function") or written_name(node) in _ONLY_MARKS:
        return None
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload):
            return first if node.target._schema.is_mutable else None
        if node.target in WRITING or is_told_in_place(node):
            return first
    return first if is_in_place_name(written_name(node)) else None


def written_name(node: fx.Node) -> str:
    """The name by which an in-place operation goes: that of the method, function or operator."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name.partition("::")[2])
    return str(node.target) if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


def is_in_place_name(name: str) -> bool:
    """Whether a method's or function's name is that of an in-place one: `relu_`, not `__add__`."""
    return name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_", "not_", "is_")


def is_told_in_place(node: fx.Node) -> bool:
    """Whether a function of `torch.nn.functional` gets `inplace=True`, by keyword or by position."""
    if node.kwargs.get("inplace") is True:
        return True
    index = _inplace_positions().get(node.target)
    return index is not None and index < len(node.args) and node.args[index] is True


@cache
def _inplace_positions() -> dict[Any, int]:
    """Where each function of `torch.nn.functional` takes `inplace`."""
    positions = {}
    for function in vars(F).values():
        if inspect.isfunction(function):
            parameters = list(inspect.signature(function).parameters)
            if "inplace" in parameters:
                positions[function] = parameters.index("inplace")
    return positions
