"""Where the time and the memory of a process go: functions are wrapped, and what they take is counted by stage.

A stage's time is its own, without that of the stages inside it, so that all of them add up to the whole. Its peak is
the largest resident set while it was the innermost one.
"""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Stage:
    """Seconds by the wall clock and of the CPU (all threads), and the peak resident set in bytes."""

    seconds: float = 0.0
    cpu: float = 0.0
    peak: int = 0


@dataclass
class Stages:
    """A record of stages by path: `fold-batchnorm/verify` is the stage `verify` inside the stage `fold-batchnorm`."""

    memory: bool = False
    found: dict[str, Stage] = field(default_factory=dict)
    _path: list[str] = field(default_factory=list)
    _marks: tuple[float, float] = (0.0, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside as that stage."""
        self._settle()
        self._path.append(name)
        try:
            yield
        finally:
            self._settle()
            self._path.pop()

    def _settle(self) -> None:
        """Charge what was spent since the last boundary to the innermost stage."""
        if self._path:
            stage = self.found.setdefault("/".join(self._path), Stage())
            stage.seconds += time.perf_counter() - self._marks[0]
            stage.cpu += time.process_time() - self._marks[1]
        if self.memory:
            peak = take_peak()
            if self._path:
                stage.peak = max(stage.peak, peak)
        self._marks = time.perf_counter(), time.process_time()

    def total(self, *prefixes: str) -> Stage:
        """The sum of all stages whose path starts with one of these, of all stages if none is given."""
        chosen = [
            stage
            for path, stage in self.found.items()
            if not prefixes or any(path == prefix or path.startswith(f"{prefix}/") for prefix in prefixes)
        ]
        return Stage(
            sum(stage.seconds for stage in chosen),
            sum(stage.cpu for stage in chosen),
            max((stage.peak for stage in chosen), default=0),
        )

    def wrap(self, owner: Any, attribute: str, name: str | Callable[..., str]) -> None:
        """Count every call of a function or method as a stage; `name` may depend on its arguments."""
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name if isinstance(name, str) else name(*args, **kwargs)):
                return function(*args, **kwargs)

        setattr(owner, attribute, counted)
        for module in [module for name, module in sys.modules.items() if name.startswith("fxcompile.")]:
            for key, value in vars(module).items():
                if value is function:
                    setattr(module, key, counted)  # where it was imported by name


def count_compiler(stages: Stages) -> None:
    """Wrap the stages of fxcompile, which is thereby imported, with all that it would import later."""
    import hypothesis  # noqa: F401
    import onnx
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import onnxsim
    import torch
    import torch.onnx

    from fxcompile import emission, files, manager, onnxfile, running, simplifying, tracing
    from fxcompile.program import Program

    stages.wrap(tracing, "trace", "trace")
    stages.wrap(Program, "snapshot", "snapshot")
    stages.wrap(manager.PassManager, "run", "passes")
    stages.wrap(running.Run, "apply", lambda run, pass_: pass_.name)
    stages.wrap(running.Run, "_check_exact", "check sites")
    stages.wrap(running.Run, "_verify", "verify")
    stages.wrap(emission, "save_onnx", "emit")
    stages.wrap(emission, "export", "export")
    stages.wrap(torch.export, "export", "torch.export")
    stages.wrap(torch.onnx, "export", "torch.onnx.export")
    stages.wrap(simplifying, "simplify", "simplify")
    stages.wrap(onnxsim, "simplify", "onnxsim")
    stages.wrap(onnx.checker, "check_model", "onnx checker")
    stages.wrap(onnxfile, "write_onnx", "write")
    stages.wrap(emission, "verify_file", "ONNX Runtime")
    stages.wrap(files, "publish", "publish")


def take_peak() -> int:
    """The peak of the resident set since the last call, in bytes; since the start where the system cannot reset it."""
    peak = peak_rss()
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        try:
            reset.write_text("5")
        except OSError:
            return peak
    return peak


def peak_rss() -> int:
    """The peak of this process's resident set, in bytes.

    On Linux from /proc: what getrusage says there includes the process that this one was started from.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
