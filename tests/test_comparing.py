"""A difference is relative to the largest value, and what is not finite must be so in both."""

from __future__ import annotations

import pytest
import torch

from fxcompile.comparing import Broken, compare, relative_maximum


def test_compare_is_relative_to_the_largest_value() -> None:
    wanted = torch.tensor([1000.0, 1e-3])
    compare(torch.tensor([1000.0, 2e-3]), wanted, 1e-5)
    with pytest.raises(Broken, match=r"differs by 1\.00e-03"):
        compare(torch.tensor([1001.0, 1e-3]), wanted, 1e-5)
    with pytest.raises(Broken, match="shape"):
        compare(torch.zeros(2), torch.zeros(3), 1.0)
    with pytest.raises(Broken, match="1 of 2 elements"):
        compare(torch.tensor([1, 2]), torch.tensor([1, 3]), 1.0)


def test_non_finite_values_must_be_at_the_same_places() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert relative_maximum(nan, nan) == 0
    assert relative_maximum(torch.tensor([1.0, 2.0]), nan) == float("inf")
    assert relative_maximum(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_maximum(torch.ones(2), torch.zeros(2)) == float("inf")


def test_complex_numbers_differ_by_both_of_their_parts() -> None:
    ours, theirs = torch.tensor([3 + 4j, 1.0]), torch.tensor([3 + 3j, 4 + 3j])
    assert relative_maximum(ours, theirs) == pytest.approx(18**0.5 / 5)
