"""Reads a folder of images as calibration data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fxcompile.calibration import InputSpec
from fxcompile.errors import CalibrationError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def read_images(
    folder: Path, specs: Sequence[InputSpec], mean: Sequence[float] | None, std: Sequence[float] | None
) -> Tensor:
    """All images below a folder, sorted by path: resized, scaled to [0, 1], then (x - mean) / std by channel.

    Returns:
        [N, C, H, W] in float32, as the network's only input takes it.

    Raises:
        CalibrationError: the network does not take one batch of images, or a file is no image.
    """
    place = str(folder)
    if len(specs) != 1 or len(specs[0].shape) != 4 or specs[0].shape[1] not in (1, 3):
        raise CalibrationError(
            "a folder of images is for networks with one input Nx3xHxW or Nx1xHxW", place=place, mend="give arrays"
        )
    _, channels, height, width = specs[0].shape
    center = _by_channel("--image-mean", mean, channels, 0.0)
    scale = _by_channel("--image-std", std, channels, 1.0)
    if (scale <= 0).any():
        raise CalibrationError("--image-std must be positive", mend="give the deviations of the training data")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise CalibrationError("there are no images in the folder", place=place, mend="give .png or .jpg files")
    made = torch.empty((len(files), channels, height, width))
    for index, path in enumerate(files):
        made[index] = torch.from_numpy(_pixels(path, channels, (width, height)))
    return made.sub_(center).div_(scale)


def _by_channel(option: str, values: Sequence[float] | None, channels: int, default: float) -> Tensor:
    if values is not None and len(values) != channels:
        raise CalibrationError(f"{option} has {len(values)} values for {channels} channels", mend="give one for each")
    return torch.tensor(values if values is not None else [default] * channels).view(-1, 1, 1)


def _pixels(path: Path, channels: int, size: tuple[int, int]) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                resized = image.convert("L" if channels == 1 else "RGB").resize(size, Image.Resampling.BILINEAR)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise CalibrationError(
            f"it is no image, or a damaged one: {error}", place=str(path), mend="remove it"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise CalibrationError("the image is too large to decode safely", place=str(path), mend="shrink it") from None
    pixels = np.asarray(resized, dtype=np.float32) / 255
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
