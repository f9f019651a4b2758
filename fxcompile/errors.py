"""Everything that fxcompile refuses, one class per kind.

An error is one sentence: the place, what is wrong there, and what mends it. The command line prints that sentence
and exits with the class's `exit_code`; Python users catch `FxcompileError` or the kind they care about.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class FxcompileError(Exception):
    """Base of all errors. `str(error)` is "place: problem; mend", without the parts that are not known.

    Args:
        problem: what is wrong, as a clause without a full stop.
        place: where: a file, a layer's name, `file:line` of the user's model, an option.
        mend: what the user changes to get further, as an imperative clause.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, problem: str, *, place: str | None = None, mend: str | None = None) -> None:
        self.problem = problem
        self.place = place
        self.mend = mend
        sentence = f"{place}: {problem}" if place else problem
        super().__init__(f"{sentence}; {mend}" if mend else sentence)


class UsageError(FxcompileError):
    """The call itself is wrong: a flag, a combination of flags, a value out of range."""

    exit_code: ClassVar[int] = 2


class PipelineError(UsageError):
    """The text of `--passes` does not parse, or names an unknown pass or option."""


class ReadError(FxcompileError):
    """A model file is missing, malformed, of another kind, or would run code if it were loaded."""


class CalibrationError(FxcompileError):
    """Calibration data is missing, malformed, or does not fit the model's inputs."""


class TraceError(FxcompileError):
    """The model cannot be brought to canonical form; `place` names the line of the user's model."""


class RewriteError(FxcompileError):
    """A pass returned something that cannot take a site's place."""


class FitError(FxcompileError):
    """Weights could not be fitted: no data, or data that is not finite."""


class BudgetError(FxcompileError):
    """What is to be saved cannot be saved in this network by the passes that are to save it."""


class ContractError(FxcompileError):
    """A pass broke its contract; names the pass, the site and the smallest input found."""


class EmitError(FxcompileError):
    """The program could not be exported, or the exported file does not compute what the program does."""


class WriteError(FxcompileError):
    """An output file could not be written."""


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """The mend for a misspelt name: the nearest right one, or the whole list where none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"choose from {', '.join(names)}" if names else "there are none to choose from"


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def named_line(error: BaseException, limit: int = 200) -> str:
    """An exception's class and message as a single short line."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text}"[:limit] if text else name
