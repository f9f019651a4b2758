"""ONNX Runtime on the CPU: a session of a file, what it is fed, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxcompile.errors import EmitError, one_line
from fxcompile.program import Program


def open_session(path: Path, lean: bool = False) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        lean: without other layouts of the weights, which would be two more copies of them.

    Raises:
        EmitError: ONNX Runtime does not load the file.
    """
    return session_of(str(path), lean)


def session_of(model: str | bytes, lean: bool = False) -> Any:
    """The same of a file's path, or of what stands in it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would hold up torch between two runs
    if lean:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EmitError(f"ONNX Runtime does not load the emitted file: {one_line(error)}") from error


def feeds_of(session: Any, program: Program, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """A program's inputs as a session of its file takes them: without those that nothing in the file reads."""
    taken = {item.name for item in session.get_inputs()}
    pairs = zip(program.inputs, tensors, strict=True)
    return {spec.name: tensor.numpy() for spec, tensor in pairs if spec.name in taken}


def run_session(session: Any, feeds: dict[str, Any]) -> list[Tensor]:
    """All outputs of a session."""
    return [torch.from_numpy(np.array(item)) for item in session.run(None, feeds)]
