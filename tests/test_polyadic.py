"""Canonical polyadic decompositions: how near they come, that their terms do not cancel, and that they are sums."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fxcompile.passes import _polyadic as polyadic
from helpers import conv, images, randn
from torch import Tensor

from fxcompile.patches import patches


def planted(shape: tuple[int, ...], rank: int, seed: int) -> Tensor:
    """A weight [g, O, C, *k] that is a sum of so many terms, one by one."""
    factors = [randn(shape[0], size, rank, seed=10 * seed + axis) for axis, size in enumerate(shape[1:])]
    total = torch.zeros(shape, dtype=torch.float64)
    for group in range(shape[0]):
        for term in range(rank):
            part = factors[0][group, :, term]
            for factor in factors[1:]:
                part = part.unsqueeze(-1) * factor[group, :, term]
            total[group] += part
    return total


def left(factors: Any, weight: Tensor) -> float:
    return float((polyadic.product(factors) - weight).norm() / weight.norm())


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((1, 8, 6, 3, 3), 4), ((2, 8, 6, 3, 3), 5), ((1, 12, 8, 5, 5), 10), ((1, 16, 16, 3, 3), 20), ((1, 9, 7, 5), 5),
     ((1, 6, 5, 3, 3, 2), 5), ((1, 6, 8, 1, 3), 3)],
)  # fmt: skip
def test_terms_that_were_planted_are_found(shape: tuple[int, ...], rank: int) -> None:
    for seed in range(2):
        assert left(polyadic.nearest_terms(planted(shape, rank, seed), rank), planted(shape, rank, seed)) < 1e-6


@pytest.mark.parametrize("shape", [(1, 4, 6, 3, 3), (2, 7, 3, 2, 2), (1, 3, 3, 8), (1, 2, 5, 2, 3, 1)])
@pytest.mark.parametrize("more", [0, 3])
def test_any_weight_is_a_sum_of_so_many_terms(shape: tuple[int, ...], more: int) -> None:
    weight = randn(*shape)
    factors = polyadic.nearest_terms(weight, polyadic.full_rank(shape[1:]) + more)
    assert left(factors, weight) < 1e-14
    assert all(bool(item.isfinite().all()) for item in factors)


def test_more_terms_come_nearer() -> None:
    weight = randn(1, 12, 10, 3, 3)
    errors = [left(polyadic.nearest_terms(weight, rank), weight) for rank in (1, 4, 16, 32, 60)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1


def test_one_term_is_the_best_one() -> None:
    """Of a matrix, whose best is known: the axes of one tap leave two."""
    weight = randn(1, 7, 5, 1, 1)
    values = torch.linalg.svdvals(weight.squeeze())
    assert left(polyadic.nearest_terms(weight, 2), weight) == pytest.approx(
        float((values[2:].square().sum() / values.square().sum()).sqrt()), rel=1e-6
    )


@pytest.mark.parametrize("size", [3, 6])
def test_terms_do_not_cancel(size: int) -> None:
    """a a b + a b a + b a a is the limit of two terms that grow without bound and cancel (de Silva and Lim 2008)."""
    a, b = (randn(size, seed=seed) / randn(size, seed=seed).norm() for seed in (1, 2))
    products = [(a, a, b), (a, b, a), (b, a, a)]
    weight = sum((torch.einsum("i,j,k->ijk", *item) for item in products), start=torch.zeros(()))[None]
    factors = polyadic.nearest_terms(weight, 2)
    sizes = torch.stack([item.square().sum(1) for item in factors]).prod(0)
    assert float(sizes.sum().sqrt()) <= 10 * float(weight.norm())
    assert left(factors, weight) < 0.3


def test_terms_that_would_cancel_are_held_no_more_than_they_must() -> None:
    """Free ones come to an error of 0.4246, and are forty times as large together as what they are to give."""
    weight = randn(1, 4, 4, 4, seed=2)
    factors = polyadic.nearest_terms(weight, 4)
    sizes = torch.stack([item.square().sum(1) for item in factors]).prod(0)
    assert float(sizes.sum().sqrt()) <= 10 * float(weight.norm())
    assert left(factors, weight) < 1.02 * 0.4246


def test_terms_are_balanced() -> None:
    factors = [randn(2, size, 4, seed=size) * 10.0**size for size in (3, 5, 2)]
    even = polyadic.balanced(factors)
    lengths = torch.stack([item.norm(dim=1) for item in even])
    assert float((lengths / lengths[0] - 1).abs().max()) < 1e-12
    assert float((polyadic.product(even) - polyadic.product(factors)).norm()) < 1e-9 * float(
        polyadic.product(factors).norm()
    )


def moments(weight: Tensor, padding: int = 1) -> Tensor:
    """S [g, F, F] of correlated inputs of a layer with a weight [g, O, C, *k]."""
    groups, _, channels, *kernel = weight.shape
    layer = conv(groups * channels, groups, *kernel, padding=padding, groups=groups)
    rows = patches(layer, images(40, groups * channels, *[9] * len(kernel)))
    return torch.einsum("rgf,rge->gfe", rows, rows) / len(rows)


def missed(factors: Any, weight: Tensor, gram: Tensor) -> float:
    lacks = (polyadic.product(factors) - weight).flatten(2)
    whole = weight.flatten(2)
    return math.sqrt(float((lacks @ gram * lacks).sum() / (whole @ gram * whole).sum()))


@pytest.mark.parametrize("shape", [(1, 16, 12, 3, 3), (2, 8, 6, 3, 3)])
def test_the_norm_of_the_data_and_joint_steps_lower_the_error_of_the_outputs(shape: tuple[int, ...]) -> None:
    weight = randn(*shape)
    gram = moments(weight)
    for rank in (4, 12):
        plain, near = polyadic.nearest_terms(weight, rank), polyadic.nearest_terms(weight, rank, gram)
        joint = polyadic.refined_terms(near, weight, gram)
        errors = [missed(item, weight, gram) for item in (plain, near, joint)]
        assert errors[1] < 0.85 * errors[0]
        assert errors[2] < errors[1]
        assert not polyadic.cancels(joint, weight)


def test_no_search_on_the_outputs_finds_something_much_better() -> None:
    """L-BFGS from random factors on what is minimised: the error of the outputs, held near the weight."""
    weight, rank = randn(1, 8, 6, 3, 3), 5
    gram = moments(weight)
    held = gram + 1e-2 * float(gram.diagonal(dim1=1, dim2=2).mean()) * torch.eye(gram.shape[1], dtype=torch.float64)
    found = missed(polyadic.refined_terms(polyadic.nearest_terms(weight, rank, gram), weight, gram), weight, held)
    best = math.inf
    for seed in range(6):
        free = [randn(1, size, rank, seed=20 + seed).requires_grad_() for size in weight.shape[1:]]
        search = torch.optim.LBFGS(free, max_iter=400, line_search_fn="strong_wolfe")

        def closure(free: Any = free, search: Any = search) -> float:
            search.zero_grad()
            lacks = (torch.einsum("gor,gcr,gir,gjr->gocij", *free) - weight).flatten(2)
            loss = (lacks @ held * lacks).sum()
            loss.backward()
            return loss.item()

        search.step(closure)
        if not polyadic.cancels([item.detach() for item in free], weight):
            best = min(best, missed([item.detach() for item in free], weight, held))
    assert found <= 1.05 * best
