"""The Python code of a program's module: called as the model is, and plain enough to be saved and read back."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
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
        parts: for each placeholder, the expression of those parameters that it is: "features[0]".
        fixed: parameters that are not tensors, with the value they must have.
    """

    def __init__(self, parameters: Sequence[str], parts: dict[str, str], fixed: dict[str, Any]) -> None:
        super().__init__()
        self.parameters = tuple(parameters)
        self.parts = dict(parts)
        self.fixed = dict(fixed)

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        """The head of `forward`, and the lines that take its arguments apart."""
        optional = True
        parameters: list[str] = []
        for name in reversed(self.parameters):
            optional = optional and name in self.fixed and _has_literal(self.fixed[name])
            parameters.insert(0, f"{name}={self.fixed[name]!r}" if optional else name)
        lines = [super().gen_fn_def(parameters, maybe_return_annotation, **options)]
        for name, value in self.fixed.items():
            if value is not None and _has_literal(value):
                message = f"the program was traced with {name}={value!r}"
                lines.append(f"    torch._assert({name} == {value!r}, {message!r})")
        lines += [f"    {name} = {part}" for name, part in self.parts.items() if name != part]
        return "\n".join(lines)

    def _gen_python_code(self, nodes: Any, *args: Any, **kwargs: Any) -> Any:
        with _methods(nodes):
            return super()._gen_python_code(nodes, *args, **kwargs)


def _has_literal(value: Any) -> bool:
    """Whether `repr` gives code for a value."""
    return value is None or isinstance(value, (bool, int, float, str))


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
