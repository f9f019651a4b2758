"""Runs tests against a mutant, each mutant in a process of its own.

torch takes seconds to import, so it and all that the tests need is imported once; for each mutant that process is
forked, and the child imports `fxcompile.passes`, with the change in place, and the tests' own modules.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SURVIVED, KILLED = 0, 1
_MEMORY = 8 << 30
_IMPORTING = 60.0
"""Seconds of CPU time in which a child must have imported all."""


@dataclass(frozen=True)
class Baseline:
    """What a test file does without any mutant.

    Attributes:
        seconds: CPU time of each test, by its pytest node id.
        lines: by source file and line, the tests that run it.
        modules: what was imported for it, in order.
    """

    seconds: dict[str, float]
    lines: dict[str, dict[str, list[str]]]
    modules: list[str]


class _Loader(importlib.machinery.SourceFileLoader):
    """Gives a module other source than its file holds."""

    def __init__(self, name: str, path: str, code: str) -> None:
        super().__init__(name, path)
        self.code = code

    def get_code(self, fullname: str) -> CodeType:
        made: CodeType = compile(self.code, self.path, "exec")
        return made


class _Finder:
    """Finds one module, whose source is that of a mutant."""

    def __init__(self, path: str, code: str) -> None:
        self.name, self.file, self.code = module_name(path), str(ROOT / path), code

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name != self.name:
            return None
        folder = [str(Path(self.file).parent)] if self.file.endswith("__init__.py") else None
        loader = _Loader(name, self.file, self.code)
        return importlib.util.spec_from_file_location(name, self.file, loader=loader, submodule_search_locations=folder)


def module_name(path: str) -> str:
    """passes/_call.py -> fxcompile.passes._call"""
    parts = ["fxcompile", *Path(path).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@dataclass
class _Chosen:
    """A pytest plugin that runs chosen tests in a given order, each within its limit, and tells a pipe where it is."""

    order: Sequence[str]
    limits: Sequence[float]
    pipe: int

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = {item.nodeid: item for item in items}
        items[:] = [found[name] for name in self.order if name in found]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        index = self.order.index(item.nodeid)
        os.write(self.pipe, f"{index}\n".encode())
        _limit(self.limits[index])
        return (yield)


def _limit(seconds: float) -> None:
    """End this process after so much CPU time, or ten times that by the clock."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds + 30)


@dataclass
class _Measured:
    """A pytest plugin that takes the time of each test and the lines that it runs."""

    coverage: Any
    seconds: dict[str, float] = field(default_factory=dict)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        before = time.process_time()
        result = yield
        self.seconds[item.nodeid] = time.process_time() - before
        self.coverage.switch_context("")
        return result


def measure(file: Path) -> Baseline | None:
    """Run a test file as it is, in a process of its own; None where a test fails."""
    reading, writing = os.pipe()
    child = _fork(lambda: _measure_here(file, writing))
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return Baseline(**json.loads(text)) if status == 0 else None


def _measure_here(file: Path, pipe: int) -> int:
    import coverage

    recorder = coverage.Coverage(data_file=None, include=[str(ROOT / "passes" / "*")])
    plugin = _Measured(recorder)
    recorder.start()
    code = _pytest([file], plugin)
    recorder.stop()
    data = recorder.get_data()
    lines = {
        str(Path(name).relative_to(ROOT)): {
            str(line): sorted(filter(None, contexts)) for line, contexts in data.contexts_by_lineno(name).items()
        }
        for name in data.measured_files()
    }
    with open(pipe, "w") as out:
        json.dump({"seconds": plugin.seconds, "lines": lines, "modules": list(sys.modules)}, out)
    return code


def start(path: str, code: str, order: Sequence[str], limits: Sequence[float]) -> tuple[int, int]:
    """Begin to run tests against a mutant; returns the process, and a pipe from which to read how far it came."""
    reading, writing = os.pipe()

    def run() -> int:
        os.close(reading)
        _limit(_IMPORTING)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
        for name in [name for name, module in sys.modules.items() if _is_ours(module)]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Finder(path, code))  # type: ignore[arg-type]
        files = dict.fromkeys(ROOT / name.split("::")[0] for name in order)
        result = _pytest(list(files), _Chosen(order, limits, writing))
        return SURVIVED if result in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else KILLED

    child = _fork(run)
    os.close(writing)
    return child, reading


def verdict(status: int, pipe: int, order: Sequence[str]) -> tuple[str, str]:
    """From how a process ended: `killed`, `timeout` or `survived`; and the test that ended it, "" while importing."""
    with open(pipe) as text:
        begun = text.read().split()
    last = order[int(begun[-1])] if begun else ""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM):
        return "timeout", last
    survived = os.WIFEXITED(status) and os.WEXITSTATUS(status) == SURVIVED
    return ("survived", "") if survived else ("killed", last)


def prepare(modules: Sequence[str]) -> None:
    """Import what tests were seen to import, but for the passes and the tests, for the processes forked from here."""
    import torch
    from hypothesis import Phase, settings

    torch.set_num_threads(1)
    # Nothing is kept from one mutant for another, and none of a failing example's time goes into shrinking it.
    settings.register_profile("mutants", database=None, deadline=None, phases=[Phase.explicit, Phase.generate])
    settings.load_profile("mutants")
    for name in modules:
        with contextlib.suppress(Exception):
            if name != "__main__" and not _is_ours(importlib.util.find_spec(name)):
                importlib.import_module(name)
    gc.freeze()  # a collection in a child need not look at all this, nor copy its pages


def _is_ours(module: ModuleType | ModuleSpec | None) -> bool:
    """Whether a module is of the passes or their tests, and so to be imported for each mutant anew."""
    file = getattr(module, "__file__", None) or getattr(module, "origin", None)
    return file is not None and any(Path(file).is_relative_to(ROOT / folder) for folder in ("passes", "tests"))


def _pytest(files: Sequence[Path], plugin: object) -> int:
    plain = ["-q", "-x", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
    options = [*plain, "-o", "addopts=", "--hypothesis-seed=0", f"--rootdir={ROOT}"]
    return int(pytest.main([*options, *map(str, files)], plugins=[plugin]))


def _fork(run: Callable[[], int]) -> int:
    """Fork a child that does this silently and exits with the code that it returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    gc.freeze()  # a session of ONNX Runtime collected here would wait for threads that only the parent has
    code = KILLED
    try:
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        os.chdir(ROOT)
        code = run()
    finally:
        os._exit(code)


def keys_of(file: Path, shared: str) -> Callable[[str], str]:
    """A hash for each test of a file, by node id: of its own source, and all else there that is no test.

    `shared` is what all test files use. So a new test in a file leaves what is known of the others.
    """
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    own: dict[str, str] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            first = min([node.lineno, *(item.lineno for item in node.decorator_list)]) - 1
            own[node.name] = "".join(lines[first : node.end_lineno])
            lines[first : node.end_lineno] = [""] * ((node.end_lineno or first) - first)
    rest = digest("".join(line for line in lines if line.strip()), shared)

    def key(test: str) -> str:
        name = test.split("::")[1].split("[")[0]
        return digest(test, own.get(name, text), rest)

    return key


def digest(*texts: str) -> str:
    """A short hash of texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]
