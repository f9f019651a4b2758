"""Measure what compiling costs: growth with layers, against the exporter, memory, and fits. See tools/bench.

Each network is compiled by the fxcompile command in a process of its own; times of stages come from its JSON report,
the peak of memory from the operating system.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from networks import SIZE, UNITS, features, network, resnet152, single
from rich.console import Console
from rich.table import Table
from verdict import finish

TOOLS = Path(__file__).parent
EXACT = "fold-batchnorm, eliminate-identity"
PIPELINE = f"{EXACT}, stack-kernels"
SIZES = (100, 1000, 5000)
GROWING = ("fold-batchnorm", "eliminate-identity", "stack-kernels", "analysis")
"""Stages that may grow no faster than n log n."""
MARGIN = 1.5
"""What noise may add to the growth of one stage between two sizes, each measured once."""
SHORT = 0.05
"""Seconds below which a stage's growth says nothing."""
TIMES_THE_MODEL = 4
REPEATS = 3
"""Compilations of the network that is held against the exporter: the one of the middle ratio counts."""

SECTIONS = ("growth", "export", "refit")
REFITS = (("bottleneck", 512, 3), ("group-shuffle", 512, 3), ("split-kernels", 512, 3), ("stack-kernels", 184, 5))
"""Passes, and the channels and kernel of the layer that each is timed on: the largest Gram matrix that one is made for,
of about 4608 x 4608."""
MAPS = (7, 14)
IMAGES = 256
REFIT_SECONDS, REFIT_BYTES = 20, 2e9
"""What fitting a layer may take, on two cores, and above what importing torch does."""


@dataclass
class Run:
    """One compilation.

    Attributes:
        name: of the network.
        layers: how many it has.
        model_bytes: of its weights in the file.
        peak_bytes: the most memory that the process held.
        seconds: time by stage, from the report.
    """

    name: str
    layers: int
    model_bytes: int
    peak_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def export(self) -> float:
        return self.seconds["export"]

    @property
    def ratio(self) -> float:
        """What all but the exporter takes, beside the exporter."""
        return (self.total - self.export) / self.export


def peak_of(command: list[str]) -> int:
    """Run a command to its end; the most memory it held, in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: exit code {process.returncode} of: {' '.join(command)}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def python(code: str) -> list[str]:
    """The command that runs Python code."""
    return [sys.executable, "-c", code]


def compiled(name: str, made: torch.nn.Module, factory: str, shape: str, passes: str, folder: Path, *extra: str) -> Run:
    """Write a network's weights, compile them with the command, and read its report."""
    weights, report = folder / f"{name}.pt", folder / f"{name}.json"
    torch.save(made.state_dict(), weights)
    source = folder / "factory.py"
    source.write_text(
        f"import sys\nsys.path.insert(0, {str(TOOLS)!r})\nfrom networks import *\n\ndef make():\n    return {factory}\n"
    )
    arguments = [str(weights), "--model", f"{source}:make", "--input-shape", shape, "--passes", passes,
                 "-o", str(folder / f"{name}.onnx"), "--report", str(report), "--quiet", *extra]  # fmt: skip
    layers = sum(1 for module in made.modules() if not any(True for _ in module.children()))
    size = weights.stat().st_size
    del made
    peak = peak_of([*python("from fxcompile.cli import main; main()"), *arguments])
    return Run(name, layers, size, peak, json.loads(report.read_text())["seconds"])


PLAIN = """
import sys, time
sys.path.insert(0, {tools!r})
import torch
from networks import *
model, example = {factory}.eval(), torch.zeros({shape})
started = time.perf_counter()
torch.onnx.export(model, (example,), dynamic_shapes=({{0: torch.export.Dim.DYNAMIC}},), verbose=False)
print(time.perf_counter() - started)
"""


def plain_export(factory: str, shape: tuple[int, ...]) -> float:
    """Seconds that torch.onnx.export takes for the unchanged network, in a process of its own."""
    command = python(PLAIN.format(tools=str(TOOLS), factory=factory, shape=shape))
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return float(printed.stdout.split()[-1])


def growth_faults(runs: list[Run]) -> list[str]:
    """Where a stage grows faster than n log n from one size to the next, a sentence each."""
    faults = []
    for small, large in pairwise(runs):
        allowed = MARGIN * large.layers * math.log(large.layers) / (small.layers * math.log(small.layers))
        for stage in GROWING:
            before, after = max(small.seconds.get(stage, 0.0), SHORT), large.seconds.get(stage, 0.0)
            if after > allowed * before:
                faults.append(
                    f"{stage} grows {after / before:.1f} times from {small.name} to {large.name}, "
                    f"n log n with a margin would be {allowed:.1f}"
                )
    return faults


def export_faults(run: Run) -> list[str]:
    """Whether all that is not the exporter's takes longer than the exporter."""
    rest = run.total - run.export
    return [] if run.ratio < 1 else [f"{run.name}: {rest:.1f} s beside {run.export:.1f} s of torch.onnx.export"]


def memory_faults(run: Run, base: int) -> list[str]:
    """Whether the process held too much."""
    limit = base + TIMES_THE_MODEL * run.model_bytes
    if run.peak_bytes < limit:
        return []
    return [f"{run.name}: {run.peak_bytes / 1e6:.0f} MB at the peak, the limit is {limit / 1e6:.0f} MB"]


def refit_faults(run: Run, base: int) -> list[str]:
    """Whether fitting one layer took too long or too much memory."""
    seconds, held = run.seconds[run.name.partition(" ")[0]], run.peak_bytes - base
    faults = []
    if seconds > REFIT_SECONDS:
        faults.append(f"{run.name}: {seconds:.1f} s, the goal is {REFIT_SECONDS} s")
    if held > REFIT_BYTES:
        faults.append(f"{run.name}: {held / 1e6:.0f} MB above importing torch, the goal is {REFIT_BYTES / 1e6:.0f} MB")
    return faults


def show(console: Console, runs: list[Run]) -> None:
    """A column for each run, a row for each stage."""
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("seconds")
    for run in runs:
        table.add_column(run.name, justify="right")
    for stage in dict.fromkeys(stage for run in runs for stage in run.seconds):
        table.add_row(stage, *(f"{run.seconds.get(stage, 0.0):.2f}" for run in runs))
    table.add_row("total", *(f"{run.total:.2f}" for run in runs))
    table.add_row("peak MB", *(f"{run.peak_bytes / 1e6:.0f}" for run in runs))
    console.print(table, highlight=False)
    console.print()


def growth(console: Console, folder: Path, sizes: tuple[int, ...]) -> tuple[list[Run], list[str]]:
    """Networks of several shapes, each at several sizes."""
    every, faults = [], []
    for shape in UNITS:
        runs = []
        for layers in sizes:
            made = network(shape, layers)
            code = f"network({shape!r}, {layers})"
            runs.append(compiled(f"{shape}-{layers}", made, code, f"2x3x{SIZE}x{SIZE}", PIPELINE, folder))
        show(console, runs)
        faults += growth_faults(runs)
        every += runs
    return every, faults


def export(console: Console, folder: Path, base: int) -> tuple[list[Run], list[str]]:
    """A ResNet-152 against the exporter, in time and in memory."""
    runs = [compiled("resnet-152", resnet152(), "resnet152()", "1x3x224x224", EXACT, folder) for _ in range(REPEATS)]
    plain = plain_export("resnet152()", (1, 3, 224, 224))
    show(console, runs)
    run = sorted(runs, key=lambda item: item.ratio)[REPEATS // 2]
    rest = run.total - run.export
    ratios = ", ".join(f"{item.ratio:.2f}" for item in runs)
    console.print(f"all but torch.onnx.export: {rest:.1f} s, {run.ratio:.2f} of what that takes (runs: {ratios})")
    console.print(
        f"torch.onnx.export of the unchanged network alone: {plain:.1f} s, the whole compilation {run.total:.1f} s"
    )
    held = (run.peak_bytes - base) / run.model_bytes
    size = run.model_bytes
    console.print(
        f"memory: import torch {base / 1e6:.0f} MB, above it {held:.2f} times the {size / 1e6:.0f} MB of the model"
    )
    return runs, export_faults(run) + memory_faults(run, base)


def refit(console: Console, folder: Path, base: int) -> tuple[list[Run], list[str]]:
    """Single layers fitted to calibration data."""
    runs = []
    for size in MAPS:
        for name, channels, kernel in REFITS:
            data = folder / "features.npy"
            np.save(data, features(IMAGES, channels, size).numpy())
            label = f"{name} {channels} {kernel}x{kernel} at {size}x{size}"
            shape, code = f"1x{channels}x{size}x{size}", f"single({channels}, {kernel})"
            run = compiled(label, single(channels, kernel), code, shape, name, folder, "--calibration", str(data))
            console.print(
                f"{label}: {run.seconds[name]:.1f} s, {(run.peak_bytes - base) / 1e6:.0f} MB above importing torch"
            )
            runs.append(run)
    return runs, [fault for run in runs for fault in refit_faults(run, base)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; by default all")
    parser.add_argument("--quick", action="store_true", help="up to 1,000 layers only")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    sections = options.sections or SECTIONS
    for section in sections:
        if section not in SECTIONS:
            parser.error(f"there is no section '{section}'; choose from {', '.join(SECTIONS)}")
    console, base = Console(), peak_of(python("import torch"))
    runs: list[Run] = []
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measured = []
        if "growth" in sections:
            measured.append(growth(console, folder, SIZES[:-1] if options.quick else SIZES))
        if "export" in sections:
            measured.append(export(console, folder, base))
        if "refit" in sections:
            measured.append(refit(console, folder, base))
    for made, missed in measured:
        runs += made
        faults += missed
    figures = {"import_torch_bytes": base, "runs": [asdict(item) for item in runs], "faults": faults}
    finish(console, figures, faults, options.json)


if __name__ == "__main__":
    main()
