"""Measure what prune-filters costs, without any training, beside Torch-Pruning. See tools/bench pruning.

Every importance prunes two networks that read digits to three shares of their filters, with and without repair; so do
Torch-Pruning's data-free ones, as they are and with the batch norms' statistics taken anew on the same images.
Accuracy is that on held-out images, MACs are shares of the unchanged network's, latency is measured in ONNX Runtime
against it, the two in turn. Then both build the graph of what goes together in a DenseNet-201.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from compare import Data, latency
from compare import Network as Session
from digits import DigitsNet, digits_folder
from digits_resnet import resnet_digits
from fxcompile.passes.prune_filters import Importance
from networks import densenet201
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import nn
from variants import Subject, digits
from verdict import finish

import fxcompile as fxc
from fxcompile.channel_graph import ChannelGraph

RATIOS = (0.25, 0.5, 0.75)
NETWORK_WIDE = ("ratio={ratio}, scope=network", "saving={ratio}")
LOSS = 0.02
"""What may be lost of the accuracy with half of the filters gone, with repair and the default importance."""
GRAPH_SECONDS = 1.0
"""Within which the channel graph of a DenseNet-201 is built."""
BATCH = 64
SECONDS = 0.5
"""Time spent on each latency."""


@dataclass
class Row:
    """One way to prune one network: shares of the unchanged network's cost and time."""

    network: str
    tool: str
    way: str
    ratio: float
    repair: bool
    accuracy: float
    macs: float
    latency: float
    seconds: float

    @property
    def is_default(self) -> bool:
        """Whether it is prune-filters as it comes."""
        return self.tool == "fxcompile" and self.way == "least-squares" and self.repair


@dataclass
class Bench:
    """A network, and what is needed to measure what is made of it."""

    subject: Subject
    session: Session
    macs: int
    folder: Path

    def row(self, tool: str, way: str, ratio: float, repair: bool, result: fxc.Result, seconds: float) -> Row:
        """Measure a compiled network."""
        subject, path = self.subject, self.folder / "after.onnx"
        result.save_onnx(path)
        data = Data(result.program.inputs[0].name, subject.images.numpy(), subject.labels.numpy())
        timed = latency((self.session, Session(path, 1)), data, 1, SECONDS)
        accuracy = subject.accuracy(subject.outputs(result.module))
        share = result.record.after.macs / self.macs
        return Row(subject.name, tool, way, ratio, repair, accuracy, share, timed.after / timed.before, seconds)

    def ours(self, options: str, way: str, ratio: float, repair: bool) -> Row:
        """Pruned by this project; the batch norms are folded first, unless it is they who say which filters go."""
        program = fxc.trace(self.subject.model, (self.subject.images[:2],))
        text = f"prune-filters({options}{'' if repair else ', repair=false'})"
        text = f"{text}, fold-batchnorm" if way == "batch-norm" else f"fold-batchnorm, {text}"
        started = time.perf_counter()
        result = fxc.PassManager(text, calibration=self.subject.calibration, verify="off").run(program)
        return self.row("fxcompile", way, ratio, repair, result, time.perf_counter() - started)

    def theirs(self, way: str, importance: Any, ratio: float, repair: bool) -> Row:
        """Pruned by Torch-Pruning; `repair` takes the statistics of the batch norms anew."""
        import torch_pruning

        torch.manual_seed(0)  # its random importance has no generator of its own
        started = time.perf_counter()
        model = copy.deepcopy(self.subject.model)
        example = self.subject.images[:2]
        heads = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        torch_pruning.BasePruner(model, example, importance, pruning_ratio=ratio, ignored_layers=heads).step()
        if repair:
            renew_norms(model, self.subject)
        seconds = time.perf_counter() - started
        result = fxc.PassManager("fold-batchnorm", verify="off").run(fxc.trace(model, (example,)))
        return self.row("Torch-Pruning", way, ratio, repair, result, seconds)


def renew_norms(model: nn.Module, subject: Subject) -> None:
    """The statistics of all batch norms, from the calibration images."""
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    with torch.no_grad():
        for part in subject.calibration.split(BATCH):
            model(part)
    model.eval()


def their_importances() -> dict[str, Callable[[], Any]]:
    """Torch-Pruning's, that need no labels."""
    import torch_pruning

    found = torch_pruning.importance
    return {
        "l1": lambda: found.GroupMagnitudeImportance(p=1),
        "l2": lambda: found.GroupMagnitudeImportance(p=2),
        "batch-norm": found.BNScaleImportance,
        "geometric-median": found.FPGMImportance,
        "lamp": found.LAMPImportance,
        "random": found.RandomImportance,
    }


def trials(bench: Bench) -> Iterator[Callable[[], Row]]:
    """All ways at all ratios."""
    for ratio in RATIOS:
        for kind in get_args(Importance):
            for repair in (True, False):
                yield lambda k=kind, r=ratio, p=repair: bench.ours(f"ratio={r}, importance={k}", k, r, p)
        for options in NETWORK_WIDE:
            text = options.format(ratio=ratio)
            yield lambda t=text, r=ratio: bench.ours(t, t, r, True)
        for name, make in their_importances().items():
            for repair in (True, False):
                yield lambda n=name, m=make, r=ratio, p=repair: bench.theirs(n, m(), r, p)


def faults(rows: Sequence[Row], before: float) -> list[str]:
    """Where prune-filters as it comes loses too much, or is not ahead of the best of Torch-Pruning; a sentence each."""
    found = []
    for row in rows:
        if not row.is_default:
            continue
        if row.ratio == 0.5 and before - row.accuracy > LOSS + 1e-9:
            found.append(f"{row.network}: half of the filters cost {before - row.accuracy:.1%}, the goal is {LOSS:.0%}")
        others = [item for item in rows if item.tool != row.tool and item.ratio == row.ratio]
        best = max(others, key=lambda item: item.accuracy, default=None)
        if best is not None and best.accuracy >= row.accuracy:
            theirs = f"{best.accuracy:.1%} of {best.tool}, {best.way}"
            found.append(f"{row.network} at {row.ratio}: {row.accuracy:.1%} beside {theirs}")
    return found


def show(console: Console, subject: Subject, rows: Sequence[Row], before: float) -> None:
    """A line for each way, and in it what each ratio leaves, with repair and without."""
    title = f"{subject.name}: {before:.1%} of {len(subject.images):,} images right; accuracy, MACs, latency"
    table = Table(title=title, title_justify="left")
    for heading in ("", "repair", *map(str, RATIOS), "seconds"):
        table.add_column(heading, justify="right" if heading else "left")
    lines: dict[tuple[str, str, bool], list[Row]] = {}
    for row in rows:
        way = row.way.replace(f"={row.ratio}", "=*")
        lines.setdefault((row.tool, way, row.repair), []).append(row)
    for (tool, way, repair), own in lines.items():
        cells = {row.ratio: f"{row.accuracy:.1%} {row.macs:.2f} {row.latency:.2f}" for row in own}
        fixes = {"fxcompile": "yes", "Torch-Pruning": "norms"}[tool] if repair else "no"
        seconds = f"{sum(row.seconds for row in own) / len(own):.1f}"
        table.add_row(escape(f"{tool}: {way}"), fixes, *(cells.get(ratio, "") for ratio in RATIOS), seconds)
    console.print(table, highlight=False)


@dataclass
class Graphs:
    """Seconds to build the graph of what goes together in a DenseNet-201, all groups listed."""

    ours: float
    theirs: float
    groups: int


def graphs() -> Graphs:
    """Both in turn, the best of three."""
    import torch_pruning

    model, example = densenet201(), torch.randn(1, 3, 64, 64)
    program = fxc.trace(model, (example,))
    groups = len(ChannelGraph.of(program).groups)

    def all_groups() -> None:
        found = torch_pruning.DependencyGraph().build_dependency(model, example)
        list(found.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))

    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(3):
        for name, run in (("ours", lambda: ChannelGraph.of(program)), ("theirs", all_groups)):
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return Graphs(min(times["ours"]), min(times["theirs"]), groups)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench pruning", description=__doc__)
    parser.add_argument("sections", nargs="*", help="digits, resnet, graph: by default all")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    unknown = set(options.sections) - {"digits", "resnet", "graph"}
    if unknown:
        parser.error(f"there is no section {', '.join(sorted(unknown))}; choose from digits, resnet and graph")
    sections = options.sections or ["digits", "resnet", "graph"]
    torch.set_num_threads(1)  # a second thread is worth little on small maps, and costs much on a busy machine
    console, rows, missed = Console(width=None if sys.stdout.isatty() else 120), list[Row](), list[str]()
    built: Graphs | None = None
    if "graph" in sections:
        built = graphs()
        console.print(
            f"DenseNet-201: {built.groups} groups in {built.ours:.2f} s, Torch-Pruning {built.theirs:.2f} s: "
            f"{built.theirs / built.ours:.0f} times as long",
            highlight=False,
        )
        if built.ours > GRAPH_SECONDS:
            missed.append(
                f"the channel graph of a DenseNet-201 takes {built.ours:.2f} s, the goal is {GRAPH_SECONDS} s"
            )
    with tempfile.TemporaryDirectory() as scratch, Progress(console=Console(stderr=True), transient=True) as progress:
        for name in ("digits", "resnet"):
            if name not in sections:
                continue
            subject = digits()
            if name == "resnet":
                subject.name, subject.model = "ResNet-18", resnet_digits()
            else:  # Torch-Pruning follows no exported program
                subject.model = DigitsNet().eval()
                subject.model.load_state_dict(torch.load(digits_folder() / "digits_state.pt", weights_only=True))
            path = Path(scratch) / f"{name}.onnx"
            whole = fxc.PassManager("fold-batchnorm").run(fxc.trace(subject.model, (subject.images[:2],)))
            whole.save_onnx(path)
            bench = Bench(subject, Session(path, 1), whole.record.after.macs, Path(scratch))
            before, found = subject.accuracy(subject.outputs(subject.model)), list[Row]()
            for trial in progress.track(list(trials(bench)), description=subject.name):
                found.append(trial())
            show(console, subject, found, before)
            missed += faults(found, before)
            rows += found
    figures = {"rows": [asdict(row) for row in rows], "graph": None if built is None else asdict(built)}
    finish(console, figures, missed, options.json)


if __name__ == "__main__":
    main()
