"""A program's canonical form as text, from the outputs back: the names and the order of nodes do not matter."""

import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from fxcompile.exported import quietly
from fxcompile.program import Program, fetch
from fxcompile.tracing import trace


def form(program: Program) -> list[str]:
    """A line for each operation that an output needs: what it is, its options, its arguments."""
    seen: dict[fx.Node, str] = {}
    lines: list[str] = []

    def value(item: Any) -> str:
        if isinstance(item, fx.Node):
            return visit(item)
        if isinstance(item, (tuple, list)):
            return f"({', '.join(map(value, item))}{',' if len(item) == 1 else ''})"
        if isinstance(item, dict):
            return f"{{{', '.join(f'{key}: {value(entry)}' for key, entry in item.items())}}}"
        if isinstance(item, slice):
            parts = [item.start, item.stop] + ([item.step] if item.step is not None else [])
            return ":".join("" if part is None else value(part) for part in parts)
        return repr(item)

    def visit(node: fx.Node) -> str:
        if node not in seen:
            arguments = [value(item) for item in node.args]
            arguments += [f"{key}={value(item)}" for key, item in sorted(node.kwargs.items())]
            seen[node] = f"%{len(seen)}"
            lines.append(" ".join([f"{seen[node]} =", head(program, node), *arguments]))
        return seen[node]

    output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    lines.append(f"return {value(output.args[0])}")
    return lines


def head(program: Program, node: fx.Node) -> str:
    """What a node does, without its arguments; layers with weights go by their names."""
    if node.op == "call_module":
        layer = program.module.get_submodule(str(node.target))
        name = f" '{node.target}'" if any(True for _ in layer.parameters()) else ""
        return f"{type(layer).__name__}({layer.extra_repr()}){name}"
    if node.op == "get_attr":
        tensor = fetch(program.module, str(node.target))
        return f"{type(tensor).__name__} {tuple(tensor.shape)}"
    if node.op == "placeholder":
        return f"input '{node.target}'"
    return getattr(node.target, "__name__", str(node.target))


class Written(nn.Module):
    """A model whose forward is a function of its input, and of itself where it has layers."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = function
        self.takes_self = bool(layers)
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x) if self.takes_self else self.function(x)


def exported(model: nn.Module, inputs: tuple[Any, ...], dynamic: bool = True) -> ExportedProgram:
    """`torch.export` of a model, as users write it."""
    shapes = tuple({0: Dim.AUTO} for _ in inputs) if dynamic else None
    with quietly():
        return torch.export.export(model.eval(), inputs, dynamic_shapes=shapes, strict=False)


def through_file(program: ExportedProgram) -> ExportedProgram:
    """The same, saved as .pt2 and loaded."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, file)
        file.seek(0)
        return torch.export.load(file)


def roads(model: nn.Module, inputs: tuple[Tensor, ...], files: bool = True) -> dict[str, Program]:
    """A model by every road: symbolic, exported with a free batch, and files with a fixed batch of 2 and of 1."""
    made = {"symbolic": trace(model, inputs), "exported": trace(exported(model, inputs))}
    if files:
        made["file, batch of 2"] = trace(through_file(exported(model, inputs, dynamic=False)))
        one = tuple(tensor[:1] for tensor in inputs)
        made["file, batch of 1"] = trace(through_file(exported(model, one, dynamic=False)))
    return made
