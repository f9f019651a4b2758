"""fxcompile: a graph-rewriting compiler that makes convolutional networks small and fast, and checks the result.

    import fxcompile as fxc
    from fxcompile.passes import FoldBatchNorm, StackKernels

    program = fxc.trace(model, example_inputs)
    result = fxc.PassManager([FoldBatchNorm(), StackKernels(rank=0.5)], calibration=batches).run(program)
    print(result.report())
    result.save_onnx("model.onnx")

Names are imported when they are first used, so that `import fxcompile` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxcompile.bisecting import bisect
    from fxcompile.contracts import Approximate, Exact, Trained
    from fxcompile.errors import FxcompileError
    from fxcompile.manager import PassManager, Result
    from fxcompile.pipeline import format_pipeline, parse_pipeline
    from fxcompile.program import Program
    from fxcompile.reading import read_model
    from fxcompile.rewriting import ChannelPass, Pass, Removal, Site, Skip
    from fxcompile.tracing import trace

_HOMES = {
    "Approximate": "contracts",
    "ChannelPass": "rewriting",
    "Exact": "contracts",
    "FxcompileError": "errors",
    "Pass": "rewriting",
    "PassManager": "manager",
    "Program": "program",
    "Removal": "rewriting",
    "Result": "manager",
    "Site": "rewriting",
    "Skip": "rewriting",
    "Trained": "contracts",
    "bisect": "bisecting",
    "format_pipeline": "pipeline",
    "parse_pipeline": "pipeline",
    "read_model": "reading",
    "trace": "tracing",
}

__all__ = [
    "Approximate",
    "ChannelPass",
    "Exact",
    "FxcompileError",
    "Pass",
    "PassManager",
    "Program",
    "Removal",
    "Result",
    "Site",
    "Skip",
    "Trained",
    "bisect",
    "format_pipeline",
    "parse_pipeline",
    "read_model",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fxcompile' has no attribute '{name}'")
    return getattr(importlib.import_module(f"fxcompile.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
