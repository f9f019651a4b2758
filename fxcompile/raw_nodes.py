"""What the nodes of a raw graph say: which operation, with which arguments, from which module and line of the model.

The raw graph is that of `torch.fx.symbolic_trace` or of `torch.export`, before it is brought to canonical form.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fxcompile import spellings
from fxcompile.program import shape_of

PLACE = "fxcompile.place"
"""Key of `node.meta`: the line of the model that made a raw node, as `file:line`."""

NAMESPACES = ("torch", "_operator", "operator", "builtins", "math")


@dataclass(frozen=True)
class Call:
    """A raw node, read.

    Attributes:
        node: the raw node.
        name: the operation's bare name, see `operation_name`.
        args: positional arguments, the input among them wherever the model gave it.
        kwargs: the other arguments.
    """

    node: fx.Node
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def read(cls, node: fx.Node, name: str) -> Call:
        """A raw function or method node; an input given by keyword comes first."""
        args, kwargs = tuple(node.args), dict(node.kwargs)
        if not args:
            for first in ("input", "self", "tensor", "tensors", "x"):
                if first in kwargs:
                    args = (kwargs.pop(first),)
                    break
        return cls(node, name, args, kwargs)

    @property
    def source(self) -> Any:
        """The first argument, which the operation works on."""
        return self.args[0] if self.args else None

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first argument, or of the first tensor in it; () where there is none."""
        first = self.source
        if isinstance(first, (tuple, list)) and first:
            first = first[0]
        return (shape_of(first) or ()) if isinstance(first, fx.Node) else ()

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def schema(self) -> Any | None:
        """The schema of the `aten` overload that the node calls, if it calls one that writes nothing."""
        if not isinstance(self.node.target, torch._ops.OpOverload):
            return None
        schema = self.node.target._schema
        return None if schema.is_mutable else schema

    @property
    def is_functional(self) -> bool:
        """Whether the model wrote a function of `torch.nn.functional`, some of which have an order of their own."""
        return getattr(self.node.target, "__module__", None) == "torch.nn.functional"

    def bind(self, names: str) -> dict[str, Any]:
        """The arguments after the input by name; those that are None are left out, unknown ones are under "?"."""
        known = names.split()
        bound = dict(zip(known, self.args[1:], strict=False)) | self.kwargs
        if len(self.args) - 1 > len(known):
            bound["?"] = self.args[len(known) + 1 :]
        return {name: value for name, value in bound.items() if value is not None}


def only_weight(node: fx.Node) -> bool:
    """Whether a raw tensor is used by nothing but operations that become layers and hold it."""
    return all((operation_name(user) or "") in spellings.WEIGHTED for user in node.users)


def path_of_weight(target: str) -> str:
    """The path of the layer that a weight of the model is in, by the weight's own."""
    path = target.partition(".parametrizations")[0]
    owner, _, name = path.rpartition(".")
    if path != target or (name == "weight" and not owner):
        return path
    return owner if name in ("weight", "weight_v", "weight_orig") else path.removesuffix("_weight")


def own_path(node: fx.Node) -> str | None:
    """The path of the model's own layer that a raw node calls, or is the weight of."""
    if node.op == "call_module":
        return str(node.target)
    return path_of_weight(str(node.target)) if node.op == "get_attr" and node.users and only_weight(node) else None


def ancestors(node: fx.Node) -> list[fx.Node]:
    """A node and all that it is computed from."""
    found = {node: None}
    for item in (waiting := [node]):
        for source in item.all_input_nodes:
            if source not in found:
                found[source] = None
                waiting.append(source)
    return list(found)


def operation_name(node: fx.Node) -> str | None:
    """The bare name of the operation, without the underscore of in-place forms; None for foreign functions."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        if namespace != "aten":
            return None
    elif isinstance(target, str):
        name = target
    else:
        module = getattr(target, "__module__", None) or "torch"
        if module.partition(".")[0] not in NAMESPACES:
            return None
        name = getattr(target, "__name__", "")
        if name in ("and_", "or_"):
            return str(name)
    bare = name if name.startswith("_") and name.endswith("__") else name.rstrip("_")
    return spellings.ALIASES.get(bare, bare)


def method_function(name: str) -> Any:
    """The function that a tensor method is, out of place; None for what is no method."""
    bare = name if name.startswith("_") else name.rstrip("_")
    return getattr(torch.Tensor, bare, None)


def scope_of(node: fx.Node) -> str:
    """The path of the innermost module of the model in whose forward the node was traced."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = path.removeprefix("L['self']").removeprefix(".")
    return ".".join(atom.partition("@")[0] for atom in path.split("."))


def innermost_class(node: fx.Node) -> str:
    """The full name of that innermost module's class."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    kind = list(stack.values())[-1][1]
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def is_traced_constant(path: str) -> bool:
    """Whether a tensor's path was made up by a tracer: it has no name in the model."""
    return path.rpartition(".")[2].startswith(("_tensor_constant", "lifted_tensor_", "c_lifted_tensor_"))
