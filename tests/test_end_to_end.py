"""Whole pipelines on faithful architectures and pretrained models, held against the models themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from forms import assert_canonical
from torch import Tensor, nn
from zoo import ARCHITECTURES, FAMILIES, example_inputs
from zoo.pretrained import load_crepe_tiny, load_onet, load_rnet

from fxcompile.calibration import Calibration
from fxcompile.manager import PassManager, Result
from fxcompile.program import Program, flatten_tensors
from fxcompile.tracing import trace

PIPELINE = "fold-batchnorm, eliminate-identity, stack-kernels(rank=0.6)"

Loader = Callable[[], tuple[nn.Module, Any, dict[str, Any]]]


def from_zoo(name: str) -> Loader:
    factory = {**ARCHITECTURES, **FAMILIES}[name]
    return lambda: (factory(), *example_inputs(name))


def pretrained(load: Callable[[], tuple[nn.Module, tuple[Any, ...]]]) -> Loader:
    def loaded() -> tuple[nn.Module, Any, dict[str, Any]]:
        model, args = load()
        return model, args, {}

    return loaded


MODELS: dict[str, Loader] = {
    **{name: from_zoo(name) for name in (*ARCHITECTURES, *FAMILIES)},
    "rnet": pretrained(load_rnet),
    "onet": pretrained(load_onet),
    "crepe_tiny": pretrained(load_crepe_tiny),
}


def tensors_of(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    return list(flatten_tensors([*args, *kwargs.values()]))


def calibration(program: Program, samples: int) -> Calibration | None:
    """Random samples for every input, where all of them have a batch."""
    if any(spec.batch_axis is None or not spec.dtype.is_floating_point for spec in program.inputs):
        return None
    generator = torch.Generator().manual_seed(0)
    made = {
        spec.name: torch.randn((samples, *spec.shape[1:]), generator=generator).to(spec.dtype)
        for spec in program.inputs
    }
    return Calibration(program.inputs, made)


def onnx_outputs(path: Path, program: Program, inputs: list[Tensor]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    known = {item.name for item in session.get_inputs()}
    feeds = {s.name: x.numpy() for s, x in zip(program.inputs, inputs, strict=True) if s.name in known}
    return [torch.from_numpy(np.array(item)) for item in session.run(None, feeds)]


def check(result: Result, model: nn.Module, args: Any, kwargs: dict[str, Any], path: Path) -> None:
    """Exact passes kept everything; the file differs from the model by what the report states, and no more."""
    record = result.save_onnx(path)
    exact = [report for report in record.passes if report.contract == "Exact"]
    assert all(report.outcome in ("kept", "left") and report.error is None for report in exact)
    inputs = tensors_of(args, kwargs)
    with torch.no_grad():
        wanted = flatten_tensors(model(*args, **kwargs))
    given = onnx_outputs(path, result.program, inputs)
    rewritten = result.program.outputs(*inputs)
    sites = [site for site in record.passes[-1].sites if site.outcome == "kept"]
    assert len(given) == len(wanted) == len(record.file.outputs)  # type: ignore[union-attr]
    for ours, program, theirs in zip(given, rewritten, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        scale = theirs.double().abs().max()
        assert (ours.double() - program.double()).abs().max() <= 2e-5 * scale
        if not sites:
            assert (ours.double() - theirs.double()).abs().max() <= 2e-5 * scale
    assert record.after.macs <= record.before.macs


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_network_comes_out_of_onnx_runtime_within_its_contracts(name: str, tmp_path: Path) -> None:
    model, args, kwargs = MODELS[name]()
    program = trace(model, args, kwargs)
    assert_canonical(program, model)
    result = PassManager(PIPELINE, calibration=calibration(program, 12)).run(program)
    check(result, model, args, kwargs, tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["alexnet", "lenet5", "googlenet"])
def test_stack_kernels_states_an_error_that_holds_on_other_data(name: str) -> None:
    """The output error stated for held-out calibration data holds, within a factor of two, on data never seen."""
    model, args, kwargs = MODELS[name]()
    program = trace(model, args, kwargs)
    data = calibration(program, 48)
    if data is None:
        pytest.skip("an input without a batch")
    result = PassManager("stack-kernels(rank=0.7)", calibration=data).run(program)
    stated = result.record.passes[0].error
    assert stated is not None
    generator = torch.Generator().manual_seed(99)
    fresh = [torch.randn((16, *spec.shape[1:]), generator=generator) for spec in program.inputs]
    difference = total = 0.0
    for ours, theirs in zip(result.program.outputs(*fresh), program.outputs(*fresh), strict=True):
        difference += float((ours - theirs).square().sum())
        total += float(theirs.square().sum())
    assert (difference / total) ** 0.5 <= 2 * stated + 1e-6
