"""The command's standard streams: results on stdout, one sentence on stderr where there are none."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

import click

from fxcompile.errors import WriteError
from fxcompile.writing import write_atomically


def open_streams() -> None:
    """Standard streams that are there and take any text: a closed one must not become the next file opened."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def print_text(text: str) -> None:
    """Print results.

    Raises:
        WriteError: stdout goes to a disk that is full, or refuses.
    """
    try:
        click.echo(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        abandon_stdout()
        raise WriteError(f"it cannot be written: {error.strerror}", place="stdout", mend="free space") from None


class Printable(Protocol):
    """Results for people and for machines."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""

    def text(self, width: int) -> str:
        """Tables and sentences, at most so many characters wide."""


def print_results(results: Printable, as_json: bool) -> None:
    """Print results, as JSON or as wide as the terminal.

    Raises:
        WriteError: stdout goes to a disk that is full, or refuses.
    """
    print_text(as_text(results) if as_json else results.text(terminal_width()))


def write_results(results: Printable, path: Path) -> None:
    """Write results as JSON to a file.

    Raises:
        WriteError: the disk is full, or refuses; the old content is still there.
    """
    write_atomically(path, (as_text(results) + "\n").encode())


def as_text(results: Printable) -> str:
    """Results as JSON."""
    return json.dumps(results.as_dict(), indent=2, allow_nan=False)


def terminal_width() -> int:
    """Columns of the terminal that results are printed to, 120 where they go elsewhere."""
    return max(shutil.get_terminal_size((120, 0)).columns, 60) if sys.stdout.isatty() else 120


def abandon_stdout() -> None:
    """Nothing that is still to be written to stdout shall fail again when Python ends."""
    with open(os.devnull, "wb") as nowhere, suppress(OSError):
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def fail(sentence: str, code: int) -> NoReturn:
    """Print one line, in which a file's content can neither play tricks with the terminal nor fill it, and leave."""
    line = re.sub(r"(\S{100})\S{100,}(\S{100})", r"\1...\2", " ".join(sentence.split()))
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    click.echo(f"fxcompile: {line}", err=True)
    sys.exit(code)
