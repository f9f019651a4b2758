"""What happened, for people and for machines: a row for every pass and, below it, every site."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fxcompile.cost import Cost
from fxcompile.tables import Row, short, table, wrapped

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
        layers: those that it changes, where they are more than the one that it is named after.
    """

    name: str
    outcome: Outcome
    change: str = ""
    error: float | None = None
    reason: str = ""
    before: Cost = field(default_factory=Cost)
    after: Cost = field(default_factory=Cost)
    seconds: float = 0.0
    layers: tuple[str, ...] = ()


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
class PackedReport:
    """Weights that the file holds in a compact form: how many, their bytes when dense, and those in the file."""

    weights: int = 0
    dense: int = 0
    bytes: int = 0


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
    packed: PackedReport = field(default_factory=PackedReport)


@dataclass
class Report:
    """A whole compilation.

    Attributes:
        notes: what had to be given up, a sentence each.
        amplified: the largest difference that verification let pass because the network amplifies rounding that far,
            relative to an output's largest value; 0 where it had to let none pass.
        seconds: time by stage, which adds up to the whole: reading, tracing, each pass under its name (finding sites,
            rewriting, fitting), analysis (costs, snapshots, checks of the graph), verification (of passes), export
            (`torch.onnx.export`), simplify, pack, write, check (`onnx.checker`), runtime (verification in ONNX
            Runtime).
    """

    model: str
    pipeline: str
    seed: int
    before: Cost
    after: Cost
    passes: list[PassReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    amplified: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    file: FileReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, in the documented JSON schema; what is not a finite number is null."""
        plain: dict[str, Any] = _finite({"schema": SCHEMA, **asdict(self)})
        return plain

    def text(self, width: int = 120) -> str:
        """The report as a table that is at most so many characters wide."""
        rows = []
        for item in self.passes:
            rows.append(Row(item.text, _pass_text(item), _cells(item)))
            for site in item.sites:
                change = site.reason if site.outcome != "kept" else site.change
                text = f"{site.outcome}: {change}" if site.outcome != "kept" else change
                cells = _cells(site) if site.outcome != "left" else ()
                rows.append(Row(f"  {site.name}", text, cells))
        total = ("", *_costs(self.before, self.after), _seconds(sum(self.seconds.values())))
        rows.append(Row("whole network", _savings(self.before, self.after), total))
        lines = table(Row("pass / site", "", ("error", "params", "MACs", "bytes", "s")), rows, width)
        stages = (f"{stage} {_seconds(seconds)} s" for stage, seconds in self.seconds.items())
        lines += wrapped(f"time: {', '.join(stages)}", width, "      ")
        notes = self.notes
        if self.amplified:
            notes = [
                *notes,
                f"rounding alone, amplified by the network, moves an output by {self.amplified:.1g} of its "
                "largest value on some input that was drawn; there it could not be held to less",
            ]
        for note in notes:
            lines += wrapped(f"note: {note}", width, "      ")
        if self.file is not None:
            lines += wrapped(_file_text(self.file), width, "  ")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def _pass_text(item: PassReport) -> str:
    parts = [f"{item.outcome}: {item.contract.lower()}"]
    kept = sum(site.outcome == "kept" for site in item.sites)
    parts.append(f"{kept} of {len(item.sites)} sites rewritten" if item.sites else "no sites")
    if item.examples:
        parts.append(f"verified on {item.examples} inputs")
    if item.error is not None and item.measured_on:
        parts.append(f"error on {item.measured_on}")
    if item.reason:
        parts.append(item.reason)
    return ", ".join(parts)


def _file_text(file: FileReport) -> str:
    agrees = f"ONNX Runtime agrees to {file.error:.1e} on {file.examples} inputs"
    return (
        f"{file.path}: {file.bytes:,} bytes, {file.nodes} nodes, opset {file.opset}, "
        f"{agrees if file.examples else 'not held against ONNX Runtime'}{_packed_text(file.packed)}"
    )


def _packed_text(packed: PackedReport) -> str:
    if not packed.weights:
        return ""
    what = "weight takes" if packed.weights == 1 else "weights take"
    return f"; {packed.weights} {what} {packed.bytes:,} bytes of it packed, instead of {packed.dense:,}"


def _cells(item: PassReport | SiteReport) -> tuple[str, ...]:
    error = "" if item.error is None else f"{item.error:.3g}"
    return (error, *_costs(item.before, item.after), _seconds(item.seconds))


def _costs(before: Cost, after: Cost) -> tuple[str, str, str]:
    return (
        _change(before.parameters, after.parameters),
        _change(before.macs, after.macs),
        _change(before.bytes, after.bytes),
    )


def _change(before: int, after: int) -> str:
    old, new = short(before), short(after)
    return old if old == new else f"{old} > {new}"


def _savings(before: Cost, after: Cost) -> str:
    """By how much the network shrank, or grew."""
    changes = (
        (name, 1 - getattr(after, key) / getattr(before, key))
        for name, key in (("parameters", "parameters"), ("MACs", "macs"), ("bytes", "bytes"))
        if getattr(before, key) != getattr(after, key) and getattr(before, key)
    )
    return ", ".join(f"{abs(share):.1%} {'fewer' if share > 0 else 'more'} {name}" for name, share in changes)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
