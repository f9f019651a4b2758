"""What tests of passes share: a network of a few lines, and programs as text for golden tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from fxcompile.labels import describe_node
from fxcompile.program import Program


class Net(nn.Module):
    """Layers by name and a function that calls them."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def printed(program: Program) -> str:
    """The graph as `name = what(arguments)`, a line for each node; layers by the name under which they are stored."""
    names: dict[fx.Node, str] = {}
    lines = []
    for node in program.graph.nodes:
        layer = program.layer(node)
        name = names[node] = str(node.target) if layer is not None or node.op == "placeholder" else node.name
        if node.op == "placeholder":
            continue
        arguments = [text(item, names) for item in node.args]
        arguments += [f"{key}={text(item, names)}" for key, item in node.kwargs.items()]
        what = describe_node(program, node)
        call = f"{what}({', '.join(arguments)})"
        lines.append(f"return {', '.join(arguments)}" if node.op == "output" else f"{name} = {call}")
    return "\n".join(lines)


def text(value: Any, names: dict[fx.Node, str]) -> str:
    """An argument: nodes by name, all else as Python writes it."""
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(text(item, names) for item in value)}]"
    return repr(value)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The L2 norm of a difference over that of what it should be."""
    a, b = ours.detach().double(), theirs.detach().double()
    return float((a - b).norm() / b.norm())


def with_layers(net: nn.Module, **layers: nn.Module) -> Any:
    """A copy of a network with other layers."""
    made = copy.deepcopy(net)
    for name, layer in layers.items():
        setattr(made, name, layer)
    return made
