"""Where the time and the memory of a process go: functions are wrapped, and what they take is counted by stage.

A stage's time is its own, without that of the stages inside it, so that all of them add up to the whole. Its peak is
the largest resident set while it was the innermost one.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Name = str | Callable[..., str]


@dataclass
class Stage:
    """Seconds by the wall clock and of the CPU, the peak resident set in bytes, and how often it was entered."""

    seconds: float = 0.0
    cpu: float = 0.0
    peak: int = 0
    times: int = 0


@dataclass
class _Frame:
    path: str
    seconds: float
    cpu: float


class Stages:
    """A record of stages by path: `fold-batchnorm/verify` is the stage `verify` inside the stage `fold-batchnorm`."""

    def __init__(self, memory: bool = False) -> None:
        self.found: dict[str, Stage] = {}
        self.stack: list[_Frame] = []
        self.memory = memory
        self.wall_mark, self.cpu_mark = time.perf_counter(), time.process_time()

    def _settle(self) -> None:
        """Charge what was spent since the last boundary to the innermost stage."""
        now, cpu = time.perf_counter(), time.process_time()
        peak = take_peak() if self.memory else 0
        stage = self.found.setdefault(self.stack[-1] if self.stack else "", Stage())
        stage.seconds += now - self.wall_mark
        stage.cpu += cpu - self.cpu_mark
        stage.peak = max(stage.peak, peak)
        self.wall_mark, self.cpu_mark = time.perf_counter(), time.process_time()
