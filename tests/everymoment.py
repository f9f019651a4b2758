"""Interrupts a run that writes files at every moment there is, one after the other, and says what it left.

    python everymoment.py kill|full FOLDER ARGUMENTS OF FXCOMPILE...

The command runs as far as the first look at the output's folder; from there on, a fork of it for each moment goes on
and is killed, or meets a full disk, at the first, second, third ... thing that it does to the folder: making, opening,
flushing, renaming or removing something, or half of a write. One line of JSON each.

FXCOMPILE_TEST_LIMIT: bytes above which weights go to a file beside the model.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

UNTOUCHED = 100
"""Added to the exit code of the run that ended before its moment came."""

EVENTS = frozenset({"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"})


class Moments:
    """Counts what is done to a folder, and interrupts at one moment."""

    def __init__(self, folder: Path, interrupt: Callable[[], None], moment: int) -> None:
        self.folder, self.interrupt, self.left = str(folder), interrupt, moment
        self.came = False
        sys.addaudithook(self.hear)
        flush = os.fsync

        def flushing(descriptor: int) -> None:
            self.tick()
            flush(descriptor)

        os.fsync = flushing

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS and isinstance(args[0], (str, os.PathLike)) and str(args[0]).startswith(self.folder):
            self.tick()

    def tick(self) -> None:
        self.left -= 1
        if self.left == -1:
            self.came = True
            self.interrupt()

    def open(self, path: Path, mode: str) -> io.BufferedWriter:
        assert mode == "wb"
        moments = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                written = super().write(bytes(data)[: max(len(data) // 2, 1)])
                moments.tick()
                return written

        return io.BufferedWriter(File(path, "wb"))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def state(folder: Path) -> dict[str, str]:
    """What a reader of the folder finds: models with all their weights, reports as JSON, other files by content."""
    import onnx

    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".onnx":
            model = onnx.load(path)  # with the weights beside it
            found[path.name] = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
        elif path.suffix == ".json":
            found[path.name] = json.loads(path.read_text())["pipeline"]
        else:
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def main() -> None:
    interrupt = {"kill": kill, "full": full}[sys.argv[1]]
    folder = Path(sys.argv[2])

    import onnxruntime  # noqa: F401

    from fxcompile import cli, emission, onnxfile, simplifying, writing

    limit = os.environ.get("FXCOMPILE_TEST_LIMIT")
    if limit is not None:
        write = onnxfile.write_onnx
        simplifying.OPAQUE_BYTES = 0
        emission.write_onnx = lambda file, path: write(file, path, limit=int(limit))  # type: ignore[assignment]
    scratch_beside = emission.scratch_beside
    moments: Moments | None = None

    @contextlib.contextmanager
    def forking(path: Path) -> Iterator[Path]:
        nonlocal moments
        for moment in itertools.count():
            if moments is not None:
                break
            child = os.fork()
            if child == 0:
                moments = Moments(folder, interrupt, moment)
                onnxfile.open = writing.open = moments.open  # type: ignore[attr-defined]
                continue
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            if code >= UNTOUCHED:
                os._exit(code - UNTOUCHED)
            print(json.dumps({"code": code, "state": state(folder)}), file=sys.__stdout__, flush=True)
        with scratch_beside(path) as scratch:
            yield scratch

    emission.scratch_beside = forking
    try:
        cli.main(sys.argv[3:])
    except SystemExit as left:
        sys.stdout.flush()
        code = int(left.code or 0)
        came = moments is not None and moments.came
        os._exit(code if came else code + UNTOUCHED)  # without the destructors of threads that the fork does not have


if __name__ == "__main__":
    main()
