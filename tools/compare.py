"""Measure an ONNX file against the one it was made from: accuracy, multiply-accumulates, size, latency.

    python tools/compare.py BEFORE.onnx AFTER.onnx --data evaluation.npz --report report.json

Accuracy and latency are measured in ONNX Runtime on the CPU, the two files in turn, so that whatever else the machine
does slows both. Multiply-accumulates and parameters come from fxcompile's JSON report of AFTER. The exit code is 1,
with one line that says why, where accuracy falls by more than a point, or multiply-accumulates do not fall, or
latency does not fall clearly: by more than 2 % in the median pair of runs, three standard errors away.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

ALLOWED_LOSS = 0.01
FEWEST_PAIRS = 300
PLACEMENT = 0.02
"""A smaller gain than this is not counted: where a session's memory happens to lie can make as much."""
WARM_UP = 5


@dataclass
class Data:
    """Images under the name of the network's input, and their labels."""

    name: str
    images: NDArray[np.float32]
    labels: NDArray[np.int64]


class Network:
    """An ONNX file in ONNX Runtime."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path = path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, name: str, images: NDArray[np.float32]) -> NDArray[np.float32]:
        outputs: list[NDArray[np.float32]] = self.session.run(None, {name: images})
        return outputs[0]

    def accuracy(self, data: Data) -> float:
        right = 0
        for start in range(0, len(data.images), 100):
            part = slice(start, start + 100)
            right += int((self(data.name, data.images[part]).argmax(1) == data.labels[part]).sum())
        return right / len(data.images)

    def bytes(self) -> int:
        """Size on disk, with the weights that lie beside a large file."""
        beside = self.path.with_name(self.path.name + ".data")
        return self.path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


def read_data(path: Path) -> Data:
    with np.load(path) as arrays:
        names = [name for name in arrays.files if name != "labels"]
        if len(names) != 1 or "labels" not in arrays.files:
            raise ValueError(f"holds {arrays.files}; it needs 'labels' and one array named like the input")
        return Data(names[0], arrays[names[0]], arrays["labels"])


@dataclass
class Latency:
    """Median seconds of one run of each network, and AFTER : BEFORE, of which the median is surely below `at_most`."""

    before: float
    after: float
    pairs: int
    at_most: float


def latency(networks: tuple[Network, Network], data: Data, batch: int, seconds: float) -> Latency:
    """Both networks run in turn, each first in every other pair, for so many seconds."""
    images = np.ascontiguousarray(data.images[:batch])
    for network in networks * WARM_UP:
        network(data.name, images)
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < FEWEST_PAIRS:
        for which in (0, 1) if len(times[0]) % 2 else (1, 0):
            started = time.perf_counter()
            networks[which](data.name, images)
            times[which].append(time.perf_counter() - started)
    ratios = sorted(new / old for old, new in zip(*times, strict=True))
    # The rank of a median has the standard error sqrt(n) / 2, whatever the distribution.
    bound = ratios[math.ceil(len(ratios) / 2 + 1.5 * math.sqrt(len(ratios)))]
    return Latency(median(times[0]), median(times[1]), len(ratios), bound)


def compare(before: Network, after: Network, data: Data, report: dict[str, Any], options: argparse.Namespace) -> int:
    """Print the table; the exit code."""
    table = Table(title="before and after", title_justify="left", title_style="bold")
    table.add_column("measured")
    for title in (before.path.name, after.path.name, "change"):
        table.add_column(title, justify="right")
    faults: list[str] = []

    right = before.accuracy(data), after.accuracy(data)
    table.add_row(
        f"accuracy on {len(data.labels):,} held-out images",
        f"{right[0]:.1%}",
        f"{right[1]:.1%}",
        f"{(right[1] - right[0]) * 100:+.1f} points",
    )
    if right[0] - right[1] > ALLOWED_LOSS + 1e-9:
        faults.append(
            f"accuracy falls from {right[0]:.1%} to {right[1]:.1%}, by more than {ALLOWED_LOSS * 100:.0f} point"
        )

    def add(what: str, old: float, new: float, form: str = "{:,}") -> None:
        table.add_row(what, form.format(old), form.format(new), f"{new / old - 1:+.0%}")

    macs, parameters = ((report["before"][key], report["after"][key]) for key in ("macs", "parameters"))
    add("multiply-accumulates for one image", *macs)
    if macs[1] >= macs[0]:
        faults.append(f"multiply-accumulates do not fall ({macs[0]:,} before, {macs[1]:,} after)")
    add("parameters", *parameters)
    add("bytes on disk", before.bytes(), after.bytes())
    runs = []
    for batch in options.batch:
        timed = latency((before, after), data, batch, options.seconds)
        runs.append(f"{timed.pairs:,}")
        add(f"latency, batch {batch}", timed.before * 1e3, timed.after * 1e3, "{:.3f} ms")
        if timed.after >= timed.before or timed.at_most >= 1 - PLACEMENT:
            faults.append(
                f"latency at batch {batch} does not clearly fall ({timed.before * 1e3:.3f} ms before, "
                f"{timed.after * 1e3:.3f} ms after; the ratio may be {timed.at_most:.2f})"
            )
    table.caption = (
        f"ONNX Runtime {onnxruntime.__version__} on the CPU, intra_op threads: {options.threads}; "
        f"latency: median of {' and '.join(runs)} runs of each, in turn"
    )
    table.caption_justify = "left"
    Console(width=None if sys.stdout.isatty() else 100, highlight=False).print(table)
    if faults:
        print(f"error: {after.path.name} is no improvement: {'; '.join(faults)}", file=sys.stderr)
    return 1 if faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--data", type=Path, required=True, help=".npz: 'labels', and images under the input's name")
    parser.add_argument("--report", type=Path, required=True, help="fxcompile's JSON report of AFTER")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="batch sizes to time (default: 1 32)")
    parser.add_argument("--threads", type=int, default=1, help="intra_op threads of ONNX Runtime (default: 1)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on each batch size (default: 3)")
    options = parser.parse_args()
    path = options.data
    try:
        data = read_data(path)
        path = options.report
        report = json.loads(path.read_text(encoding="utf-8"))
        path = options.before
        before = Network(path, options.threads)
        path = options.after
        after = Network(path, options.threads)
    except Exception as error:  # ONNX Runtime has no common class of errors
        print(f"error: {path}: cannot be read ({str(error).splitlines()[0]}); run tools/demo again", file=sys.stderr)
        return 1
    return compare(before, after, data, report, options)


if __name__ == "__main__":
    sys.exit(main())
