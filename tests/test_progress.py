"""A bar appears on a terminal after two seconds of work, and nowhere and never else."""

from __future__ import annotations

import io
import sys
import threading
from typing import Any

import pytest

from fxcompile import progress
from fxcompile.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Timers that are started, by hand instead of by time."""
    started: list[Any] = []

    class Timer:
        def __init__(self, seconds: float, function: Any) -> None:
            assert seconds == 2.0
            self.function, self.cancelled = function, False

        def start(self) -> None:
            started.append(self)

        def cancel(self) -> None:
            self.cancelled = True

    monkeypatch.setattr(progress.threading, "Timer", Timer)
    return started


def test_work_that_lasts_is_shown_with_how_far_it_is(timers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar() as shown:
        shown("reading [model]", 0, 1)
        assert terminal.getvalue() == ""
        timers[0].function()
        assert shown.bar.tasks[0].total is None
        shown("stack-kernels", 3, 12)
        assert (shown.bar.tasks[0].completed, shown.bar.tasks[0].total) == (3, 12)
        shown.bar.refresh()
    written = terminal.getvalue()
    assert "reading [model]" in written
    assert "stack-kernels" in written
    assert written.endswith("\x1b[2K"), "the bar is wiped at the end"


def test_work_that_ends_before_shows_nothing(timers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar() as shown:
        shown("reading", 0, 1)
    assert timers[0].cancelled
    timers[0].function()  # it may be on its way already
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("quiet", [True, False])
def test_nothing_is_drawn_where_nobody_looks(timers: list[Any], monkeypatch: pytest.MonkeyPatch, quiet: bool) -> None:
    stream = Terminal() if quiet else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressBar(quiet) as shown:
        shown("reading", 0, 1)
    assert timers == []
    assert stream.getvalue() == ""


def test_the_bar_goes_to_the_terminal_where_stderr_is_replaced_meanwhile(
    timers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal, other = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar() as shown:
        shown("exporting", 0, 1)
        monkeypatch.setattr(sys, "stderr", other)
        timers[0].function()
        shown.bar.refresh()
    assert "exporting" in terminal.getvalue()
    assert other.getvalue() == ""


def test_no_thread_stays_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    before = set(threading.enumerate())
    with ProgressBar() as shown:
        shown("reading", 0, 1)
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert set(threading.enumerate()) <= before
