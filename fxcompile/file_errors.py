"""The last step of a compilation, measured: the ONNX file in ONNX Runtime against the program that it was made from."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxcompile.emission import save_onnx
from fxcompile.errors import EmitError
from fxcompile.manager import Result
from fxcompile.runtime import feeds_of, open_session, run_session
from fxcompile.yardstick import Errors, Outputs, Yardstick


@dataclass
class FileErrors:
    """The emitted file.

    Attributes:
        program: for each output, the file in ONNX Runtime against the program.
        original: the same against the original model.
        unsimplified: against the program, as the exporter writes it and before onnxsim; None where the file is right.
        refused: why compiling would not write it; "" where it would.
    """

    program: Errors
    original: Errors
    unsimplified: Errors | None = None
    refused: str = ""


def file_errors(result: Result, yard: Yardstick, outputs: Outputs, verify: bool) -> FileErrors | str:
    """Emit a result's program and run it; returns why where that cannot be done.

    Args:
        outputs: of the program on the yardstick's inputs.
        verify: emit as compiling does, with weaker simplification where the strongest does not verify.
    """
    with tempfile.TemporaryDirectory(prefix="fxcompile-") as folder:
        path, refused = Path(folder) / "model.onnx", ""
        try:
            try:
                save_onnx(result, path, verify=verify)
            except EmitError as error:
                if not verify:
                    raise
                refused = str(error)
                save_onnx(result, path, verify=False)
            given = run_file(path, yard)
            errors = yard.between(given, outputs)
            found = FileErrors(errors, yard.between(given, yard.outputs), refused=refused)
            if yard.is_off(errors):
                save_onnx(result, path, verify=False, simplified=False)
                found.unsimplified = yard.between(run_file(path, yard), outputs)
        except EmitError as error:
            return str(error)
    return found


def run_file(path: Path, yard: Yardstick) -> Outputs:
    """A file's outputs in ONNX Runtime on all batches; some samples at a time where its batch is fixed.

    Raises:
        EmitError: ONNX Runtime cannot run it on these inputs.
    """
    session = open_session(path)
    taken = {item.name: item.shape for item in session.get_inputs()}
    made: Outputs = []
    for batch in yard.batches:
        feeds = feeds_of(session, yard.program, batch)
        try:
            made.append(_run(session, feeds, yard, taken))
        except Exception as error:
            raise EmitError(f"ONNX Runtime fails on {yard.what}: {' '.join(str(error).split())}") from error
    return made


def _run(session: Any, feeds: dict[str, Any], yard: Yardstick, taken: dict[str, list[Any]]) -> tuple[torch.Tensor, ...]:
    free = [spec.name for spec in yard.program.inputs if spec.batch_axis == 0 and spec.name in taken]
    size = next((taken[name][0] for name in free if isinstance(taken[name][0], int)), None)
    if size is None:
        return tuple(run_session(session, feeds))
    count = next(iter(feeds[name].shape[0] for name in free))
    parts = []
    for start in range(0, count, size):
        rows = [min(index, count - 1) for index in range(start, start + size)]
        part = session.run(None, {name: value[rows] if name in free else value for name, value in feeds.items()})
        parts.append([item[: count - start] for item in part])
    return tuple(torch.from_numpy(np.concatenate(items)) for items in zip(*parts, strict=True))
