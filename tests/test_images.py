"""A folder of images as calibration data: what torchvision's evaluation transforms would have given."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fxcompile import images
from fxcompile.errors import CalibrationError
from fxcompile.images import read_images
from fxcompile.program import InputSpec

COLOUR = InputSpec("image", (2, 3, 8, 8), torch.float32)
GREY = InputSpec("image", (2, 1, 8, 8), torch.float32)


def read(folder: Path, spec: InputSpec = GREY, **options: Any) -> torch.Tensor:
    return read_images(folder, [spec], options.get("mean"), options.get("std"))


def save(path: Path, pixels: np.ndarray, **options: Any) -> None:
    Image.fromarray(pixels).save(path, **options)


@pytest.mark.parametrize(("height", "width"), [(8, 16), (16, 8), (8, 8), (24, 40), (5, 9), (30, 12)])
def test_proportions_stay_and_the_middle_is_kept(tmp_path: Path, height: int, width: int) -> None:
    """Ramps along both axes: a resized ramp is a ramp, so each pixel says where in the image it was cut."""
    scale = min(height, width) / 8
    rows, columns = np.mgrid[:height, :width].astype("f4")
    ramp = 10_000 + 1000 * rows + 500 * columns
    save(tmp_path / "a.png", ramp.astype("u2"))
    given = read(tmp_path)[0, 0].numpy() * 65535
    wanted_rows = height / 2 + scale * (np.arange(8) - 3.5) - 0.5
    wanted_columns = width / 2 + scale * (np.arange(8) - 3.5) - 0.5
    wanted = 10_000 + 1000 * wanted_rows[:, None] + 500 * wanted_columns[None]
    inner = np.s_[2:-2, 2:-2]  # where the border of the image itself is not near
    twentieth_of_a_pixel = 0.05 * 1000 * scale  # the filter's weights are samples of its continuous form
    np.testing.assert_allclose(given[inner], wanted[inner], rtol=0, atol=twentieth_of_a_pixel)


def test_an_image_of_the_inputs_size_is_not_touched(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype("u1")
    save(tmp_path / "a.png", pixels)
    given = read(tmp_path, COLOUR)[0].numpy()
    np.testing.assert_array_equal(given, pixels.transpose(2, 0, 1).astype("f4") / 255)


def test_shrinking_averages_instead_of_picking(tmp_path: Path) -> None:
    """A fine checkerboard becomes grey; without a filter it would alias to black or white."""
    save(tmp_path / "a.png", (np.indices((64, 64)).sum(0) % 2 * 255).astype("u1"))
    assert torch.allclose(read(tmp_path), torch.tensor(0.5), atol=0.02)


@pytest.mark.parametrize("spec", [GREY, COLOUR])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_deep_grey_keeps_its_range(tmp_path: Path, spec: InputSpec, kind: str) -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype("u2")
    save(tmp_path / f"a.{kind.lower()}", values, format=kind)
    given = read(tmp_path, spec)
    assert given.shape == (1, spec.shape[1], 8, 8)
    for channel in given[0].numpy():
        np.testing.assert_allclose(channel, values / 65535, rtol=0, atol=1e-6)


def test_big_endian_deep_grey_is_read(tmp_path: Path) -> None:
    Image.frombytes("I;16B", (8, 8), np.full(64, 16384, ">u2").tobytes()).save(tmp_path / "a.tif")
    assert torch.allclose(read(tmp_path), torch.tensor(16384 / 65535))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_known_white_are_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (8, 8)).save(tmp_path / "a.tif")
    with pytest.raises(CalibrationError, match=r"a\.tif: its pixels are 32-bit numbers .*; save 8 or 16 bits"):
        read(tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_usual_mode_becomes_colour_and_grey(tmp_path: Path, mode: str) -> None:
    white = Image.new("RGB", (9, 9), (255, 255, 255)).convert(mode)
    white.save(tmp_path / "a.tif")
    for spec in (GREY, COLOUR):
        assert torch.equal(read(tmp_path, spec), torch.ones(1, spec.shape[1], 8, 8))


def test_mean_and_deviation_are_of_each_channel(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (51, 102, 255)).save(tmp_path / "a.png")
    given = read(tmp_path, COLOUR, mean=(0.1, 0.4, 0.5), std=(0.5, 0.25, 2.0))[0, :, 0, 0]
    torch.testing.assert_close(given, torch.tensor([0.2, 0.0, 0.25]), atol=1e-6, rtol=0)


def test_files_are_sorted_and_hidden_ones_left_out(tmp_path: Path) -> None:
    hidden = tmp_path / ".hidden"  # the folder's own place does not matter
    for index, name in enumerate(["b/1.png", "a.PNG", "a.jpg.png", "b/.thumbs/0.png", "._a.png", "b/.0.png"]):
        path = hidden / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * (index + 1)).save(path, format="PNG")
    (hidden / "folder.png").mkdir()
    assert [round(float(item.max()) * 255) for item in read(hidden)] == [20, 30, 10]


def test_more_than_fits_in_memory_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(b"not looked at")
    monkeypatch.setattr(images, "is_too_large", lambda size: size == 3 * 1 * 8 * 8 * 4)
    with pytest.raises(CalibrationError, match="its 3 images would take 0 GB; give a few hundred of them"):
        read(tmp_path)


def test_a_long_thin_image_is_read(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.full((1, 4000), 255, "u1"))
    assert torch.equal(read(tmp_path), torch.ones(1, 1, 8, 8))


def test_the_first_frame_of_an_animation_counts(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    frames = [Image.new("L", (8, 8), value) for value in (255, 0)]
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:])
    (tmp_path / "a.gif").write_bytes(buffer.getvalue())
    assert torch.equal(read(tmp_path), torch.ones(1, 1, 8, 8))
