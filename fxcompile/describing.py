"""What `fxcompile passes` and `fxcompile show` print."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from fxcompile.contracts import Approximate
from fxcompile.cost import Cost, nodes_cost, program_cost, samples
from fxcompile.errors import PipelineError
from fxcompile.labels import describe_node, dtype_name, node_name
from fxcompile.options import wanted
from fxcompile.pipeline import format_value
from fxcompile.program import Program, dtype_of, shape_of
from fxcompile.registry import find_pass, pass_names
from fxcompile.rewriting import Pass
from fxcompile.tables import Row, short, table, wrapped


@dataclass(frozen=True)
class OptionText:
    """One option of a pass: the values it takes, in words, its default as pipeline text, and what it is."""

    name: str
    values: str
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

    def text(self, width: int = 120) -> str:
        """The whole description."""
        own = [item for item in self.options if item.name not in Pass.model_fields]
        shared = [item for item in self.options if item.name in Pass.model_fields]
        lines = [f"{self.name} ({self.contract})", "", self.documentation]
        for title, options in (("options:", own), ("options of every pass:", shared)):
            lines += ["", title] if options else []
            for item in options:
                lines.append(f"  {item.name}={item.default}")
                lines += wrapped(f"      {item.values}: {item.description}", width, "      ")
        return "\n".join([*lines, "", f"source: {self.source}"])


@dataclass(frozen=True)
class PassList:
    """All installed passes; `broken` are those whose package does not import, with the reason."""

    passes: list[PassText]
    broken: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def text(self, width: int = 120) -> str:
        """A line for each pass."""
        names = max((len(name) for name in (*self.broken, *(item.name for item in self.passes))), default=0)
        lines: list[str] = []
        for item in self.passes:
            contract = item.contract.partition(",")[0]
            lines += wrapped(f"{item.name:{names}}  {contract:11}  {item.summary}", width, " " * (names + 15))
        for name, reason in self.broken.items():
            lines += wrapped(f"{name:{names}}  {'broken':11}  {reason}", width, " " * (names + 15))
        return "\n".join([*lines, "", "fxcompile passes NAME: options, contract and source of one"])


def describe_all() -> PassList:
    """Everything that is installed."""
    passes: list[PassText] = []
    broken: dict[str, str] = {}
    for name in pass_names():
        try:
            passes.append(describe_pass(find_pass(name)))
        except PipelineError as error:
            broken[name] = str(error)
    return PassList(passes, broken)


def describe_pass(kind: type[Pass]) -> PassText:
    """Everything that a pass's class says of itself."""
    documentation = inspect.cleandoc(kind.__doc__ or "")
    contract = kind.contract.name.lower()
    if isinstance(kind.contract, Approximate) and kind.contract.exact_when:
        contract += f", exact when {kind.contract.exact_when}"
    options = [
        OptionText(name, wanted(info), format_value(info.get_default()), info.description or "")
        for name, info in kind.model_fields.items()
    ]
    source = f"{kind.__module__}.{kind.__qualname__}, {inspect.getsourcefile(kind)}"
    summary = inspect.cleandoc(inspect.getmodule(kind).__doc__ or documentation).splitlines()[0]
    return PassText(kind.name, contract, summary, documentation, source, options)


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

    def text(self, width: int = 120) -> str:
        """A table that is at most so many characters wide."""
        rows = [Row(item.name, item.kind, (_shape(item.shape, item.dtype), *_costs(item.cost))) for item in self.layers]
        rows.append(Row("total", "", ("", *_costs(self.total))))
        lines = table(Row("layer", "kind", ("output", "params", "MACs", "bytes")), rows, width)
        lines.append("")
        for item in self.inputs:
            lines.append(f"input {item['name']}: [{', '.join(map(str, item['shape']))}] {item['dtype']}")
        lines.append(f"outputs: {', '.join(self.outputs)}")
        lines += wrapped("MACs are for one sample; what several layers share counts once in the total", width, "")
        for note in self.notes:
            lines += wrapped(f"note: {note}", width, "      ")
        return "\n".join(lines)


def _shape(sizes: Iterable[int], dtype: str) -> str:
    text = "x".join(map(str, sizes)) or "scalar"
    return text if dtype == "float32" else f"{text} {dtype}"


def _costs(cost: Cost) -> tuple[str, str, str]:
    parameters, macs, size = (short(count) if count else "" for count in (cost.parameters, cost.macs, cost.bytes))
    return parameters, macs, size


def describe_program(program: Program) -> ProgramText:
    """Layers, shapes, parameters, multiply-accumulates and bytes of a program."""
    batch = samples(program)
    layers = []
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        dtype = dtype_name(dtype_of(node))
        cost = nodes_cost(program.module, [node], batch)
        layers.append(LayerText(node_name(node), describe_node(program, node), list(shape_of(node) or []), dtype, cost))
    inputs = []
    for spec in program.inputs:
        shape: list[int | str] = ["batch" if axis == spec.batch_axis else size for axis, size in enumerate(spec.shape)]
        inputs.append({"name": spec.name, "shape": shape, "dtype": dtype_name(spec.dtype)})
    return ProgramText(inputs, list(program.output_names), layers, program_cost(program), list(program.notes))
