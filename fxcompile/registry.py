"""Finds passes: those that ship here and those of other packages, through the same entry points."""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points

from fxcompile.contracts import Contract
from fxcompile.errors import PipelineError, did_you_mean
from fxcompile.rewriting import Pass

GROUP = "fxcompile.passes"


@functools.cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def pass_names() -> list[str]:
    """The names of all installed passes."""
    return sorted(_entries())


def find_pass(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        PipelineError: there is none of that name, or its package cannot be imported, or what it names is no pass.
    """
    entry = _entries().get(name)
    if entry is None:
        raise PipelineError(f"there is no pass '{name}'", mend=did_you_mean(name, pass_names()))
    try:
        found = entry.load()
    except Exception as error:  # another package's import may fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PipelineError(
            f"pass '{name}' cannot be loaded from {entry.value}: {reason}",
            mend="reinstall the package that brings it",
        ) from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise PipelineError(f"entry point '{name}' is no subclass of fxcompile.Pass", mend=f"correct {entry.value}")
    declared = getattr(found, "name", None)
    if declared != name:
        raise PipelineError(
            f"entry point '{name}' leads to a pass that calls itself {declared!r}", mend=f"give {entry.value} one name"
        )
    if not isinstance(getattr(found, "contract", None), Contract):
        raise PipelineError(f"pass '{name}' declares no contract", mend=f"add one to {entry.value}")
    return found
