"""From a model file to a program: what the commands that take a MODEL share."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

from fxcompile.errors import TraceError, UsageError
from fxcompile.input_shapes import example_inputs
from fxcompile.program import Program
from fxcompile.progress import Progress
from fxcompile.reading import read_model
from fxcompile.refusals import user_line
from fxcompile.timing import Stopwatch
from fxcompile.tracing import trace


def load(
    path: Path, factory: str | None, input_shapes: tuple[str, ...], allow_pickle: bool, progress: Progress
) -> Program:
    """Read and trace a model.

    Args:
        factory: what makes the architecture of a state dict, "module:name".
        input_shapes: texts of `--input-shape`; none for a .pt2.

    Raises:
        ReadError: the file is no model that can be read.
        UsageError: the arguments do not go with the file.
        TraceError: the model cannot be followed.
    """
    if not gc.get_freeze_count():
        gc.freeze()  # a million objects of imported libraries, which every collection would look through again
    progress("reading", 0, 1)
    watch = Stopwatch()
    with watch.stage("reading"):
        file = read_model(path, factory=factory, allow_pickle=allow_pickle)
    model = file.exported or file.module
    assert model is not None
    if file.module is not None:
        args, kwargs = example_inputs(file.module, input_shapes)
    elif input_shapes:
        raise UsageError("a .pt2 brings its own input shapes", mend="leave --input-shape out")
    else:
        args, kwargs = file.example_inputs or ((), {})
    progress("tracing", 0, 1)
    try:
        program = trace(model, args, kwargs)
    except SystemExit as error:
        raise TraceError(
            "the model's code ends the process", place=user_line(error), mend="take that call out"
        ) from None
    except TraceError as error:
        if error.place is not None:
            raise
        raise TraceError(error.problem, place=factory or str(path), mend=error.mend) from error
    return replace(program, seconds={**watch.seconds, **program.seconds})
