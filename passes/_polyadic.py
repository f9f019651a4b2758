"""The mathematics of `bottleneck` with `style=cp`: a kernel as a sum of products of one vector for each of its axes.

Weights are split by group, [g, O, C, *k], in float64. The canonical polyadic decomposition of R terms is

    W[o, c, i, j] ~ sum_r outer[o, r] inner[c, r] first[i, r] second[j, r]

a layer over single pixels, C -> R, one for each axis of the kernel in which every channel stays by itself, and R -> O
over single pixels (Lebedev et al. 2015). Factors come in the order of W's axes, [g, O, R], [g, C, R], [g, k, R] ...
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, linalg

from . import _separable as separable
from ._stack_refining import cholesky_factor, held

_SWEEPS, _FEWEST, _TRIAL, _STARTS, _ENOUGH = 300, 5, 30, 4, 1e-5
_WORK = 3e10
"""Operations of all sweeps from one start, and of all joint steps."""

_RIDGES = (1e-10, 1e-4, 1e-3, 1e-2, 1e-1)
"""Tried in turn until terms do not cancel: a share of the mean of the system's diagonal, added to it."""

_CANCELLING = 10.0
"""How large all terms may be together, beside the weight: where they cancel, float32 would lose as many digits."""

_DAMPING = 1e-4
_STEPS, _ROUND, _ENOUGH_STEPS = (12, 120), 30, 0.99


def full_rank(shape: Sequence[int]) -> int:
    """The terms from which on a weight [O, C, *k] is kept exactly, by a product for each but the longest axis's."""
    return math.prod(shape) // max(shape)


def product(factors: Sequence[Tensor]) -> Tensor:
    """W [g, O, C, *k]."""
    outer, terms, *axes = factors
    for axis in axes:
        terms = torch.einsum("gmr,gnr->gmnr", terms, axis).flatten(1, 2)
    return (outer @ terms.mT).reshape(len(outer), *[item.shape[1] for item in factors])


def nearest_terms(weight: Tensor, rank: int, gram: Tensor | None = None, sweeps: int | None = None) -> list[Tensor]:
    """Factors of `rank` terms near W [g, O, C, *k] that do not cancel.

    By alternating least squares, from several starts where that takes no time; the best is not known to be found. With
    S [g, F, F] of the inputs, near in the norm that it gives channels, and the best `outer` for the others. `sweeps`
    are from one start, and by default what a fixed amount of arithmetic allows.
    """
    if gram is None or rank >= full_rank(weight.shape[1:]):
        return _terms(weight, rank, sweeps)
    metric = separable.input_metric(gram, weight.shape[2], weight.shape[3:], ())
    root = cholesky_factor(metric, 1e-6)
    factors = _terms(torch.einsum("gcd,goc...->god...", root, weight), rank, sweeps)
    factors[1] = linalg.solve_triangular(root.mT, factors[1], upper=True)
    return [_best_outer(factors, weight, gram), *factors[1:]]


def refined_terms(factors: Sequence[Tensor], weight: Tensor, gram: Tensor, steps: int | None = None) -> list[Tensor]:
    """Factors with a smaller tr(E S' E^T), S' = S + ridge mean(diag S) I, or as they were.

    In rounds: the best `outer`, then L-BFGS on all factors, each in coordinates in which its own Hessian would be the
    identity if S were a product over the axes. `steps` is by default what a fixed amount of arithmetic allows.
    """
    moments = held(gram)
    work = 2.0 * weight.numel() * (gram.shape[2] + 3 * factors[0].shape[2])
    steps = steps or min(max(int(_WORK / work), _STEPS[0]), _STEPS[1])
    total = (weight.flatten(2) @ moments * weight.flatten(2)).sum().clamp_min(1e-300)
    metrics = _metrics(moments, weight.shape)

    def error(items: Sequence[Tensor]) -> Tensor:
        lacks = (weight - product(items)).flatten(2)
        return (lacks @ moments * lacks).sum() / total

    found, least = list(factors), error(factors)
    for done in range(0, steps, _ROUND):
        moved = balanced([_best_outer(found, weight, moments), *found[1:]])
        moved = _descended(moved, metrics, error, min(steps - done, _ROUND))
        reached = error(moved)
        if not reached < least or cancels(moved, weight):
            break
        enough = reached > _ENOUGH_STEPS * least
        found, least = moved, reached
        if enough:
            break
    return balanced(found)


def _metrics(moments: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """For each axis of W [g, O, C, *k], [g, n, n]: the moments between its places, a mean over those of the others."""
    groups, outputs, *inputs = shape
    both = moments.reshape(groups, *inputs, *inputs)
    letters = string.ascii_lowercase[: len(inputs)]
    found = [torch.eye(outputs, dtype=moments.dtype).expand(groups, -1, -1)]
    for axis, letter in enumerate(letters):
        own = torch.einsum(f"Z{letters}{letters.replace(letter, 'Y')}->Z{letter}Y", both)
        found.append(own * (inputs[axis] / own.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]))
    return found


def _descended(
    factors: Sequence[Tensor], metrics: Sequence[Tensor], error: Callable[[Sequence[Tensor]], Tensor], steps: int
) -> list[Tensor]:
    """At most so many steps of L-BFGS on X = A^-T Y B^-1, for each factor X with A its metric's Cholesky factor and B
    that of what all others make of its terms.
    """
    overlaps = [item.mT @ metric @ item for item, metric in zip(factors, metrics, strict=True)]
    left = [cholesky_factor(metric, _DAMPING) for metric in metrics]
    right = [
        cholesky_factor(torch.stack([*overlaps[:at], *overlaps[at + 1 :]]).prod(0), _DAMPING)
        for at in range(len(factors))
    ]
    entered = [a.mT @ x @ b for a, x, b in zip(left, factors, right, strict=True)]
    free = [y.contiguous().requires_grad_() for y in entered]

    def placed(items: Sequence[Tensor]) -> list[Tensor]:
        found = [linalg.solve_triangular(b, y, upper=False, left=False) for b, y in zip(right, items, strict=True)]
        return [linalg.solve_triangular(a.mT, x, upper=True) for a, x in zip(left, found, strict=True)]

    search = torch.optim.LBFGS(free, max_iter=steps, history_size=20, tolerance_grad=0, tolerance_change=0,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> float:
        search.zero_grad()
        loss = error(placed(free))
        loss.backward()
        return float(loss.detach())

    with torch.enable_grad():
        search.step(closure)
    search.state.clear()  # the gradients and steps of the past, which only the garbage collector would free
    return placed([y.detach() for y in free])


def balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same terms, of each the vectors of one length."""
    lengths = [item.norm(dim=1, keepdim=True).clamp_min(1e-150) for item in factors]
    mean = torch.stack(lengths).log().mean(0).exp()
    return [item * (mean / length) for item, length in zip(factors, lengths, strict=True)]


def cancels(factors: Sequence[Tensor], weight: Tensor) -> bool:
    """Whether the terms of any group are much larger than their sum should be; or not finite."""
    terms = torch.stack([item.square().sum(1) for item in factors]).prod(0).sum(1)
    size = weight.flatten(1).square().sum(1)
    return not bool((terms <= _CANCELLING**2 * size.clamp_min(1e-300)).all())


def _best_outer(factors: Sequence[Tensor], weight: Tensor, gram: Tensor) -> Tensor:
    """The outer factor that is best given the others: X (D S D^T) = W S D^T, D [g, R, F] the terms without it."""
    ones = torch.eye(factors[0].shape[2], dtype=weight.dtype).expand(len(weight), -1, -1)
    design = product([ones, *factors[1:]]).flatten(2)
    seen = design @ gram
    factor = cholesky_factor(seen @ design.mT, 1e-9)
    return torch.cholesky_solve(seen @ weight.flatten(2).mT, factor).mT


def _terms(weight: Tensor, rank: int, sweeps: int | None) -> list[Tensor]:
    """Alternation in the Frobenius norm over the axes that have more than one place."""
    if rank >= full_rank(weight.shape[1:]):
        return balanced(_every_product(weight, rank))
    for ridge in _RIDGES:
        found = balanced(_alternated(weight, rank, ridge, sweeps))
        if not cancels(found, weight):
            break
    return found


def _every_product(weight: Tensor, rank: int) -> list[Tensor]:
    """A term for each place on all axes but the longest, whose vector is what the weight has there; exact."""
    groups, *shape = weight.shape
    longest = shape.index(max(shape))
    others = [size for axis, size in enumerate(shape) if axis != longest]
    places = iter(torch.unravel_index(torch.arange(math.prod(others)), others))
    spare = rank - math.prod(others)
    factors = []
    for axis, size in enumerate(shape):
        if axis == longest:
            factor = weight.movedim(1 + axis, 1).flatten(2)
        else:
            factor = torch.eye(size, dtype=weight.dtype)[:, next(places)].expand(groups, -1, -1)
        factors.append(torch.nn.functional.pad(factor, (0, spare)))
    return factors


def _alternated(weight: Tensor, rank: int, ridge: float, given: int | None) -> list[Tensor]:
    """The best of a few starts, each a share of the sweeps, with the rest of them; all `given` ones from one start."""
    if given is not None:
        return _sweep(weight, _start(weight, rank, 0), ridge, given)[0]
    sweeps = min(max(int(_WORK / (2.0 * weight.dim() * weight.numel() * rank)), _FEWEST), _SWEEPS)
    starts = [_start(weight, rank, seed) for seed in range(_STARTS if sweeps == _SWEEPS else 1)]
    trial = min(_TRIAL, sweeps)
    tried = [_sweep(weight, start, ridge, trial) for start in starts]
    return _sweep(weight, min(tried, key=lambda item: item[1])[0], ridge, sweeps - trial)[0]


def _start(weight: Tensor, rank: int, seed: int) -> list[Tensor]:
    """Leading singular vectors of each axis, and random ones where these are not enough; all random but at first."""
    generator = torch.Generator().manual_seed(seed)
    factors = []
    for axis in range(1, weight.dim()):
        size = weight.shape[axis]
        factor = torch.randn(len(weight), size, rank, generator=generator, dtype=torch.float64).to(weight)
        if seed == 0:
            rows = weight.movedim(axis, 1).flatten(2)
            leading: Tensor = linalg.eigh(rows @ rows.mT).eigenvectors.flip(2)
            factor[:, :, : min(size, rank)] = leading[:, :, :rank] * math.sqrt(size)
        factors.append(factor)
    return factors


def _sweep(weight: Tensor, factors: list[Tensor], ridge: float, sweeps: int) -> tuple[list[Tensor], float]:
    """At most so many rounds of solving for each factor in turn; and the squared error that is left."""
    error = before = math.inf
    found = list(factors)
    for _ in range(sweeps):
        behind = torch.einsum("go...,gor->g...r", weight, found[0])
        for axis in reversed(range(len(found))):
            others = [item.mT @ item for at, item in enumerate(found) if at != axis]
            system = torch.stack(others).prod(0)
            wanted = _contracted(weight, found, axis, behind if axis else None)
            found[axis] = torch.cholesky_solve(wanted.mT, cholesky_factor(system, ridge)).mT
        found = balanced(found)
        error = float((weight - product(found)).square().sum())
        if not error < before * (1 - _ENOUGH):
            break
        before = error
    return found, error


def _contracted(weight: Tensor, factors: Sequence[Tensor], axis: int, behind: Tensor | None = None) -> Tensor:
    """[g, n, R]: W times the other factors, the longest first, which leaves the least to do for the rest.

    Args:
        behind: W times the first factor, [g, C, *k, R], where that is known.
    """
    left = string.ascii_lowercase[: len(factors)]
    kept, done, value = left[axis], "", weight
    others = sorted((at for at in range(len(factors)) if at != axis), key=lambda at: -factors[at].shape[1])
    if behind is not None:
        left, done, value = left[1:], "R", behind
        others.remove(0)
    for letter, factor in [(string.ascii_lowercase[at], factors[at]) for at in others]:
        rest = left.replace(letter, "")
        value = torch.einsum(f"Z{left}{done},Z{letter}R->Z{rest}R", value, factor)
        left, done = rest, "R"
    assert left == kept
    return value
