"""Calibration data: samples of a model's real inputs, from files, folders of images, or Python objects."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxcompile.arrays import read_arrays
from fxcompile.errors import CalibrationError, named_line
from fxcompile.labels import dtype_name
from fxcompile.memory import is_inflated
from fxcompile.program import InputSpec


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

    def held_out_text(self, count: int) -> str:
        """What so many samples of the second part are, in words."""
        if len(self) == 1:
            return "the one calibration sample, which was fitted to as well"
        return f"{count} held-out calibration samples"

    def limit(self, samples: int) -> Calibration:
        """At most that many samples, evenly spaced."""
        if samples >= len(self):
            return self
        return self._take(torch.linspace(0, len(self) - 1, max(samples, 1)).round().long())

    def _take(self, index: Tensor) -> Calibration:
        return Calibration(self.specs, {name: tensor[index] for name, tensor in self.tensors.items()})


def as_calibration(data: object, specs: Sequence[InputSpec]) -> Calibration:
    """Calibration from Python objects.

    Args:
        data: a tensor or array, [N, ...]; a mapping of such by input name; or an iterable of batches, each a tensor, a
            tuple in the order of the inputs, or a mapping. For one input, the first of a tuple: (images, labels).

    Raises:
        CalibrationError: it does not fit the inputs.
    """
    if isinstance(data, Calibration):
        return fit_to_inputs(data.tensors, specs)
    if isinstance(data, (Tensor, np.ndarray)):
        return fit_to_inputs({"": data}, specs)
    if isinstance(data, Mapping):
        return fit_to_inputs(dict(data), specs)
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise CalibrationError(f"calibration data cannot be a {type(data).__name__}", mend="give tensors or batches")
    parts: dict[str, list[Tensor]] = {}
    for batch in data:
        for name, value in _named(batch, specs).items():
            parts.setdefault(name, []).append(_tensor(value))
    if not parts:
        raise CalibrationError("there are no calibration batches", mend="give at least one sample")
    for name, tensors in parts.items():
        other = next((item for item in tensors if item.shape[1:] != tensors[0].shape[1:] or not item.dim()), None)
        if other is not None:
            what = f"calibration batches for '{name}' are {_shape(tensors[0])} and {_shape(other)}"
            raise CalibrationError(f"{what}, which do not go together", mend="give samples of one shape, [N, ...]")
    joined = {name: torch.cat(tensors) for name, tensors in parts.items()}
    return fit_to_inputs(joined, specs)


def read_calibration(
    path: Path | str,
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
    path = Path(path)
    place = str(path)
    if path.is_dir():
        from fxcompile.images import read_images

        return fit_to_inputs({"": read_images(path, specs, image_mean, image_std)}, specs, place)
    if image_mean is not None or image_std is not None:
        raise CalibrationError(
            "--image-mean and --image-std are for a folder of images", place=place, mend="normalise the arrays instead"
        )
    return fit_to_inputs(read_arrays(path), specs, place)


def fit_to_inputs(arrays: Mapping[str, Any], specs: Sequence[InputSpec], place: str | None = None) -> Calibration:
    """Arrays matched to inputs, by name or else by shape, and checked.

    Raises:
        CalibrationError: an input has no array, or its array has another shape, no samples, or is not finite.
    """
    given = {name: _tensor(array, place) for name, array in arrays.items()}
    if not given:
        raise CalibrationError("it holds no arrays", place=place, mend="save an array for each input")
    tensors: dict[str, Tensor] = {}
    unnamed = [spec for spec in specs if spec.name not in given]
    for index, spec in enumerate(specs):
        tensor = given.get(spec.name)
        if tensor is None and set(given) == {str(number) for number in range(len(specs))}:
            tensor = given[str(index)]
        if tensor is None:
            near = [held for name, held in given.items() if name not in {item.name for item in specs}]
            fitting = [held for held in near if _misfit(held, spec) is None]
            near = fitting or near
            shared = len(near) == 1 and sum(_misfit(near[0], other) is None for other in unnamed) > 1
            if len(near) != 1 or (len(specs) > 1 and not fitting) or shared:
                shown = ", ".join(f"'{name}' {_shape(held)}" for name, held in given.items())
                raise CalibrationError(
                    f"there is no array for input '{spec.name}' {_wanted(spec)} among {shown}",
                    place=place,
                    mend="name the array like the input",
                )
            tensor = near[0]
        misfit = _misfit(tensor, spec)
        if misfit is not None:
            raise CalibrationError(misfit[0], place=place, mend=misfit[1])
        tensors[spec.name] = tensor
    counts = {name: tensor.shape[0] for name, tensor in tensors.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise CalibrationError(f"the inputs have different numbers of samples: {shown}", place=place, mend="align them")
    for spec in specs:
        tensor = tensors[spec.name]
        # Some rows at a time: the array may be memory-mapped and larger than memory.
        rows = tensor.split(256) if tensor.is_floating_point() else ()
        if not all(part.to(spec.dtype).isfinite().all() for part in rows):
            what = f"hold NaN or infinity in {dtype_name(spec.dtype)}"
            raise CalibrationError(f"the samples of '{spec.name}' {what}", place=place, mend="remove or rescale them")
    return Calibration(tuple(specs), tensors)


def _misfit(tensor: Tensor, spec: InputSpec) -> tuple[str, str] | None:
    """What is wrong with an array for an input, and the mend; None where it fits."""
    given, wanted = tuple(tensor.shape), spec.shape
    what = f"the array for '{spec.name}' is {_shape(tensor)} and {_wanted(spec)} is wanted"
    if given == wanted[1:] and len(wanted) > 1:
        return f"{what}: the sample axis is missing", "add an axis in front"
    if len(given) != len(wanted):
        return what, "give [samples, ...] as the model takes it"
    if given and given[0] == 0:
        return f"the array for '{spec.name}' has no samples", "give at least one"
    for axis in range(1, len(wanted)):
        if axis not in spec.dynamic_axes and given[axis] != wanted[axis]:
            if len(wanted) == 4 and (given[3], given[1], given[2]) == wanted[1:]:
                return f"{what}: its channels come last", "transpose it to [samples, channels, height, width]"
            return what, "resize the samples to what the model takes"
    floating = spec.dtype.is_floating_point
    if floating and not tensor.is_floating_point():
        return (
            f"the array for '{spec.name}' is {dtype_name(tensor.dtype)} and the input {dtype_name(spec.dtype)}",
            "scale and normalise it as for the model, then save it as float32",
        )
    if not floating and tensor.is_floating_point():
        what = f"the array for '{spec.name}' is {dtype_name(tensor.dtype)} and the input takes integers"
        return what, "save it as integers"
    return None


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _wanted(spec: InputSpec) -> str:
    return "x".join(["N", *map(str, spec.shape[1:])])


def _named(batch: Any, specs: Sequence[InputSpec]) -> dict[str, Any]:
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, (tuple, list)):
        if len(batch) < len(specs):
            raise CalibrationError(
                f"a calibration batch has {len(batch)} tensors and the network {len(specs)} inputs", mend="give all"
            )
        return dict(zip((spec.name for spec in specs), batch, strict=False))
    return {specs[0].name if len(specs) == 1 else "": batch}


def _tensor(value: Any, place: str | None = None) -> Tensor:
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise CalibrationError(
                "a tensor is sparse, quantized or without values", place=place, mend="give dense ones"
            )
        if is_inflated(value.numel(), value.untyped_storage().nbytes()):
            raise CalibrationError(
                f"a tensor claims {value.numel()} values and holds few", place=place, mend="save it again"
            )
        return value.detach().cpu()
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise CalibrationError(
            f"what is given is no array ({named_line(error)})", place=place, mend="give tensors"
        ) from None
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a memory-mapped array is read-only, and nothing writes to it
            return torch.from_numpy(array)
    except TypeError:
        raise CalibrationError(
            f"an array of {array.dtype} is no calibration data", place=place, mend="save numbers"
        ) from None
