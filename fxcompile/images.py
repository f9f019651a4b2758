"""Reads a folder of images as calibration data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fxcompile.errors import CalibrationError
from fxcompile.memory import is_too_large
from fxcompile.program import InputSpec

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

_DEEP_FORMATS = ("PNG", "PPM")
"""Formats whose images of mode "I", 32-bit integers, hold 16-bit values."""


def read_images(
    folder: Path, specs: Sequence[InputSpec], mean: Sequence[float] | None, std: Sequence[float] | None
) -> Tensor:
    """All images below a folder, sorted by path, as torchvision's evaluation transforms give them.

    Each is resized, its sides in proportion, until it just covers the network's input, and the middle is cut out; then
    scaled to [0, 1], 16-bit grey too, and (x - mean) / std by channel. Hidden files are left out.

    Returns:
        [N, C, H, W] in float32, as the network's only input takes it.

    Raises:
        CalibrationError: the network does not take one batch of images, a file is no image, or they are too many.
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
    files = sorted(path for path in folder.rglob("*") if _is_image(path.relative_to(folder)) and not path.is_dir())
    if not files:
        raise CalibrationError("there are no images in the folder", place=place, mend="give .png or .jpg files")
    size = len(files) * channels * height * width * 4
    if is_too_large(size):
        raise CalibrationError(
            f"its {len(files)} images would take {size / 1e9:.0f} GB", place=place, mend="give a few hundred of them"
        )
    made = torch.empty((len(files), channels, height, width))
    for index, path in enumerate(files):
        made[index] = torch.from_numpy(_pixels(path, channels, (width, height)))
    return made.sub_(center).div_(scale)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _by_channel(option: str, values: Sequence[float] | None, channels: int, default: float) -> Tensor:
    if values is not None and len(values) != channels:
        raise CalibrationError(f"{option} has {len(values)} values for {channels} channels", mend="give one for each")
    return torch.tensor(values if values is not None else [default] * channels).view(-1, 1, 1)


def _pixels(path: Path, channels: int, size: tuple[int, int]) -> np.ndarray:
    """An image as [C, H, W] in [0, 1]."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                read, largest = _readable(image, channels)
                fitted = ImageOps.fit(read, size, Image.Resampling.BILINEAR)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise CalibrationError(
            f"it is no image, or a damaged one: {error}", place=str(path), mend="remove it"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise CalibrationError("the image is too large to decode safely", place=str(path), mend="shrink it") from None
    pixels = np.asarray(fitted, dtype=np.float32) / largest
    return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else np.broadcast_to(pixels, (channels, *pixels.shape))


def _readable(image: Image.Image, channels: int) -> tuple[Image.Image, int]:
    """An image in a mode that can be resized, and its value for white.

    Pillow's own conversion of deep grey to 8 bits clips at 255.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _DEEP_FORMATS):
        return Image.fromarray(np.asarray(image).astype(np.float32)), 65535
    if image.mode in ("I", "F"):
        raise CalibrationError(
            f"its pixels are 32-bit numbers ({image.mode}), whose white is not known",
            place=str(getattr(image, "filename", "")),
            mend="save 8 or 16 bits, or give arrays",
        )
    return image.convert("L" if channels == 1 else "RGB"), 255
