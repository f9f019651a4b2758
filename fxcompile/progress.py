"""How far the work has come: what is called as it goes on, and a bar on stderr once it has lasted two seconds."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

PATIENCE = 2.0
"""Seconds of silence before a bar is drawn."""


def silent(what: str, done: int, total: int) -> None:
    """Shows no progress."""


class ProgressBar:
    """Called as work goes on; draws a bar once the work has lasted. Nothing is drawn where stderr is no terminal.

    Work is one step for as long as torch or onnxsim has it, so a timer draws the first bar, not the next call.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.stream = sys.stderr
        self.quiet = quiet or not self.stream.isatty()
        self.lock = threading.Lock()
        self.timer = threading.Timer(PATIENCE, self._start)
        self.timer.daemon = True
        self.now: tuple[str, int, int] = ("", 0, 1)
        self.what = ""
        self.bar: Any = None

    def __enter__(self) -> ProgressBar:
        if not self.quiet:
            self.timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.timer.cancel()
        with self.lock:
            self.quiet = True
            if self.bar is not None:
                self.bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Say what is being done, and how much of it is done; work of one step has no measure."""
        with self.lock:
            self.now = (what, done, total)
            if self.bar is not None:
                self._draw()

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        with self.lock:
            if self.quiet:
                return
            columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
            self.bar = Bars(*columns, console=Console(file=self.stream), transient=True,
                           redirect_stdout=False, redirect_stderr=False)  # fmt: skip
            self._draw()
            self.bar.start()

    def _draw(self) -> None:
        what, done, total = self.now
        if self.bar.task_ids and what == self.what:
            self.bar.update(self.bar.task_ids[0], completed=done, total=total)
            return
        for task in self.bar.task_ids:
            self.bar.remove_task(task)
        self.bar.add_task(what, completed=done, total=total if total > 1 else None)
        self.what = what
