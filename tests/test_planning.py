"""What a pass sees that decides on all sites together, and that its plan is made once for each run of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from helpers import Net, conv, randn
from torch import nn

from fxcompile.calibration import as_calibration
from fxcompile.contracts import Approximate, Exact
from fxcompile.manager import PassManager
from fxcompile.planning import Planning
from fxcompile.program import Program
from fxcompile.rewriting import Pass, Site
from fxcompile.tracing import trace


class Scaled(Pass):
    """Multiplies the weights by what the plan says; without one it has no sites."""

    name: ClassVar = "scaled"
    contract: ClassVar = Exact()
    factor: float = 0.0
    plans: ClassVar[list[Planning]] = []

    def plan(self, planning: Planning) -> Pass:
        self.plans.append(planning)
        return self.model_copy(update={"factor": 1.0 if len(planning.sites(self)) == 2 else 2.0})

    def sites(self, program: Program) -> Iterator[Site]:
        for node, _ in reversed(list(program.layers(nn.Conv2d))):
            yield Site.of(program, node)

    def rewrite(self, site: Site) -> list[nn.Module]:
        made = conv(4, 4, 3, 3)
        made.weight.data, made.bias.data = self.factor * site.layer.weight.data, self.factor * site.layer.bias.data
        return [made]


def network() -> Net:
    return Net(lambda m, x: m.second(m.first(x)), first=conv(4, 4, 3, 3), second=conv(4, 4, 3, 3, seed=7))


def planning_of(program: Program, calibration: torch.Tensor | None = None) -> Planning:
    data = None if calibration is None else as_calibration(calibration, program.inputs)
    return Planning(program, data, 0, lambda *_: None, [])


def test_what_is_planned_is_run_and_undone_in_the_place_of_the_pass() -> None:
    Scaled.plans.clear()
    result = PassManager([Scaled()], verify="rollback").run(trace(network(), randn(2, 4, 9, 9)))
    assert [site.outcome for site in result.record.passes[0].sites] == ["kept", "kept"]
    result = PassManager([Scaled(only="first")], verify="rollback").run(trace(network(), randn(2, 4, 9, 9)))
    assert [site.outcome for site in result.record.passes[0].sites] == ["rolled back"]
    assert len(Scaled.plans) == 2


def test_sites_are_those_selected_in_the_order_of_the_graph() -> None:
    planning = planning_of(trace(network(), randn(2, 4, 9, 9)))
    assert [site.name for site in planning.sites(Scaled())] == ["first", "second"]
    assert [site.name for site in planning.sites(Scaled(skip="first"))] == ["second"]


def test_batches_are_what_is_fitted_to_and_else_random() -> None:
    program, samples = trace(network(), randn(2, 4, 9, 9)), randn(40, 4, 9, 9, seed=3)
    planning = planning_of(program, samples)
    (fit, _) = as_calibration(samples, program.inputs).split(seed=0)
    assert torch.equal(torch.cat([batch[0] for batch in planning.batches]), next(iter(fit.tensors.values())))
    walk = planning.walk()
    assert [y.shape[0] for (y,) in walk.outputs()] == [len(batch[0]) for batch in planning.batches]
    (found,) = planning.outputs(planning.batches[:1])
    assert torch.equal(found[0], program.outputs(*planning.batches[0])[0])
    assert [batch[0].shape for batch in planning_of(program).batches] == [(2, 4, 9, 9)]


def test_a_fixed_batch_is_looked_at_whole_however_little_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcompile.planning.MEMORY", 1)
    program = trace(Net(lambda m, x: m.first(x).reshape(8, -1), first=conv(4, 4, 3, 3)), randn(16, 4, 9, 9))
    assert not program.batch_is_free
    assert [batch[0].shape for batch in planning_of(program, randn(80, 4, 9, 9)).batches] == [(16, 4, 9, 9)]


def test_a_fork_over_the_first_batches_gives_what_those_give() -> None:
    program = trace(network(), randn(2, 4, 9, 9))
    planning = planning_of(program, randn(80, 4, 9, 9, seed=3))
    walk = planning.walk()
    node = next(iter(program.layers(nn.Conv2d)))[0]
    values = walk.values_of(node)
    (found,) = walk.fork(node, [2 * values[0]]).outputs()
    second = program.module.get_submodule("second")
    with torch.no_grad():
        assert torch.equal(found[0], second(2 * values[0]))


def test_a_pass_without_a_plan_is_itself() -> None:
    class Plain(Pass):
        name: ClassVar = "plain"
        contract: ClassVar = Approximate()

    pass_ = Plain()
    assert pass_.plan(planning_of(trace(network(), randn(2, 4, 9, 9)))) is pass_
