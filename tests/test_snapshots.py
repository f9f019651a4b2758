"""Parts of a pipeline that are run again give the bits that a compilation gives."""

from __future__ import annotations

import pytest
import torch
from culprits import Chain
from fxcompile.passes import EliminateIdentity, FoldBatchNorm, StackKernels
from torch import Tensor

import fxcompile as fxc
from fxcompile.manager import PassManager
from fxcompile.program import Program
from fxcompile.rewriting import Pass
from fxcompile.running import Run
from fxcompile.snapshots import Snapshots
from fxcompile.timing import Stopwatch

PASSES: list[Pass] = [FoldBatchNorm(), StackKernels(rank=1), EliminateIdentity()]


@pytest.fixture(scope="module")
def program() -> Program:
    return fxc.trace(Chain(), torch.randn(2, 4, 9, 9))


@pytest.fixture(scope="module")
def data() -> Tensor:
    return torch.randn(32, 4, 9, 9, generator=torch.Generator().manual_seed(1))


def snapshots_of(passes: list[Pass], program: Program, data: Tensor) -> Snapshots:
    made = Snapshots(passes, PassManager(passes, calibration=data, verify="off").start(program, "", Stopwatch()))
    for _ in passes:
        made.apply_next()
    return made


@pytest.fixture(scope="module")
def snapshots(program: Program, data: Tensor) -> Snapshots:
    return snapshots_of(PASSES, program, data)


def assert_same(ours: Run | None, passes: list[Pass], program: Program, data: Tensor) -> None:
    assert ours is not None
    wanted = PassManager(passes, calibration=data, verify="off").run(program).program
    assert ours.program.module.code == wanted.module.code
    given, held = ours.program.module.state_dict(), wanted.module.state_dict()
    assert given.keys() == held.keys()
    assert all(torch.equal(given[name], held[name]) for name in held)


@pytest.mark.parametrize("name", ["conv1", "conv2", "conv3"])
def test_without_a_site_is_compiling_with_skip(snapshots: Snapshots, program: Program, data: Tensor, name: str) -> None:
    passes = [PASSES[0], StackKernels(rank=1, skip=name), PASSES[2]]
    assert_same(snapshots.without_site(1, name), passes, program, data)


def test_sites_before_the_one_left_out_are_not_fitted_again(snapshots: Snapshots) -> None:
    run = snapshots.without_site(1, "conv3")
    assert run is not None
    made = {site.name: site for site in run.record.passes[0].sites}
    assert made["conv1"].error == snapshots.reports[1].sites[0].error
    assert run.program.module.conv1 is not snapshots.programs[-1].module.conv1
    ours, theirs = (item.module.get_submodule("conv1.0") for item in (run.program, snapshots.programs[-1]))
    assert ours is theirs


def test_only_a_site_is_compiling_with_only(snapshots: Snapshots, program: Program, data: Tensor) -> None:
    assert_same(snapshots.only_site(1, "conv2", [1]), [PASSES[0], StackKernels(rank=1, only="conv2")], program, data)


def test_passes_that_cost_error_are_left_out_before_it(snapshots: Snapshots, program: Program, data: Tensor) -> None:
    assert_same(snapshots.only_site(1, "conv2", [0, 1]), [StackKernels(rank=1, only="conv2")], program, data)


def test_a_site_that_an_earlier_pass_made_is_none_without_it(program: Program, data: Tensor) -> None:
    snapshots = snapshots_of([StackKernels(rank=1), FoldBatchNorm()], program, data)
    assert [site.name for site in snapshots.reports[1].sites] == ["conv1.1", "conv2.1", "conv3.1"]
    assert snapshots.only_site(1, "conv1.1", [0]) is None
    run = snapshots.only_site(1, "conv1.1", [])
    assert run is not None
    assert [site.name for site in run.record.passes[0].sites if site.outcome == "kept"] == ["conv1.1"]


def test_without_a_pass_is_compiling_without_it(snapshots: Snapshots, program: Program, data: Tensor) -> None:
    assert_same(snapshots.without_pass(1), [PASSES[0], PASSES[2]], program, data)
