"""Time and memory of a compilation, stage by stage: `tools/bench compiler`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.stages import Stage, Stages, count_compiler

PASSES = "fold-batchnorm, eliminate-identity, stack-kernels(rank=0.5)"
EXPORT = "emit/export/torch"
"""What the paths of `torch.onnx.export`, and of the `torch.export` that feeds it, start with."""

THEIRS = ("emit/export/torch", "emit/simplify/onnxsim", "emit/onnx checker")
"""Stages that are other people's code alone: shown, and not held to n log n."""

MARGIN = 1.3
"""How much more than n log n a time may grow before it counts: what measuring twice differs by."""

SHORTEST = 0.02
"""Seconds below which a stage is too short to tell how it grows."""

MODELS = 4
"""How many times the model's bytes may be in memory at once, beside torch."""


@dataclass
class Goal:
    """What was promised and what was measured; it is met where `measured <= allowed`."""

    name: str
    measured: float
    allowed: float
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.measured <= self.allowed


@dataclass
class Growth:
    """CPU seconds of a stage at each size; `ratio` is what they grow by beyond n log n from the second last size on."""

    stage: str
    seconds: list[float]
    ratio: float | None
    judged: bool


@click.command()
@click.option("--sizes", default="100,1000,5000", show_default=True, help="Layers of the networks to grow over.")
@click.option("--passes", default=PASSES, show_default=True, help="The pipeline.")
@click.option("--threads", default=1, show_default=True, help="Of torch: one is slower, and not upset by other work.")
@click.option("--repeat", default=1, show_default=True, help="Runs of the ResNet-152; times are their medians.")
@click.option("--only", type=click.Choice(["growth", "resnet"]), help="One part alone.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def compiler(sizes: str, passes: str, threads: int, repeat: int, only: str | None, as_json: bool) -> None:
    """Time and memory of every stage of a compilation, and how they grow with the network.

    Goals: passes and graph analysis grow no faster than n log n; compiling a ResNet-152, all that is not
    torch.onnx.export takes less time than torch.onnx.export does; peak memory stays under four times the model plus
    the import of torch. Exits with 1 if one is missed.
    """
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False, quiet=as_json)
    figures: dict[str, Any] = {"passes": passes, "threads": threads}
    goals: list[Goal] = []
    if only != "resnet":
        grown = measure_growth([int(size) for size in sizes.split(",")], passes, threads)
        figures["growth"] = {"sizes": sizes, "stages": [asdict(item) for item in grown]}
        goals += [Goal(f"growth of {item.stage}", item.ratio or 0.0, MARGIN, "x n log n") for item in grown if item.judged]
        console.print(growth_table(sizes.split(","), grown))
    if only != "growth":
        resnet = measure_resnet(passes, threads, repeat)
        figures["resnet"] = resnet.as_dict()
        goals += resnet.goals()
        console.print(resnet.table())
    figures["goals"] = [{**asdict(goal), "met": goal.met} for goal in goals]
    console.print(goal_table(goals))
    if as_json:
        click.echo(json.dumps(figures, indent=2))
    sys.exit(0 if all(goal.met for goal in goals) else 1)
