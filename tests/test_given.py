"""Outputs that a program was seen to give are used again only while it is the same program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from fxcompile.passes import EliminateIdentity, FoldBatchNorm
from torch import nn

from fxcompile import given as module
from fxcompile.drawing import Case
from fxcompile.given import Given
from fxcompile.manager import PassManager, Result
from fxcompile.program import Program
from fxcompile.tracing import trace

CASE = Case("normal", 2, 0.5, 1)


def result_of() -> Result:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 2, 1)).eval()
    return PassManager([FoldBatchNorm(), EliminateIdentity()]).run(trace(model, torch.randn(2, 3, 8, 8)))


def layer(program: Program) -> Any:
    return next(layer for _, layer in program.layers(nn.Conv2d))


def test_what_was_verified_is_known() -> None:
    result = result_of()
    known = result.given.of(result.program)
    assert known
    for case, outputs in known.items():
        assert torch.equal(outputs[0], result.program.outputs(*result.inputs.make(case))[0])


def write(program: Program) -> Program:
    layer(program).weight.data.mul_(2)
    return program


def swap(program: Program) -> Program:
    layer(program).weight.data = layer(program).weight.data.flip(0) + 0
    layer(program).bias.data[0] += 1
    return program


def drop(program: Program) -> Program:
    node = next(node for node in program.graph.nodes if isinstance(program.layer(node), nn.ReLU))
    node.replace_all_uses_with(node.all_input_nodes[0])
    program.graph.erase_node(node)
    program.module.recompile()
    return program


def fix(program: Program) -> Program:
    return replace(program, inputs=tuple(replace(spec, batch_axis=None) for spec in program.inputs))


@pytest.mark.parametrize("change", [write, swap, drop, fix])
def test_nothing_is_known_of_another_program(change: Callable[[Program], Program], tmp_path: Path) -> None:
    result = result_of()
    changed = change(result.program)
    assert result.given.of(changed) == {}
    result.save_onnx(tmp_path / "model.onnx")
    x = torch.randn(2, 3, 8, 8)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert float((torch.from_numpy(theirs) - changed.outputs(x)[0]).abs().max()) < 1e-5


def test_no_more_is_kept_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    program = result_of().program
    given = Given()
    given.add(CASE, [torch.zeros(20)])
    given.add(replace(CASE, seed=2), [torch.zeros(20)])
    assert list(given.seal(program).of(program)) == [CASE]
