"""Files as an attacker, or a full disk, would make them: what the tests of refusals share."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Records = dict[str, bytes]
MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"
MARKER = "marker"
CODE = f"open('{MARKER}','w')"


class Touch:
    """Unpickling it makes the marker file in the current folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (MARKER, "w")


def saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: Any, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def zipped(records: Records, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def truncated(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def edit(name: str, change: Callable[[Any], object]) -> Callable[[Records], object]:
    """A change of one record's JSON."""

    def apply(records: Records) -> None:
        data = json.loads(records[name])
        change(data)
        records[name] = json.dumps(data).encode()

    return apply


def both(*changes: Callable[[Records], object]) -> Callable[[Records], object]:
    return lambda records: [change(records) for change in changes]


def record(name: str, value: bytes) -> Callable[[Records], object]:
    return lambda records: records.update({name: value})


def altered(good: Path, change: Callable[[Records], object]) -> Path:
    with zipfile.ZipFile(good) as archive:
        records = {entry.filename.partition("/")[2]: archive.read(entry) for entry in archive.infolist()}
    change(records)
    path = Path("altered.pt2")
    path.write_bytes(zipped({f"net/{name}": content for name, content in records.items()}))
    return path
