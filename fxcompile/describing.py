"""What `fxcompile passes` and `fxcompile show` print."""

from __future__ import annotations

import inspect
import io
from dataclasses import asdict, dataclass, field
from typing import Any

from fxcompile.contracts import Approximate
from fxcompile.cost import Cost, nodes_cost, program_cost, samples
from fxcompile.pipeline import format_value
from fxcompile.program import Program, dtype_of, shape_of
from fxcompile.report import short
from fxcompile.rewriting import Pass


@dataclass(frozen=True)
class OptionText:
    """One option of a pass: its type, its default as pipeline text, and what it is."""

    name: str
    type: str
    default: str
    description: str


@dataclass(frozen=True)
class PassText:
    """A pass as its class declares it; `source` is where its code is."""

    name: str
    contract: str
    summary: str
    documentation: str
    source: str
    options: list[OptionText] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def text(self) -> str:
        """The whole description."""
        lines = [f"{self.name} ({self.contract})", "", self.documentation, "", "options:"]
        lines += [f"  {item.name}={item.default}  {item.type}: {item.description}" for item in self.options]
        return "\n".join([*lines, "", f"source: {self.source}"])


def describe_pass(kind: type[Pass]) -> PassText:
    """Everything that a pass's class says of itself."""
    documentation = inspect.cleandoc(kind.__doc__ or "")
    contract = kind.contract.name.lower()
    if isinstance(kind.contract, Approximate) and kind.contract.exact_when:
        contract += f", exact when {kind.contract.exact_when}"
    options = [
        OptionText(name, type_text(info.annotation), format_value(info.get_default()), info.description or "")
        for name, info in kind.model_fields.items()
    ]
    source = f"{kind.__module__}.{kind.__qualname__}, {inspect.getsourcefile(kind)}"
    summary = inspect.cleandoc(inspect.getmodule(kind).__doc__ or documentation).splitlines()[0]
    return PassText(kind.name, contract, summary, documentation, source, options)


def type_text(annotation: Any) -> str:
    """An annotation as a reader would write it."""
    return str(annotation.__name__ if isinstance(annotation, type) else annotation).replace("typing.", "")


def describe_all(passes: list[PassText]) -> str:
    """A line for each pass."""
    width = max((len(item.name) for item in passes), default=0)
    lines = [f"{item.name:{width}}  {item.contract.split(',')[0]:11}  {item.summary}" for item in passes]
    return "\n".join([*lines, "", "fxcompile passes NAME: options, contract and source of one"])


@dataclass(frozen=True)
class LayerText:
    """One node of a program: the layer or function, its output, and what it costs."""

    name: str
    kind: str
    shape: list[int]
    dtype: str
    cost: Cost


@dataclass(frozen=True)
class ProgramText:
    """A program, node by node."""

    inputs: list[dict[str, Any]]
    outputs: list[str]
    layers: list[LayerText]
    total: Cost
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def text(self) -> str:
        """A table."""
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="")
        for title in ("layer", "kind", "output", "params", "MACs", "bytes"):
            table.add_column(
                title, justify="left" if title in ("layer", "kind", "output") else "right", overflow="fold"
            )
        for item in self.layers:
            shape = "x".join(map(str, item.shape)) + ("" if item.dtype == "float32" else f" {item.dtype}")
            table.add_row(item.name, item.kind, shape, *(short(count) if count else "" for count in
                          (item.cost.parameters, item.cost.macs, item.cost.bytes)))  # fmt: skip
        table.add_row("total", "", "", short(self.total.parameters), short(self.total.macs), short(self.total.bytes))
        buffer = io.StringIO()
        Console(file=buffer, width=120, color_system=None, markup=False, emoji=False).print(table, highlight=False)
        lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
        lines += [f"input {item['name']}: {'x'.join(map(str, item['shape']))} {item['dtype']}" for item in self.inputs]
        lines.append("MACs are for one sample; a tensor that several layers share counts once in the total")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def describe_program(program: Program) -> ProgramText:
    """Layers, shapes, parameters, multiply-accumulates and bytes of a program."""
    from fxcompile.rewriting import describe_layer

    batch = samples(program)
    layers = []
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        layer = program.layer(node)
        kind = describe_layer(layer) if layer is not None else getattr(node.target, "__name__", str(node.target))
        dtype = str(dtype_of(node)).removeprefix("torch.")
        name = str(node.target) if layer is not None else node.name
        cost = nodes_cost(program.module, [node], batch)
        layers.append(LayerText(name, kind, list(shape_of(node) or []), dtype, cost))
    inputs = []
    for spec in program.inputs:
        shape: list[int | str] = ["batch" if axis == spec.batch_axis else size for axis, size in enumerate(spec.shape)]
        inputs.append({"name": spec.name, "shape": shape, "dtype": str(spec.dtype).removeprefix("torch.")})
    return ProgramText(inputs, list(program.output_names), layers, program_cost(program), list(program.notes))
