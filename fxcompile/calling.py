"""The Python code of a program's module: called as the model is, and plain enough to be saved and read back."""

from __future__ import annotations

import types
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx


class ModelCode(fx.graph.CodeGen):
    """Writes `forward` with the model's own parameters, and takes nested ones apart.

    A canonical graph has one flat placeholder for each tensor. Where the model takes a list, a dict or a number
    besides, `forward` takes it too: `def forward(self, features, steps=3)`, then `features_0 = features[0]`, and the
    number is checked against the one that the program was traced with. Methods of tensors, which are functions in
    the graph, are written as methods: Python can read the code back.

    Args:
        parameters: names of the parameters of forward, in order.
        keywords: which of them are given by keyword only.
        parts: for each placeholder, the expression of those parameters that it is: "features[0]".
        fixed: parameters, or parts of them, that are not tensors, with the literal value they must have; parameters
            have it as their default, too.
    """

    def __init__(
        self, parameters: Sequence[str], keywords: Collection[str], parts: dict[str, str], fixed: dict[str, Any]
    ) -> None:
        super().__init__()
        self.parameters = tuple(parameters)
        self.keywords = frozenset(keywords)
        self.parts = dict(parts)
        self.fixed = dict(fixed)

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        """The head of `forward`, and the lines that take its arguments apart."""
        head: list[str] = []
        checks: list[tuple[str, str]] = []
        optional = False
        for name in sorted(self.parameters, key=self.keywords.__contains__):
            if name in self.keywords and "*" not in head:
                head.append("*")
            if name in self.fixed:
                head.append(f"{name}={self.fixed[name]!r}")
                optional = True
            elif optional and name not in self.keywords:
                head.append(f"{name}=None")  # Python wants a default after those that have one
                checks.append((f"{name} != None", f"'{name}' is missing"))
            else:
                head.append(name)
        for name, value in self.fixed.items():
            checks.append((f"{name} == {value!r}", f"the program was traced with {name}={value!r}"))
        lines = [super().gen_fn_def(head, maybe_return_annotation, **options)]
        # None is compared by value because the code is traced again when a saved module is loaded.
        lines += [f"    torch._assert({condition}, {message!r})" for condition, message in checks]
        lines += [f"    {name} = {part}" for name, part in self.parts.items() if name != part]
        return "\n".join(lines)

    def _gen_python_code(self, nodes: Any, *args: Any, **kwargs: Any) -> Any:
        with _methods(nodes):
            return super()._gen_python_code(nodes, *args, **kwargs)


def has_literal(value: Any) -> bool:
    """Whether `repr` gives code for a value, which is equal to itself."""
    if isinstance(value, (tuple, list)):
        return type(value) in (tuple, list) and all(map(has_literal, value))
    if isinstance(value, dict):
        return type(value) is dict and all(has_literal(item) for pair in value.items() for item in pair)
    if isinstance(value, float):
        return value == value
    return value is None or isinstance(value, (bool, int, str, torch.dtype))


@contextmanager
def _methods(nodes: Any) -> Iterator[None]:
    """Calls of `torch.Tensor.size` and the like as calls of methods, for the time being."""
    changed: list[tuple[fx.Node, Any]] = []
    for node in list(nodes):
        name = node.target.__name__ if isinstance(node.target, types.MethodDescriptorType) else ""
        if name and node.op == "call_function" and getattr(torch.Tensor, name, None) is node.target:
            changed.append((node, node.target))
            node.op, node.target = "call_method", name
    try:
        yield
    finally:
        for node, target in changed:
            node.op, node.target = "call_function", target
