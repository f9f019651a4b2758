"""Writing files: checked before any work, atomic, durable."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fxcompile.errors import FxcompileError, WriteError


def check_writable(path: Path) -> None:
    """Raises WriteError where the output's folder is missing or cannot be written, before any work is done."""
    parent = path.parent
    if not parent.is_dir():
        raise WriteError("the folder does not exist", place=str(parent), mend="make it first")
    if path.is_dir():
        raise WriteError("it is a folder", place=str(path), mend="give a file's name")
    if not os.access(parent, os.W_OK):
        raise WriteError("the folder cannot be written to", place=str(parent), mend="choose another or change its mode")


@contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the file system of an output, removed afterwards.

    Raises:
        WriteError: the disk is full, or refuses.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise WriteError(f"it cannot be written: {error.strerror}", place=str(path)) from error
    try:
        yield folder
    except FxcompileError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(
            f"it cannot be written: {reason}", place=str(path), mend="free space or choose another disk"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(scratch: Path, path: Path) -> int:
    """Move a finished ONNX file, and its data file if it has one, to its place; returns their bytes.

    A data file's name holds a hash of its content, so the old output stays whole until the new one takes its name;
    the old one's data file is removed last.
    """
    size = scratch.stat().st_size
    kept = set()
    for data in scratch.parent.glob("*.data"):
        size += data.stat().st_size
        os.replace(data, path.parent / data.name)
        kept.add(data.name)
    os.replace(scratch, path)
    flush_folder(path.parent)
    for stale in path.parent.glob(f"{path.name}.{'[0-9a-f]' * 16}.data"):
        if stale.name not in kept:
            stale.unlink()
    return size


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o666 & ~current_umask())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    flush_folder(path.parent)


def current_umask() -> int:
    """The process's file mode mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
