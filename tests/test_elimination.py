"""Backward elimination against brute force: what is left makes up for what is gone as well as it can."""

from __future__ import annotations

import pytest
import torch
from fxcompile.passes._elimination import Taker, eliminate
from fxcompile.passes._stack_refining import held
from torch import Tensor


def moments(features: int, seed: int, groups: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(groups, features, features, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, 500, features, generator=generator, dtype=torch.float64) @ mixed
    return x.mT @ x / 500


def weights(outputs: int, features: int, seed: int, groups: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(groups, outputs, features, generator=generator, dtype=torch.float64)


def lost(weight: Tensor, gram: Tensor, kept: list[int]) -> float:
    """The share of squared outputs that the best weights over these features miss."""
    missed = whole = 0.0
    for w, s, own in zip(weight, held(gram), gram, strict=True):
        best = torch.linalg.solve(s[kept][:, kept], s[kept] @ w.T).T if kept else torch.zeros(len(w), 0).double()
        missed += float((w @ s @ w.T).trace() - (best @ s[kept] @ w.T).trace())
        whole += float((w @ own @ w.T).trace())
    return missed / whole


@pytest.mark.parametrize(("units", "taps", "groups"), [(9, 1, 1), (7, 3, 1), (6, 2, 2)])
def test_always_the_unit_goes_that_is_missed_the_least(units: int, taps: int, groups: int) -> None:
    features = units * taps
    gram, weight = moments(features, units, groups), weights(5, features, units, groups)
    places = torch.randperm(features, generator=torch.Generator().manual_seed(0)).reshape(units, taps)
    steps = eliminate([Taker.of(weight, gram, {0: places})], [units], [units - 1], [1.0])
    left, total = list(range(units)), 0.0
    for step in steps:

        def without(unit: int) -> float:
            return lost(weight, gram, [f for u in left if u != unit for f in places[u].tolist()])

        best = min(left, key=without)
        assert step.unit == best
        rate, total = without(best) - total, without(best)
        assert step.rate >= rate - 1e-9
        left.remove(best)
    assert len(left) == 1
    assert [step.rate for step in steps] == sorted(step.rate for step in steps)


def test_two_groups_that_one_layer_takes_stand_in_for_each_other() -> None:
    """The same channels twice: either copy may go, and none goes twice while others are missed less."""
    units = 6
    half = moments(units, 3) + 5 * torch.eye(units).double()
    gram = torch.cat([torch.cat([half, half], 2), torch.cat([half, half], 2)], 1)
    weight = weights(4, 2 * units, 1)
    places = {0: torch.arange(units).unsqueeze(1), 1: torch.arange(units, 2 * units).unsqueeze(1)}
    steps = eliminate([Taker.of(weight, gram, places)], [units, units], [units - 1] * 2, [1.0, 1.0])
    first = [step.unit for step in steps[:units]]
    assert sorted(first) == list(range(units))
    assert steps[units - 1].rate < 0.1 * steps[units].rate


def test_layers_that_matter_more_and_units_that_save_more_decide() -> None:
    gram = torch.eye(2).double()[None]
    plain = torch.tensor([[[1.0, 0.9]]]).double()
    other = torch.tensor([[[0.9, 1.0]]]).double()
    places = {0: torch.tensor([[0], [1]])}
    for matters, gone in ((0.1, 1), (10.0, 0)):
        takers = [Taker.of(plain, gram, places), Taker.of(other, gram, places, matters)]
        (step,) = eliminate(takers, [2], [1], [1.0])
        assert step.unit == gone
    groups = {0: torch.tensor([[0]]), 1: torch.tensor([[1]])}
    for price, gone in ((1.0, 1), (0.5, 0)):
        step = eliminate([Taker.of(plain, gram, groups)], [1, 1], [1, 1], [1.0, price])[0]
        assert step.group == gone


def test_many_units_go_several_at_a_step_and_those_gone_are_forgotten() -> None:
    """Steps of several, and smaller matrices on the way, end near the loss at which single steps end."""
    units = 160
    gram, weight = moments(units, 5), weights(30, units, 5)
    steps = eliminate([Taker.of(weight, gram, {0: torch.arange(units).unsqueeze(1)})], [units], [units // 2], [1.0])
    assert len({step.unit for step in steps}) == units // 2
    kept = sorted(set(range(units)) - {step.unit for step in steps})
    left = list(range(units))
    system = held(gram)[0]
    while len(left) > units // 2:  # one by one, from scratch each time
        inverse = torch.linalg.inv(system[left][:, left])
        best = inverse @ system[left] @ weight[0].T
        saliency = best.square().sum(1) / inverse.diagonal()
        del left[int(saliency.argmin())]
    assert lost(weight, gram, kept) < 1.02 * lost(weight, gram, left)


def test_a_layer_that_gives_nothing_has_no_say() -> None:
    gram = moments(4, 2)
    silent = Taker.of(torch.zeros(1, 3, 4).double(), gram, {0: torch.arange(4).unsqueeze(1)})
    steps = eliminate([silent], [4], [3], [1.0])
    assert [step.rate for step in steps] == [0.0] * 3
