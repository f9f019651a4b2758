"""Writing files: checked before any work, atomic, durable.

A run writes into a folder `.fxcompile-...` beside its output and renames from there. A run that was killed leaves such
a folder behind: it is harmless, and the next run that writes beside it removes it. A run holds a lock on its own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fxcompile.errors import FxcompileError, WriteError

SCRATCH = ".fxcompile-"
"""How the names of scratch folders begin."""


def check_writable(path: Path) -> None:
    """Find out, before any work is done, whether an output file can be written.

    Raises:
        WriteError: its folder is missing or read-only, or a folder, a device or a read-only file has its name.
    """
    place, parent = str(path), path.parent
    try:
        folder = _mode(parent)
        mode = _mode(path)
    except (OSError, ValueError) as error:  # too long a name, a loop of links, a NUL
        raise _write_error(error, path) from None
    if folder is None or not stat.S_ISDIR(folder):
        raise WriteError("the folder does not exist", place=str(parent), mend="make it first")
    if mode is not None and stat.S_ISDIR(mode):
        raise WriteError("it is a folder", place=place, mend="give a file's name")
    if mode is not None and not stat.S_ISREG(mode):  # a rename would put a file in the place of /dev/null
        raise WriteError("it is a device or a pipe, and only files can be replaced in one step", place=place,
                         mend="give a file's name")  # fmt: skip
    if not os.access(parent, os.W_OK | os.X_OK):
        raise WriteError("the folder cannot be written to", place=str(parent), mend="choose another or change its mode")
    if mode is not None and not os.access(path, os.W_OK):
        raise WriteError("the file is read-only", place=place, mend="choose another name or change its mode")


def check_folder(path: Path) -> None:
    """Find out whether a folder can be written to, or made.

    Raises:
        WriteError: it cannot.
    """
    try:
        found = next(folder for folder in (path, *path.absolute().parents) if _mode(folder) is not None)
        is_folder = stat.S_ISDIR(_mode(found) or 0)
    except (OSError, ValueError) as error:
        raise _write_error(error, path) from None
    if not is_folder:
        raise WriteError(f"'{found}' is a file", place=str(path), mend="give a folder's name")
    if not os.access(found, os.W_OK | os.X_OK):
        raise WriteError("the folder cannot be written to", place=str(found), mend="choose another or change its mode")


def _mode(path: Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the file system of an output, removed afterwards.

    Raises:
        WriteError: the disk is full, or refuses.
    """
    with _writing(path):
        _remove_stale(path.parent)
        folder, lock = _locked_folder(path.parent)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Failures of the system as errors that name the output."""
    try:
        yield
    except FxcompileError:
        raise
    except (OSError, ValueError) as error:
        raise _write_error(error, path) from error


def _write_error(error: OSError | ValueError, path: Path) -> WriteError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    mend = "choose another name"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        mend = "free space or choose another disk"
    elif isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        mend = "choose another folder or change its mode"
    return WriteError(f"it cannot be written: {reason}", place=str(path), mend=mend)


def _locked_folder(parent: Path) -> tuple[Path, int]:
    """A new scratch folder and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
        try:
            lock = _lock(folder)
        except FileNotFoundError:  # another run took it for stale before it was locked
            continue
        except OSError:
            os.rmdir(folder)
            raise
        if folder.exists():
            return folder, lock
        os.close(lock)


def _lock(folder: Path) -> int:
    """A descriptor of a folder, which holds its lock until it is closed."""
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some network file systems have no locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _remove_stale(parent: Path) -> None:
    """Remove the scratch folders of runs that are no more; the system drops their locks however they end."""
    for folder in parent.glob(f"{SCRATCH}*"):
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def publish(scratch: Path, path: Path) -> int:
    """Move a finished ONNX file, and its data file if it has one, to its place; returns their bytes.

    A data file's name holds a hash of its content, so the old output stays whole until the new one takes its name;
    the old one's data file is removed last.
    """
    size = scratch.stat().st_size
    new: list[Path] = []
    kept = set()
    folder = _lock(path.parent)  # a run that writes the same output must not take our data file for the old one's
    try:
        for data in scratch.parent.glob("*.data"):
            size += data.stat().st_size
            place = path.parent / data.name
            kept.add(data.name)
            is_new = not place.exists()
            os.replace(data, place)
            new += [place] if is_new else []
        os.fsync(folder)
        os.replace(scratch, path)
        new.clear()
        os.fsync(folder)
        is_data = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.data")
        for stale in path.parent.iterdir():
            if is_data.fullmatch(stale.name) and stale.name not in kept:
                with suppress(OSError):
                    stale.unlink()
    finally:
        for data in new:
            with suppress(OSError):
                data.unlink()
        os.close(folder)
    return size


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new.

    Raises:
        WriteError: the disk is full, or refuses; the old content is still there.
    """
    with scratch_beside(path) as folder:
        made = folder / path.name
        with open(made, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(made, path)
        flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
