"""Sharing out a budget: against all combinations, and against the best that dual prices allow."""

from __future__ import annotations

import itertools

import pytest
from fxcompile.passes._allotment import Choice, allot, lower_hull
from hypothesis import given, settings
from hypothesis import strategies as st

Places = list[list[Choice]]


@st.composite
def places(draw: st.DrawFn) -> Places:
    """Up to four places with up to five choices each, the first of which is to leave it as it is."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        cost = draw(st.integers(1, 20))
        others = st.builds(Choice, st.integers(0, cost).map(float), st.integers(0, 30).map(float))
        found.append([Choice(float(cost), 0.0), *draw(st.lists(others, max_size=4))])
    return found


def total(choices: Places, chosen: list[int] | tuple[int, ...]) -> Choice:
    picked = [options[index] for options, index in zip(choices, chosen, strict=True)]
    return Choice(sum(item.cost for item in picked), sum(item.error for item in picked))


def all_totals(choices: Places) -> list[Choice]:
    return [total(choices, chosen) for chosen in itertools.product(*(range(len(options)) for options in choices))]


@settings(max_examples=300, deadline=None)
@given(places(), st.integers(0, 60))
def test_the_sum_is_within_the_budget_wherever_it_can_be(choices: Places, budget: int) -> None:
    found, every = total(choices, allot(choices, budget)), all_totals(choices)
    cheapest = min(item.cost for item in every)
    assert found.cost <= max(budget, cheapest)
    if budget < cheapest:
        assert found == min(item for item in every if item.cost == cheapest)


@settings(max_examples=300, deadline=None)
@given(places(), st.integers(0, 60))
def test_the_error_is_that_of_all_combinations_but_for_one_step(choices: Places, budget: int) -> None:
    found, every = total(choices, allot(choices, budget)), all_totals(choices)
    fit = [item for item in every if item.cost <= budget]
    if fit:
        largest = max(option.error for options in choices for option in options)
        assert found.error <= min(item.error for item in fit) + largest
    if budget >= sum(options[0].cost for options in choices):
        assert found.error == 0


def test_with_even_steps_it_is_the_least_error_there_is() -> None:
    """Convex errors in steps of one cost: then the greedy way is right."""
    choices = [[Choice(float(cost), float(factor * (6 - cost) ** 2)) for cost in range(6, -1, -1)]
               for factor in (1, 3, 10)]  # fmt: skip
    for budget in range(19):
        found = total(choices, allot(choices, budget))
        assert found.error == min(item.error for item in all_totals(choices) if item.cost <= budget)


def test_what_is_left_of_the_budget_buys_error_back() -> None:
    """The hull leads from 10 to 2 at once; what lies above it costs 9 and is better."""
    choices = [[Choice(10.0, 0.0), Choice(9.0, 8.0), Choice(2.0, 9.0)], [Choice(5.0, 0.0), Choice(1.0, 1.0)]]
    assert allot(choices, 14) == [0, 1]
    assert allot(choices, 10) == [1, 1]
    assert allot(choices, 8) == [2, 0]
    assert allot(choices, 15) == [0, 0]


@pytest.mark.parametrize(
    ("options", "hull"),
    [
        ([(4, 0), (3, 1), (2, 3), (1, 9)], [0, 1, 2, 3]),
        ([(4, 0), (3, 1), (2, 2), (1, 9)], [0, 2, 3]),
        ([(4, 0), (3, 5), (2, 2), (1, 9)], [0, 2, 3]),
        ([(4, 0), (4, 3), (2, 2), (2, 1)], [0, 3]),
        ([(4, 0), (5, 7), (3, 0)], [2]),
        ([(4, 0), (3, 4), (2, 6), (1, 6)], [0, 3]),
        ([(0, 0), (0, 0)], [0]),
    ],
)
def test_the_lower_hull(options: list[tuple[float, float]], hull: list[int]) -> None:
    assert lower_hull([Choice(*item) for item in options]) == hull
