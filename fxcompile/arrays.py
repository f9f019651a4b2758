"""Reads files of arrays: .npz, .npy, .pt and .safetensors, without running code that they hold."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fxcompile.errors import CalibrationError, named_line
from fxcompile.filekinds import open_regular

_BOMB = 2**30
"""Bytes from which on an archive that unpacks to 200 times its size is refused."""

ARRAY_SUFFIXES = (".npz", ".npy", ".pt", ".pth", ".safetensors")


def read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of a file by name, "" for the only one of a file that names none; large ones stay on disk.

    Raises:
        CalibrationError: the file is missing, malformed, of another kind, or holds pickled objects.
    """
    place = str(path)
    open_regular(path, CalibrationError).close()
    if path.suffix not in ARRAY_SUFFIXES:
        raise CalibrationError(
            f"'{path.suffix}' is no kind of calibration file", place=place, mend=f"give {', '.join(ARRAY_SUFFIXES)}"
        )
    try:
        return _read_arrays(path)
    except CalibrationError:
        raise
    except (OSError, ValueError, EOFError, RuntimeError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        pickled = any(word in str(error).lower() for word in ("pickle", "python objects"))
        reason = "it holds pickled objects" if pickled else "it is truncated or damaged"
        raise CalibrationError(reason, place=place, mend="save plain arrays again") from None
    except Exception as error:  # safetensors raises a class of its own
        raise CalibrationError(f"it cannot be read: {named_line(error)}", place=place, mend="save it again") from None


def _read_arrays(path: Path) -> dict[str, Any]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            entries = archive.zip.infolist() if archive.zip is not None else []
            unpacked = sum(entry.file_size for entry in entries)
            if unpacked > max(_BOMB, 200 * path.stat().st_size):
                raise CalibrationError(
                    f"it would unpack to {unpacked} bytes, as a zip bomb does", place=str(path), mend="use np.savez"
                )
            return {name: archive[name] for name in archive.files}
    if path.suffix == ".npy":
        return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    held = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(held, Tensor):
        return {"": held}
    if isinstance(held, Mapping):
        return {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
    if isinstance(held, (list, tuple)) and held and all(isinstance(item, Tensor) for item in held):
        return {str(index): item for index, item in enumerate(held)}
    raise CalibrationError(f"it holds a {type(held).__name__}, no tensors", place=str(path), mend="save tensors")
