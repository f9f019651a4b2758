"""The distance between two computations, against numpy on all batches at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxcompile.distance import Distance

numbers = st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.floats(-1e3, 1e3, width=32)), min_size=1, max_size=20)


def distance(*batches: tuple[torch.Tensor, torch.Tensor]) -> Distance:
    made = Distance()
    for ours, theirs in batches:
        made.add(ours, theirs)
    return made


@given(st.lists(numbers, min_size=1, max_size=4))
def test_batches_add_up_to_the_relative_norm_of_the_whole(batches: list[list[tuple[float, float]]]) -> None:
    a, b = np.array([pair for batch in batches for pair in batch]).T
    found = distance(*(tuple(torch.tensor(batch, dtype=torch.float64).T) for batch in batches)).value  # type: ignore[misc]
    scale = np.linalg.norm(b)
    if scale == 0:
        assert found == (0.0 if np.linalg.norm(a) == 0 else float("inf"))
    else:
        assert found == pytest.approx(np.linalg.norm(a - b) / scale, rel=1e-9, abs=1e-15)


def test_integers_count_what_differs() -> None:
    first = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])
    assert distance(first, (torch.tensor([True]), torch.tensor([True]))).value == 0.25


def test_complex_numbers_have_the_norm_of_their_parts() -> None:
    a, b = torch.tensor([1 + 2j, 3j]), torch.tensor([1 + 1j, 4j])
    assert distance((a, b)).value == pytest.approx(abs(np.array([1j, -1j])).sum() ** 0.5 / 18**0.5)


def test_only_a_value_that_is_finite_in_one_alone_tears() -> None:
    both = torch.tensor([float("nan"), 1.0, float("inf")])
    assert distance((both, both)).value == 0.0
    assert distance((both + 1, both)).value == 1.0
    assert distance((torch.tensor([1.0, 1.0, 1.0]), both)).value == float("inf")
    assert distance((both, torch.tensor([1.0, 1.0, 1.0]))).value == float("inf")


def test_joined_distances_are_one_over_all_batches() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(5), torch.randn(5)) for _ in range(4)]
    left, right = distance(*batches[:2]), distance(*batches[2:])
    left.join(right)
    assert left.value == distance(*batches).value
