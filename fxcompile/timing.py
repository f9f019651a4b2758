"""Where the time goes, by stage of a compilation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

clock: Callable[[], float] = time.perf_counter
"""Reads the time in seconds; `tools/bench` counts processor time, which other work on the machine leaves alone."""


class Stopwatch:
    """Adds up time by stage. Of stages inside each other only the innermost runs, so that all add up to the whole.

    Attributes:
        seconds: by stage, in the order in which they first began.
    """

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds = dict(seconds or {})
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The time until the block ends goes to this stage, as far as no stage inside of it takes it."""
        self._charge()
        self._running.append(name)
        self.seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def _charge(self) -> None:
        now = clock()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
