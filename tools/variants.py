"""Measure what each way to make convolutions cheaper costs, without any training. See tools/bench variants.

Every style runs on two trained networks at three shares of the layers' multiply-accumulates, once from the weights
alone and once with calibration data. Errors and accuracy are those of the whole network on images that no fit has seen;
latency is measured against the unchanged network, the two in turn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from compare import Data, latency
from compare import Network as Session
from digits import digits_folder, files_of
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from verdict import finish

import fxcompile as fxc
from fxcompile.distance import distances
from fxcompile.program import flatten_tensors

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from zoo.pretrained import load_onet

FIRST = "fold-batchnorm, eliminate-identity"
SHARES = (0.75, 0.5, 0.35)
STYLES = (
    "split-kernels(rank={share})",
    "split-kernels(arrangement=parallel)",
    "split-kernels(arrangement=parallel, merge=concat)",
    "stack-kernels(rank={share})",
    "bottleneck(rank={share}, skip={heads})",
    "bottleneck(style=inception, rank={share}, skip={heads})",
    "bottleneck(style=cp, rank={share}, skip={heads})",
    "group-shuffle(rank={share})",
    "group-shuffle(style=depthwise, rank={share})",
    "group-shuffle(style=shuffle-unit, rank={share})",
    "group-shuffle(style=permuted, groups=2)",
    "reduce-grid(rank={share})",
    "factorize(saving={saving})",
)
"""Those without a share cost what their shape costs: they run once. Heads are left alone where it is the user who says
what to spend on each layer: ten classes do not come out of five channels.
"""
FACTORIZE_LOSS = 0.01
"""What `factorize` may lose of the accuracy on digits at half of the multiply-accumulates."""
NOISE = 1.02
"""A fit to some images may be that much farther on others than what the weights alone give, by chance."""
SECONDS = 1.0
"""Time spent on each latency."""


@dataclass
class Subject:
    """A trained network, images to fit to, and labelled ones to measure on.

    Attributes:
        heads: a list, as pipelines have it, of the layers that give the outputs.
        scores: which output has a score for each class.
    """

    name: str
    model: nn.Module
    calibration: Tensor
    images: Tensor
    labels: Tensor
    heads: str
    scores: int = 0

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """All outputs for all images."""
        with torch.no_grad():
            parts = [flatten_tensors(model(part)) for part in self.images.split(100)]
        return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]

    def accuracy(self, outputs: Sequence[Tensor]) -> float:
        return float((outputs[self.scores].argmax(1) == self.labels).double().mean())


@dataclass
class Row:
    """One style on one network: shares of the unchanged network's cost and time, errors of the worst output."""

    network: str
    style: str
    macs: float
    error_weights: float
    error_data: float
    accuracy: float
    latency: float
    seconds: float
    sites: int


def digits() -> Subject:
    """The demo's network, on the held-out fifth of its images."""
    folder = digits_folder()
    exported = torch.export.load(folder / "digits.pt2")
    with np.load(folder / "calibration.npz") as arrays:
        calibration = torch.from_numpy(arrays["image"])
    with np.load(folder / "evaluation.npz") as arrays:
        images, labels = torch.from_numpy(arrays["image"]), torch.from_numpy(arrays["labels"])
    return Subject("digits", exported.module(), calibration, images, labels, "[classify]")


def faces() -> Subject:
    """MTCNN's O-Net, on the 100 faces and 100 other crops of 25x25 pixels that scikit-image ships: half to fit to, half
    to measure on, each with its mirror image.
    """
    path = files_of("scikit-image", "skimage/data/lfw_subset.npy")
    crops: NDArray[np.float64] = np.load(path, allow_pickle=False)
    grey = torch.from_numpy(crops).float().unsqueeze(1)
    scaled = nn.functional.interpolate(grey, (48, 48), mode="bilinear", align_corners=False)
    images = ((scaled * 255 - 127.5) / 128).repeat(1, 3, 1, 1)
    labels = (torch.arange(len(images)) < len(images) // 2).long()
    model, _ = load_onet()
    fit, held = images[::2], images[1::2]
    fit, held = torch.cat([fit, fit.flip(3)]), torch.cat([held, held.flip(3)])
    return Subject("O-Net", model, fit, held, labels[1::2].repeat(2), "[dense6_*]", scores=2)


def pipelines(heads: str) -> Iterator[str]:
    """Every style at every share."""
    for style in STYLES:
        for share in SHARES if "{sha" in style or "{sav" in style else SHARES[:1]:
            yield style.format(share=share, saving=round(1 - share, 2), heads=heads)


def error(ours: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Relative L2 error of the worst output."""
    return max(item.value for item in distances([ours], [wanted]))


def measure(subject: Subject, text: str, folder: Path, before: Session, wanted: Sequence[Tensor]) -> Row:
    """Compile with and without data, and measure both."""
    program = fxc.trace(subject.model, (subject.images[:2],))
    name = program.inputs[0].name
    passes = f"{FIRST}, {text}"
    plain = fxc.PassManager(passes, verify="off").run(program)
    started = time.perf_counter()
    fitted = fxc.PassManager(passes, calibration=subject.calibration, verify="off").run(program)
    seconds = time.perf_counter() - started
    path = folder / "after.onnx"
    fitted.save_onnx(path)
    data = Data(name, subject.images.numpy(), subject.labels.numpy())
    timed = latency((before, Session(path, 1)), data, 1, SECONDS)
    ours, record = subject.outputs(fitted.module), fitted.record
    return Row(
        subject.name,
        text,
        record.after.macs / record.before.macs,
        error(subject.outputs(plain.module), wanted),
        error(ours, wanted),
        subject.accuracy(ours),
        timed.after / timed.before,
        seconds,
        sum(site.outcome == "kept" for site in record.passes[-1].sites),
    )


def faults(rows: Sequence[Row], before: float) -> list[str]:
    """Where data make it worse, or `factorize` loses too much, a sentence each."""
    found = [
        f"{row.network}, {row.style}: fitted to data it is farther ({row.error_data:.3f}) than without "
        f"({row.error_weights:.3f})"
        for row in rows
        if row.error_data > NOISE * row.error_weights
    ]
    for row in rows:
        if row.network == "digits" and row.style == "factorize(saving=0.5)" and before - row.accuracy > FACTORIZE_LOSS:
            found.append(f"factorize at half of the cost loses {before - row.accuracy:.1%} of the digits")
    return found


def show(console: Console, subject: Subject, rows: Sequence[Row], before: float) -> None:
    """A row for each style."""
    table = Table(title=f"{subject.name}: {before:.1%} of {len(subject.images):,} images right", title_justify="left")
    for title in ("", "MACs", "error, weights", "error, data", "accuracy", "latency", "seconds", "sites"):
        table.add_column(title, justify="left" if not title else "right")
    for row in rows:
        table.add_row(
            escape(row.style),
            f"{row.macs:.2f}",
            f"{row.error_weights:.3f}",
            f"{row.error_data:.3f}",
            f"{row.accuracy:.1%}",
            f"{row.latency:.2f}",
            f"{row.seconds:.1f}",
            str(row.sites),
        )
    console.print(table, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench variants", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    console, rows, missed = Console(width=None if sys.stdout.isatty() else 120), list[Row](), list[str]()
    with tempfile.TemporaryDirectory() as scratch, Progress(console=Console(stderr=True), transient=True) as progress:
        for subject in (digits(), faces()):
            path, wanted = Path(scratch) / f"{subject.name}.onnx", subject.outputs(subject.model)
            fxc.PassManager([]).run(fxc.trace(subject.model, (subject.images[:2],))).save_onnx(path)
            before, session, found = subject.accuracy(wanted), Session(path, 1), list[Row]()
            for text in progress.track(list(pipelines(subject.heads)), description=subject.name):
                found.append(measure(subject, text, Path(scratch), session, wanted))
            show(console, subject, found, before)
            missed += faults(found, before)
            rows += found
    finish(console, [asdict(row) for row in rows], missed, options.json)


if __name__ == "__main__":
    main()
