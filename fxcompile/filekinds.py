"""What kind of file a model file is, by its content; nothing in it is run, unpickled or unpacked."""

from __future__ import annotations

import os
import stat
import zipfile
from enum import Enum, auto
from pathlib import Path
from typing import IO

from fxcompile.errors import FxcompileError, ReadError, named_line

MEND = "give a .pt2 (torch.export.save), or a state dict with --model MODULE:FACTORY"


class Kind(Enum):
    """The kinds of file that `read_model` knows how to read, or how to refuse well."""

    EXPORTED = auto()
    OLD_EXPORTED = auto()
    TORCHSCRIPT = auto()
    TORCH_ZIP = auto()
    TORCH_LEGACY = auto()
    SAFETENSORS = auto()


_SIGNATURES = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a bitmap image"),
    (b"RIFF", "an image or sound"),
    (b"\x89HDF", "an HDF5 (Keras) file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"BZh", "a bzip2 file"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"%PDF", "a PDF"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
)


def open_regular(path: Path, error: type[FxcompileError] = ReadError, may_be_empty: bool = False) -> IO[bytes]:
    """A file opened for reading.

    Raises:
        error: it is missing, a folder, a device, empty (unless it may be), or may not be read.
    """
    place = str(path)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise error("it is a folder, not a file", place=place, mend="give the file's own name")
        if not stat.S_ISREG(mode):  # opening a pipe or a terminal would wait for ever
            raise error("it is not a regular file", place=place, mend="give a file on disk")
        stream = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise error("there is no such file", place=place, mend="check the path") from None
    except PermissionError:
        raise error("it may not be read", place=place, mend="change its mode or owner") from None
    except (OSError, ValueError) as reason:
        said = (reason.strerror if isinstance(reason, OSError) else None) or str(reason)
        raise error(f"it cannot be opened: {said}", place=place, mend="check the path") from None
    if not may_be_empty and os.fstat(stream.fileno()).st_size == 0:
        stream.close()
        raise error("the file is empty", place=place, mend="write it again")
    return stream


def file_kind(path: Path) -> Kind:
    """The kind of a model file.

    Raises:
        ReadError: it cannot be opened, or is none that holds a PyTorch model; says what it is instead.
    """
    with open_regular(path) as stream:
        head = stream.read(4096)
        size = os.fstat(stream.fileno()).st_size
        place = str(path)
        if head.startswith(b"PK"):
            return _zip_kind(stream, size, place)
    if _is_safetensors(head, size):
        return Kind.SAFETENSORS
    if path.suffix == ".safetensors":
        raise ReadError("its safetensors header is damaged or truncated", place=place, mend="copy it again")
    if path.suffix == ".onnx" or _is_onnx(head):
        raise ReadError(
            "it is an ONNX file, which holds no PyTorch model; fxcompile writes ONNX", place=place, mend=MEND
        )
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return Kind.TORCH_LEGACY
    raise ReadError(f"it is {_describe(head)}, not a PyTorch model", place=place, mend=MEND)


def _zip_kind(stream: IO[bytes], size: int, place: str) -> Kind:
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises many classes on malformed input
        raise ReadError(
            f"the archive is truncated or damaged ({named_line(error)})", place=place, mend="copy or save it again"
        ) from None
    names = {entry.filename.partition("/")[2] for entry in entries}
    outer = {entry.filename for entry in entries}
    if "serialized_exported_program.json" in outer:
        kind = Kind.OLD_EXPORTED
    elif any(name.startswith("models/") for name in names) or "archive_format" in names:
        kind = Kind.EXPORTED
    elif "constants.pkl" in names:
        kind = Kind.TORCHSCRIPT
    elif "data.pkl" in names:
        kind = Kind.TORCH_ZIP
    else:
        what = "an archive of NumPy arrays" if any(name.endswith(".npy") for name in outer) else "a zip archive"
        raise ReadError(f"it is {what} without a PyTorch model in it", place=place, mend=MEND)
    if kind is not Kind.TORCHSCRIPT:  # which compresses, and is refused
        check_entries(entries, size, place)
    return kind


def check_entries(entries: list[zipfile.ZipInfo], size: int, place: str) -> None:
    """Refuse what PyTorch never writes and what makes an archive dangerous to unpack.

    Raises:
        ReadError: compressed, encrypted or overlapping entries, or two of one name.
    """
    mend = "save it again with torch.save or torch.export.save"
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise ReadError("the archive has compressed or encrypted entries, as a zip bomb has", place=place, mend=mend)
    if sum(entry.file_size for entry in entries) > size:
        raise ReadError("the archive's entries claim more bytes than the file has", place=place, mend=mend)
    if len({entry.filename.casefold() for entry in entries}) != len(entries):
        raise ReadError("the archive has two entries of one name", place=place, mend=mend)


def _is_safetensors(head: bytes, size: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    return len(head) > 8 and head[8:9] == b"{" and 2 <= length <= size - 8


def _is_onnx(head: bytes) -> bool:
    # ModelProto starts with ir_version (field 1, varint), then producer_name, opset_import or graph.
    return len(head) > 2 and head[0] == 0x08 and head[1] < 32 and head[2] in (0x12, 0x1A, 0x22, 0x2A, 0x32, 0x3A, 0x42)


def _describe(head: bytes) -> str:
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite file"
    if head[257:262] == b"ustar":
        return "a tar archive"
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return "of an unknown kind"
        text = head[: error.start].decode("utf-8")
    return "a text file" if all(char.isprintable() or char.isspace() for char in text) else "of an unknown kind"
