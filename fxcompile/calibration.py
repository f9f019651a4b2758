"""Calibration data: samples of a model's real inputs, from files, folders of images, or Python objects."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxcompile.errors import CalibrationError

ARRAY_SUFFIXES = (".npz", ".npy", ".pt", ".pth", ".safetensors")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class InputSpec:
    """One input of a program.

    Attributes:
        name: as the model's forward has it.
        shape: of the example, with the batch axis.
        batch_axis: the axis over which any number of samples may lie; None where the batch is fixed.
        dynamic_axes: further axes whose size may differ from the example's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    batch_axis: int | None = 0
    dynamic_axes: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Calibration:
    """Samples for all inputs; row i of every tensor belongs to sample i.

    Attributes:
        specs: the inputs, in the order in which batches give them.
        tensors: for each input by name, [N, ...].
    """

    specs: tuple[InputSpec, ...]
    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def batches(self, size: int = 32) -> Iterator[tuple[Tensor, ...]]:
        """Batches of at most `size` samples, a tensor for each input in the inputs' dtypes."""
        for start in range(0, len(self), size):
            yield tuple(self.tensors[spec.name][start : start + size].to(spec.dtype) for spec in self.specs)

    def split(self, held_out: float = 0.25, seed: int = 0) -> tuple[Calibration, Calibration]:
        """A part to fit to and a part to measure on, drawn by the seed; a single sample is both."""
        count = len(self)
        if count == 1:
            return self, self
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        held = min(max(round(count * held_out), 1), count - 1)
        return self._take(order[held:].sort().values), self._take(order[:held].sort().values)

    def limit(self, samples: int) -> Calibration:
        """At most that many samples, evenly spaced."""
        if samples >= len(self):
            return self
        return self._take(torch.linspace(0, len(self) - 1, max(samples, 1)).round().long())

    def _take(self, index: Tensor) -> Calibration:
        return Calibration(self.specs, {name: tensor[index] for name, tensor in self.tensors.items()})


def as_calibration(data: object, specs: Sequence[InputSpec]) -> Calibration:
    """Calibration from Python objects: a tensor, a mapping by input name, or an iterable of batches of either.

    Raises:
        CalibrationError: it does not fit the inputs.
    """
    if isinstance(data, Calibration):
        data = data.tensors
    if isinstance(data, (Tensor, np.ndarray)):
        return _checked({specs[0].name: data} if len(specs) == 1 else {"": data}, specs, None)
    if isinstance(data, Mapping):
        return _checked(dict(data), specs, None)
    if not isinstance(data, Iterable):
        raise CalibrationError(f"calibration data cannot be a {type(data).__name__}", mend="give tensors or batches")
    parts: dict[str, list[Tensor]] = {spec.name: [] for spec in specs}
    for batch in data:
        for name, value in _named_batch(batch, specs).items():
            parts[name].append(_tensor(value, None))
    if not all(parts.values()):
        raise CalibrationError("the calibration data has no batches", mend="give at least one sample")
    try:
        joined = {name: torch.cat(tensors) for name, tensors in parts.items()}
    except RuntimeError as error:
        raise CalibrationError(f"the batches have different shapes: {error}", mend="give one shape") from None
    return _checked(joined, specs, None)


def read_calibration(
    path: Path,
    specs: Sequence[InputSpec],
    *,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> Calibration:
    """Calibration from a file of arrays or a folder of images.

    Args:
        image_mean, image_std: by channel, for images scaled to [0, 1].

    Raises:
        CalibrationError: the file is missing or malformed, or does not fit the inputs.
    """
    raise NotImplementedError


def _named_batch(batch: Any, specs: Sequence[InputSpec]) -> dict[str, Any]:
    if isinstance(batch, Mapping):
        return {spec.name: batch[spec.name] for spec in specs}
    if isinstance(batch, (tuple, list)):
        return dict(zip((spec.name for spec in specs), batch, strict=False))
    return {specs[0].name: batch}


def _tensor(value: Any, place: str | None) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    return torch.from_numpy(np.asarray(value))


def _checked(data: Mapping[str, Any], specs: Sequence[InputSpec], place: str | None) -> Calibration:
    return Calibration(tuple(specs), {spec.name: _tensor(data[spec.name], place).to(spec.dtype) for spec in specs})


_ = zipfile
