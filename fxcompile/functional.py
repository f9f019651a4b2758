"""Turns a raw graph into one without in-place operations, by watching it run on the example inputs.

An in-place operation on node `a` that yields `n` becomes its out-of-place twin, and every later use of `a` (or of
another name for the very same tensor) becomes a use of `n`. Where a *different view* of the same memory is still read
afterwards, no renaming is right; that is `Unfollowable`, and the caller takes the road of `torch.export`, whose
functionalisation rewrites views too.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompile.program import record_shape

VALUE = "fxcompile.value"
"""Key of `node.meta`: the int, dtype, size or tuple of such that a raw node gave when it ran on the examples."""

_IN_PLACE_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
}


class Unfollowable(Exception):
    """The graph writes to memory that another view reads later; `node` is the writing one."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


class Observer(fx.Interpreter):
    """Runs a raw graph once, recording shapes and values, and renames after in-place operations."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.order = {node: index for index, node in enumerate(module.graph.nodes)}
        self.renamed: list[tuple[fx.Node, fx.Node]] = []

    def run_node(self, n: fx.Node) -> Any:
        written = written_argument(n, self.submodules)
        if written is not None:
            self._note_write(n, written)
        value = super().run_node(n)
        record_shape(n, value)
        if is_plain(value):
            n.meta[VALUE] = value
        return value

    def _note_write(self, node: fx.Node, written: fx.Node) -> None:
        tensor = self.env.get(written)
        if not isinstance(tensor, Tensor):
            return
        if written.op == "get_attr":
            raise Unfollowable(node, f"it updates the model's own tensor '{written.target}' in forward")
        now = self.order[node]
        for other, value in self.env.items():
            if not isinstance(other, fx.Node) or all(self.order[user] <= now for user in other.users):
                continue
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if not isinstance(item, Tensor) or not shares_memory(item, tensor):
                    continue
                if item is not value or geometry(item) != geometry(tensor):
                    raise Unfollowable(node, "it writes in place to memory that another view reads afterwards")
                self.renamed.append((other, node))


def make_functional(module: fx.GraphModule, examples: Sequence[Tensor]) -> Any:
    """Observe a raw graph module on copies of the examples and remove its in-place operations; returns its output.

    Raises:
        Unfollowable: a write that no renaming of nodes can express.
    """
    observer = Observer(module)
    observer.submodules = dict(module.named_modules(remove_duplicate=False))
    with torch.no_grad():
        output = observer.run(*(example.clone() for example in examples), enable_io_processing=False)
    names: dict[fx.Node, list[fx.Node]] = {}
    for written, writer in observer.renamed:
        so_far = names.setdefault(written, [written])
        for name in so_far:
            for user in [user for user in name.users if observer.order[user] > observer.order[writer]]:
                user.replace_input_with(name, writer)
        so_far.append(writer)
    for node in module.graph.nodes:
        if written_argument(node, observer.submodules) is not None:
            make_out_of_place(node)
    return output


def is_plain(value: Any) -> bool:
    """Whether a value is an int, bool, float, dtype, device or a tuple or list of such: no tensor."""
    if isinstance(value, (tuple, list)):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, slice))


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in the same storage."""
    return a.numel() > 0 and b.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def geometry(tensor: Tensor) -> tuple[object, ...]:
    """What makes two tensors over one storage the same tensor."""
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def written_argument(node: fx.Node, submodules: dict[str, nn.Module]) -> fx.Node | None:
    """The node whose tensor this node overwrites, or None for an operation that works out of place."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(first, fx.Node):
        return None
    if node.op == "call_module":
        return first if getattr(submodules[str(node.target)], "inplace", False) is True else None
    if node.op == "call_method":
        return first if is_in_place_name(str(node.target)) else None
    if node.op != "call_function":
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        return first if node.target._schema.is_mutable else None
    if node.target in _IN_PLACE_OPERATORS or node.kwargs.get("inplace") is True:
        return first
    if is_in_place_name(getattr(node.target, "__name__", "")):
        return first
    return first if _inplace_position(node) is True else None


def is_in_place_name(name: str) -> bool:
    """Whether a method's or function's name is that of an in-place one: `relu_`, not `__add__`."""
    return name.endswith("_") and not name.endswith("__")


_INPLACE_INDEX = {"relu": 1, "relu6": 1, "hardtanh": 3, "leaky_relu": 2, "elu": 2, "dropout": 3, "silu": 1, "hardswish": 1}


def _inplace_position(node: fx.Node) -> object:
    """The positional `inplace` argument of a function of `torch.nn.functional`, or None."""
    if getattr(node.target, "__module__", None) != "torch.nn.functional":
        return None
    index = _INPLACE_INDEX.get(getattr(node.target, "__name__", ""))
    return node.args[index] if index is not None and index < len(node.args) else None


def make_out_of_place(node: fx.Node) -> None:
    """Change an in-place node to its out-of-place twin, as far as its own spelling tells; modules keep theirs.

    `canonical` spells the rest: it drops the `inplace` arguments of functions and layers, and the underscore of
    methods and `aten` operators.
    """
    if node.op == "call_function" and node.target in _IN_PLACE_OPERATORS:
        node.target = _IN_PLACE_OPERATORS[node.target]
