"""Calibration data that is read, and data that is refused, in one sentence: what was found and what is wanted."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import MARKER, Touch, npy, npz, saved
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fxcompile.calibration import Calibration, as_calibration, read_calibration
from fxcompile.errors import CalibrationError
from fxcompile.program import InputSpec

IMAGE = InputSpec("image", (2, 3, 8, 6), torch.float32)
GREY = InputSpec("image", (2, 1, 4, 4), torch.float32)
IDS = InputSpec("ids", (2, 5), torch.int64)
PAIR = (IMAGE, IDS)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def images(count: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 8, 6)).astype("f4")


def ids(count: int = 5) -> np.ndarray:
    return np.arange(count * 5).reshape(count, 5)


def checked(error: pytest.ExceptionInfo[CalibrationError], words: str) -> None:
    sentence = str(error.value)
    assert type(error.value) is CalibrationError
    assert "\n" not in sentence
    assert len(sentence) < 500
    for word in words.split("|"):
        assert word in sentence
    assert not Path(MARKER).exists(), "the file's code ran"


def picture(path: str, size: tuple[int, int] = (12, 10), mode: str = "RGB", value: Any = (255, 0, 51)) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


# what is read


@pytest.mark.parametrize(
    "name", ["a.npz", "packed.npz", "a.npy", "a.pt", "a.pth", "dict.pt", "list.pt", "a.safetensors"]
)
def test_every_kind_of_file_gives_the_same_samples(name: str) -> None:
    array = images()
    tensor = torch.from_numpy(array)
    if name == "packed.npz":
        np.savez_compressed(name, image=array)
    elif name.endswith(".npz"):
        np.savez(name, image=array, labels=np.arange(5))
    elif name.endswith(".npy"):
        np.save(name, array)
    elif name.endswith(".safetensors"):
        save_file({"image": tensor}, name)
    else:
        torch.save(
            {"dict.pt": {"image": tensor, "labels": torch.arange(5)}, "list.pt": [tensor]}.get(name, tensor), name
        )
    data = read_calibration(Path(name), [IMAGE])
    assert len(data) == 5
    batches = list(data.batches(2))
    assert [batch[0].shape[0] for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([batch[0] for batch in batches]), tensor)


def test_arrays_are_matched_by_name_in_the_order_of_the_inputs() -> None:
    np.savez("a.npz", ids=ids(), image=images())
    (batch,) = read_calibration(Path("a.npz"), PAIR).batches()
    assert [tuple(tensor.shape) for tensor in batch] == [(5, 3, 8, 6), (5, 5)]


def test_arrays_of_other_names_are_matched_by_shape_where_that_is_clear() -> None:
    np.savez("a.npz", x=images(), tokens=ids(), labels=np.arange(5))
    data = read_calibration(Path("a.npz"), PAIR)
    assert data.tensors["image"].shape == (5, 3, 8, 6)
    assert torch.equal(data.tensors["ids"], torch.from_numpy(ids()))


def test_doubles_are_rounded_to_the_models_floats() -> None:
    np.save("a.npy", images().astype("f8"))
    (batch,) = read_calibration(Path("a.npy"), [IMAGE]).batches()
    assert batch[0].dtype == torch.float32
    assert torch.equal(batch[0], torch.from_numpy(images()))


def test_other_integers_go_where_integers_are_wanted() -> None:
    np.save("a.npy", ids().astype("i4"))
    (batch,) = read_calibration(Path("a.npy"), [IDS]).batches()
    assert batch[0].dtype == torch.int64


def test_free_axes_may_have_another_size() -> None:
    spec = InputSpec("image", (2, 3, 8, 6), torch.float32, dynamic_axes=frozenset({2, 3}))
    assert len(as_calibration(torch.zeros(4, 3, 20, 30), [spec])) == 4


def test_images_are_sorted_resized_scaled_and_normalised() -> None:
    picture("set/b/2.jpg", value=(0, 0, 0))
    picture("set/a/1.png", size=(3, 30))
    picture("set/c.webp", mode="RGBA", value=(255, 255, 255, 255))
    Path("set/notes.txt").write_text("not an image")
    data = read_calibration(Path("set"), [IMAGE], image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.25, 0.5))
    values = data.tensors["image"]
    assert values.shape == (3, 3, 8, 6)
    torch.testing.assert_close(values[0, :, 4, 3], torch.tensor([1.0, -2.0, -0.6]))
    torch.testing.assert_close(values[1, :, 0, 0], torch.tensor([-1.0, -2.0, -1.0]))
    torch.testing.assert_close(values[2, :, 0, 0], torch.tensor([1.0, 2.0, 1.0]), atol=0.02, rtol=0)


def test_colour_becomes_grey_and_grey_colour() -> None:
    picture("set/a.png", mode="L", value=51)
    assert torch.allclose(read_calibration(Path("set"), [IMAGE]).tensors["image"], torch.tensor(0.2))
    assert read_calibration(Path("set"), [GREY]).tensors["image"].shape == (1, 1, 4, 4)


def test_deep_grey_images_keep_their_range() -> None:
    Path("set").mkdir()
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save("set/deep.png")
    assert torch.allclose(read_calibration(Path("set"), [GREY]).tensors["image"], torch.tensor(0.5), atol=0.01)


def test_split_keeps_every_sample_once_and_follows_the_seed() -> None:
    data = as_calibration(torch.arange(40.0).view(40, 1), [InputSpec("x", (1, 1), torch.float32)])
    fit, held = data.split(0.25, seed=3)
    assert (len(fit), len(held)) == (30, 10)
    assert sorted([*fit.tensors["x"].flatten().tolist(), *held.tensors["x"].flatten().tolist()]) == list(range(40))
    assert torch.equal(held.tensors["x"], data.split(0.25, seed=3)[1].tensors["x"])
    assert not torch.equal(held.tensors["x"], data.split(0.25, seed=4)[1].tensors["x"])


def test_split_leaves_neither_part_empty() -> None:
    spec = InputSpec("x", (1, 1), torch.float32)
    one = as_calibration(torch.ones(1, 1), [spec])
    assert [len(part) for part in one.split()] == [1, 1]
    two = as_calibration(torch.ones(2, 1), [spec])
    for share in (0.0, 0.25, 1.0):
        assert [len(part) for part in two.split(share)] == [1, 1]


def test_limit_is_evenly_spaced() -> None:
    data = as_calibration(torch.arange(101.0).view(101, 1), [InputSpec("x", (1, 1), torch.float32)])
    assert data.limit(5).tensors["x"].flatten().tolist() == [0, 25, 50, 75, 100]
    assert len(data.limit(500)) == 101
    assert len(data.limit(1)) == 1


def test_python_objects_of_every_form_give_the_same_samples() -> None:
    tensor, numbers = torch.from_numpy(images()), torch.from_numpy(ids())
    loader = DataLoader(TensorDataset(tensor, torch.arange(5)), batch_size=2)
    forms: list[Any] = [tensor, images(), {"image": tensor}, [tensor[:2], tensor[2:]], [(tensor, numbers)], loader,
                        [{"image": tensor, "labels": numbers}], (part for part in (tensor[:1], tensor[1:])),
                        as_calibration(tensor, [IMAGE])]  # fmt: skip
    for form in forms:
        assert torch.equal(as_calibration(form, [IMAGE]).tensors["image"], tensor)
    pairs: list[Any] = [{"ids": numbers, "image": tensor}, [(tensor, numbers)], [{"image": tensor, "ids": numbers}]]
    for form in pairs:
        assert torch.equal(as_calibration(form, PAIR).tensors["ids"], numbers)


# files that are refused


def bomb() -> bytes:
    """A .npz whose header claims an exabyte."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (2**58,)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("image.npy", head.getvalue())
    return buffer.getvalue()


def touches() -> Any:
    return np.array([Touch()], dtype=object)


def with_value(value: float) -> np.ndarray:
    array = images()
    array[3, 1, 2, 3] = value
    return array


BAD_FILES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "empty": ("a.npz", lambda: b"", "empty"),
    "empty npy": ("a.npy", lambda: b"", "empty"),
    "text": ("a.npz", lambda: b"x,y\n1,2\n", "a.npz"),
    "text npy": ("a.npy", lambda: b"x,y\n1,2\n", "a.npy"),
    "text pt": ("a.pt", lambda: b"x,y\n1,2\n", "a.pt"),
    "csv": ("a.csv", lambda: b"x,y\n1,2\n", ".csv|.npz"),
    "no suffix": ("data", lambda: npz(image=images()), ".npz"),
    "truncated npz": ("a.npz", lambda: npz(image=images())[:-400], "truncated or damaged"),
    "truncated npy": ("a.npy", lambda: npy(images())[:-400], "truncated or damaged"),
    "truncated pt": ("a.pt", lambda: saved(torch.zeros(99))[:-400], "truncated or damaged"),
    "truncated safetensors": ("a.safetensors", lambda: (900).to_bytes(8, "little") + b'{"a"', "a.safetensors"),
    "damaged npz": ("a.npz", lambda: npz(image=images()).replace(b"NUMPY", b"NUMPI"), "a.npz"),
    "no arrays": ("a.npz", lambda: npz(), "no arrays"),
    "pickled npy": ("a.npy", lambda: npy(touches(), allow_pickle=True), "pickle"),
    "pickled npz": ("a.npz", lambda: npz(image=touches()), "pickle"),
    "bare pickle as npy": ("a.npy", lambda: pickle.dumps(Touch(), protocol=2), "pickle"),
    "pickled pt": ("a.pt", lambda: saved({"image": Touch()}), "pickle"),
    "bare pickle": ("a.pt", lambda: pickle.dumps(Touch(), protocol=2), "pickle"),
    "claimed size": ("a.npz", bomb, "a.npz"),
    "text array": ("a.npy", lambda: npy(np.array(["a", "b"])), "<U1"),
    "records": ("a.npy", lambda: npy(np.zeros(3, dtype=[("a", "f4"), ("b", "i4")])), "a.npy"),
    "pt of text": ("a.pt", lambda: saved("text"), "holds a str"),
    "pt of numbers": ("a.pt", lambda: saved([1, 2, 3]), "holds a list"),
    "one sample without its axis": ("a.npy", lambda: npy(images()[0]), "3x8x6|Nx3x8x6|axis"),
    "channels last": ("a.npy", lambda: npy(images().transpose(0, 2, 3, 1)), "5x8x6x3|Nx3x8x6|channels come last"),
    "other size": ("a.npy", lambda: npy(np.zeros((5, 3, 9, 9), "f4")), "5x3x9x9|Nx3x8x6"),
    "flat": ("a.npy", lambda: npy(np.zeros((5, 144), "f4")), "5x144|Nx3x8x6"),
    "scalar": ("a.npy", lambda: npy(np.float32(1)), "Nx3x8x6"),
    "no samples": ("a.npy", lambda: npy(images(0)), "no samples"),
    "bytes for floats": ("a.npy", lambda: npy(np.zeros((5, 3, 8, 6), "u1")), "uint8|float32|normalise"),
    "integers for floats": ("a.npy", lambda: npy(np.zeros((5, 3, 8, 6), "i8")), "int64|float32|normalise"),
    "complex": ("a.npy", lambda: npy(np.zeros((5, 3, 8, 6), "c8")), "complex64"),
    "NaN": ("a.npy", lambda: npy(with_value(np.nan)), "NaN"),
    "infinity": ("a.npz", lambda: npz(image=with_value(-np.inf)), "NaN or infinity"),
    "too large for float32": ("a.npy", lambda: npy(with_value(1).astype("f8") * 1e300), "infinity"),
    "inflated": ("a.pt", lambda: saved(torch.zeros(1, 1, 1, 1).expand(10**9, 3, 8, 6)), "a.pt"),
    "sparse": ("a.pt", lambda: saved(torch.zeros(5, 3, 8, 6).to_sparse()), "sparse"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(case: str) -> None:
    name, make, words = BAD_FILES[case]
    Path(name).write_bytes(make())
    with pytest.raises(CalibrationError) as error:
        read_calibration(Path(name), [IMAGE])
    checked(error, words)
    assert str(error.value).startswith(name)


BAD_PAIRS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "missing input": (lambda: {"image": images()}, "no array for input 'ids'"),
    "unequal numbers": (lambda: {"image": images(5), "ids": ids(4)}, "different numbers of samples|5|4"),
    "floats for integers": (lambda: {"image": images(), "ids": ids() + 0.5}, "'ids'|float64|integers"),
    "unknown names": (lambda: {"a": np.zeros(4), "b": np.zeros(3)}, "no array for input 'image'|Nx3x8x6|'a'"),
    "two that fit": (lambda: {"a": images(), "b": images(seed=1), "ids": ids()}, "input 'image'"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_arrays_that_do_not_fit_several_inputs_are_refused(case: str) -> None:
    make, words = BAD_PAIRS[case]
    np.savez("a.npz", **make())
    with pytest.raises(CalibrationError) as error:
        read_calibration(Path("a.npz"), PAIR)
    checked(error, words)


def test_paths_that_are_no_data_are_refused() -> None:
    os.mkfifo("pipe.npy")
    for name, words in (("missing.npz", "no such file"), ("pipe.npy", "regular file"), ("nul\0.npz", "npz")):
        with pytest.raises(CalibrationError) as error:
            read_calibration(Path(name), [IMAGE])
        checked(error, words)


def test_data_that_may_not_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    np.save("a.npy", images())

    def deny(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", deny)
    with pytest.raises(CalibrationError) as error:
        read_calibration(Path("a.npy"), [IMAGE])
    monkeypatch.undo()
    assert "may not be read" in str(error.value)


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", size).save(buffer, "png")
    return buffer.getvalue()


def noise() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3)).astype("u1")).save(buffer, "png")
    return buffer.getvalue()


BAD_FOLDERS: dict[str, tuple[dict[str, Callable[[], bytes]], tuple[InputSpec, ...], dict[str, Any], str]] = {
    "no images": ({"a.txt": lambda: b"hello"}, (IMAGE,), {}, "no images"),
    "no image": ({"a.png": lambda: b"hello"}, (IMAGE,), {}, "a.png"),
    "empty image": ({"a.png": lambda: b""}, (IMAGE,), {}, "a.png"),
    "truncated": ({"a.png": lambda: noise()[:2000]}, (IMAGE,), {}, "a.png"),
    "bomb": ({"a.png": lambda: png((20000, 20000))}, (IMAGE,), {}, "a.png|too large"),
    "several inputs": ({"a.png": lambda: png((4, 4))}, PAIR, {}, "one input"),
    "no picture": ({"a.png": lambda: png((4, 4))}, (IDS,), {}, "one input"),
    "two channels": ({"a.png": lambda: png((4, 4))}, (InputSpec("x", (1, 2, 4, 4), torch.float32),), {}, "Nx3xHxW"),
    "mean of three": ({"a.png": lambda: png((4, 4))}, (GREY,), {"image_mean": (1, 2, 3)}, "3 values|1 channel"),
    "deviation of zero": ({"a.png": lambda: png((4, 4))}, (GREY,), {"image_std": (0,)}, "positive"),
    "deviation of NaN": ({"a.png": lambda: png((4, 4))}, (GREY,), {"image_std": (float("nan"),)}, "NaN"),
    "mean of NaN": ({"a.png": lambda: png((4, 4))}, (GREY,), {"image_mean": (float("nan"),)}, "NaN"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_refused(case: str) -> None:
    files, specs, options, words = BAD_FOLDERS[case]
    Path("set").mkdir()
    for name, make in files.items():
        Path("set", name).write_bytes(make())
    with pytest.raises(CalibrationError) as error:
        read_calibration(Path("set"), specs, **options)
    checked(error, words)


def test_archives_that_unpack_to_far_more_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcompile.arrays._BOMB", 10_000)
    np.savez_compressed("a.npz", image=np.zeros((5000, 3, 8, 6), "f4"))
    with pytest.raises(CalibrationError) as error:
        read_calibration(Path("a.npz"), [IMAGE])
    checked(error, "zip bomb")


def test_mean_and_deviation_go_with_images_only() -> None:
    np.save("a.npy", images())
    with pytest.raises(CalibrationError) as error:
        read_calibration(Path("a.npy"), [IMAGE], image_mean=(0.5, 0.5, 0.5))
    checked(error, "--image-mean|folder of images")


ALIKE = tuple(InputSpec(name, (1, 3, 8, 6), torch.float32, 0) for name in ("left", "right"))

BAD_OBJECTS: dict[str, tuple[Callable[[], object], tuple[InputSpec, ...], str]] = {
    "nothing": (list, (IMAGE,), "no calibration batches"),
    "number": (lambda: 3, (IMAGE,), "int"),
    "text": (lambda: "images", (IMAGE,), "str"),
    "texts": (lambda: ["a", "b"], (IMAGE,), "numbers"),
    "nothings": (lambda: [None, None], (IMAGE,), "numbers"),
    "empty dict": (dict, (IMAGE,), "no arrays"),
    "empty tuples": (lambda: [()], (IMAGE,), "0 tensors"),
    "too few": (lambda: [(torch.zeros(1, 3, 8, 6),)], PAIR, "1 tensors|2 inputs"),
    "one tensor for two inputs": (lambda: torch.zeros(2, 3, 8, 6), PAIR, "'ids'"),
    "one tensor for two alike": (lambda: torch.zeros(2, 3, 8, 6), ALIKE, "no array for input 'left'"),
    "one name wrong of two alike": (lambda: {"lef": torch.zeros(2, 3, 8, 6)}, ALIKE, "no array for input 'left'"),
    "batches of one for two alike": (lambda: [torch.zeros(1, 3, 8, 6)] * 3, ALIKE, "no array for input 'left'"),
    "batches of other shapes": (lambda: [torch.zeros(1, 3, 8, 6), torch.zeros(1, 3, 9, 9)], (IMAGE,), "3x9x9"),
    "wrong dict": (lambda: {"other": torch.zeros(1, 3, 9, 9)}, (IMAGE,), "1x3x9x9|Nx3x8x6"),
    "objects": (lambda: np.array([object()]), (IMAGE,), "object"),
    "ragged": (lambda: {"image": [[1.0], [1.0, 2.0]]}, (IMAGE,), "no array"),
    "NaN in a batch": (lambda: [torch.full((1, 3, 8, 6), torch.nan)], (IMAGE,), "NaN"),
}


@pytest.mark.parametrize("case", BAD_OBJECTS)
def test_bad_objects_are_refused(case: str) -> None:
    make, specs, words = BAD_OBJECTS[case]
    with pytest.raises(CalibrationError) as error:
        as_calibration(make(), specs)
    checked(error, words)


def test_of_two_alike_a_single_misspelt_name_is_no_question() -> None:
    left, right = torch.rand(4, 3, 8, 6), torch.rand(4, 3, 8, 6)
    given = as_calibration({"lef": left, "right": right}, ALIKE)
    assert torch.equal(given.tensors["left"], left)
    assert torch.equal(given.tensors["right"], right)


def test_a_calibration_is_checked_against_other_inputs() -> None:
    data = Calibration((GREY,), {"image": torch.zeros(2, 1, 4, 4)})
    with pytest.raises(CalibrationError) as error:
        as_calibration(data, [IMAGE])
    checked(error, "2x1x4x4|Nx3x8x6")


def test_samples_are_not_tied_to_gradients() -> None:
    tensor: Tensor = torch.zeros(1, 3, 8, 6, requires_grad=True)
    assert not as_calibration(tensor, [IMAGE]).tensors["image"].requires_grad
