"""What happened, for people and for machines: a row for every pass and, below it, every site."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fxcompile.cost import Cost

Outcome = Literal["kept", "left", "rolled back"]

SCHEMA = 1
"""Version of the JSON report; README.md documents the schema."""


@dataclass
class SiteReport:
    """One site of one pass.

    Attributes:
        name: the layer's name.
        outcome: kept; left as it was (`reason` says why); or rolled back after a broken contract.
        change: what was replaced by what.
        error: relative L2 error of the site's output against the original model's on held-out data; None where the
            site is exact or was not measured.
        before, after: cost of the site's layers.
        seconds: time spent on rewriting, fitting and checking it.
    """

    name: str
    outcome: Outcome
    change: str = ""
    error: float | None = None
    reason: str = ""
    before: Cost = field(default_factory=Cost)
    after: Cost = field(default_factory=Cost)
    seconds: float = 0.0


@dataclass
class PassReport:
    """One pass of the pipeline.

    Attributes:
        text: the pass with its options, as pipeline text.
        contract: Exact, Approximate or Trained.
        outcome: kept; left (no site was rewritten); or rolled back.
        error: relative L2 error of the model's outputs against the original's after this pass; None for exact passes.
        measured_on: what that error, and the sites', was measured on.
        examples: how many drawn inputs it was verified on.
    """

    text: str
    contract: str
    outcome: Outcome = "kept"
    reason: str = ""
    error: float | None = None
    measured_on: str = ""
    examples: int = 0
    before: Cost = field(default_factory=Cost)
    after: Cost = field(default_factory=Cost)
    seconds: float = 0.0
    sites: list[SiteReport] = field(default_factory=list)


@dataclass
class FileReport:
    """The file written: its size, how far ONNX Runtime is from the program, and what the network's inputs are."""

    path: str
    bytes: int
    nodes: int
    opset: int
    error: float
    examples: int
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]


@dataclass
class Report:
    """A whole compilation.

    Attributes:
        notes: what had to be given up, a sentence each.
        seconds: time by stage, which adds up to the whole: reading, tracing, each pass under its name (finding sites,
            rewriting, fitting), analysis (costs, snapshots, checks of the graph), verification (of passes), export
            (`torch.onnx.export`), simplify, write, check (`onnx.checker`), runtime (verification in ONNX Runtime).
    """

    model: str
    pipeline: str
    seed: int
    before: Cost
    after: Cost
    passes: list[PassReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    file: FileReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, in the documented JSON schema."""
        return {"schema": SCHEMA, **asdict(self)}

    def text(self, width: int = 120) -> str:
        """The report as a table."""
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="")
        for title, side in (("pass / site", "left"), ("", "left"), ("what", "left"), ("error", "right"),
                            ("params", "right"), ("MACs", "right"), ("bytes", "right"), ("s", "right")):  # fmt: skip
            table.add_column(title, justify=side, overflow="fold", no_wrap=side == "right")  # type: ignore[arg-type]
        for item in self.passes:
            what = item.reason or f"{item.contract.lower()}, {_count(item.sites)}"
            if item.examples:
                what += f", verified on {item.examples} inputs"
            if item.error is not None and item.measured_on:
                what += f", error on {item.measured_on}"
            table.add_row(item.text, item.outcome, what, _error(item.error), *_costs(item.before, item.after),
                          f"{item.seconds:.1f}")  # fmt: skip
            for site in item.sites:
                table.add_row(f"  {site.name}", site.outcome, site.reason or site.change, _error(site.error),
                              *(("", "", "") if site.outcome == "left" else _costs(site.before, site.after)),
                              f"{site.seconds:.1f}")  # fmt: skip
        table.add_row(
            "whole network", "", "", "", *_costs(self.before, self.after), f"{sum(self.seconds.values()):.1f}"
        )
        buffer = io.StringIO()
        console = Console(file=buffer, width=width, color_system=None, legacy_windows=False, emoji=False, markup=False)
        console.print(table, highlight=False)
        lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
        lines += [f"note: {note}" for note in self.notes]
        if self.file is not None:
            lines.append(
                f"{self.file.path}: {self.file.bytes:,} bytes, {self.file.nodes} nodes, opset {self.file.opset}, "
                f"ONNX Runtime agrees to {self.file.error:.1e} on {self.file.examples} inputs"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def _count(sites: list[SiteReport]) -> str:
    kept = sum(site.outcome == "kept" for site in sites)
    return f"{kept} of {len(sites)} sites rewritten" if sites else "no sites"


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.3g}"


def _costs(before: Cost, after: Cost) -> tuple[str, str, str]:
    return (
        _change(before.parameters, after.parameters),
        _change(before.macs, after.macs),
        _change(before.bytes, after.bytes),
    )


def _change(before: int, after: int) -> str:
    return short(before) if before == after else f"{short(before)} > {short(after)}"


def short(number: int) -> str:
    """A count in at most five characters: 512, 28.7k, 1.82M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return str(number)
