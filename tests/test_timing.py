"""Time by stage: innermost stages only, all of a compilation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompile as fxc
from fxcompile import timing
from fxcompile.timing import Stopwatch


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock will show, one reading after the other."""
    times: list[float] = []
    shown: Iterator[float] = iter(times)
    monkeypatch.setattr(timing, "clock", lambda: next(shown))
    return times


def test_an_inner_stage_stops_the_outer_one(readings: list[float]) -> None:
    readings += [10, 11, 15, 16]
    watch = Stopwatch()
    with watch.stage("pass"), watch.stage("verification"):
        pass
    assert watch.seconds == {"pass": 1 + 1, "verification": 4}


def test_time_between_stages_goes_nowhere(readings: list[float]) -> None:
    readings += [0, 2, 50, 53]
    watch = Stopwatch({"reading": 7.0})
    for name in ("export", "export"):
        with watch.stage(name):
            pass
    assert watch.seconds == {"reading": 7.0, "export": 2 + 3}


def test_a_stage_that_fails_is_charged_and_ends(readings: list[float]) -> None:
    readings += [0, 1, 4, 6]
    watch = Stopwatch()
    with watch.stage("outer"), pytest.raises(ValueError, match="no"), watch.stage("inner"):
        raise ValueError("no")
    assert watch.seconds == {"outer": 1 + 2, "inner": 3}


def test_a_compilation_reports_every_stage_in_the_order_of_the_work(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 5), nn.BatchNorm2d(3), nn.Dropout(), nn.ReLU())
    program = fxc.trace(model, torch.randn(2, 2, 9, 9))
    assert list(program.seconds) == ["tracing"]
    result = fxc.PassManager("fold-batchnorm, eliminate-identity, stack-kernels", verify_examples=2).run(program)
    seconds = result.save_onnx(tmp_path / "model.onnx").as_dict()["seconds"]
    assert list(seconds) == ["tracing", "analysis", "fold-batchnorm", "verification", "eliminate-identity",
                             "stack-kernels", "export", "simplify", "pack", "write", "check", "runtime"]  # fmt: skip
    assert all(value > 0 for value in seconds.values())


def test_one_program_compiled_twice_counts_its_own_stages_only() -> None:
    program = fxc.trace(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), torch.randn(2, 2, 9, 9))
    first = fxc.PassManager("fold-batchnorm", verify_examples=1).run(program).record
    before = dict(first.seconds)
    fxc.PassManager("eliminate-identity", verify_examples=1).run(program)
    assert first.seconds == before
    assert list(program.seconds) == ["tracing"]
