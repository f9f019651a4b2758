"""Finds the stages of a stack from the weight alone: a factorisation of W into a chain of small convolutions.

A DFT on a grid of exactly k points has no wrap-around and turns the chain into a matrix product at each frequency,
W^(f) = X_n^(f) ... X_1^(f): that is how everything here is computed, for 1, 2 and 3 dimensions alike. Weights are
split, [g, O, C, *k] in float64; spectra are [g, f, O, C]. Scalars of the method are kept per group.

Extrapolated alternating least squares: Ang, Cohen, Gillis and Hien 2021; the rest is derived here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, linalg

from fxcompile.layer_stats import check_finite

from ._ranks import energy_rank, rounded_up
from ._stack_algebra import cut, exact_width, split, squares, stage_kernels

AMPLIFICATION_LIMIT = 4.0
"""How far a stack may multiply independent relative errors of its weights; above it the fit is regularised more."""
_FLOPS, _SWEEPS, _STARTS, _DIRECT = 3e11, (8, 200), 512, 200
_START_RIDGE, _MOST_RIDGE, _PROXIMAL, _CONVERGED = 1e-3, 1e-2, 1e-10, 1e-4


def stack(
    weight: Tensor,
    widths: Sequence[int],
    groups: int = 1,
    generator: torch.Generator | None = None,
    sweeps: int | None = None,
    limit: float = AMPLIFICATION_LIMIT,
) -> list[Tensor]:
    """Stages of 3 whose chain is near `weight` [O, C/g, *k] in Frobenius norm; `widths[i]` channels after stage i.

    Alternating least squares on |W - chain|^2 + mu sum |X_i|^2: each outer stage is an exact solve shared by all
    outputs (or inputs), an inner one some steps of conjugate gradients. It starts at the best subspace of windows of
    W; mu falls from 1e-3 to 0 (which avoids the swamps that cancelling factors make), and rises again where
    `amplification` passes `limit`. Sweeps are as many as a fixed amount of arithmetic allows, between 8 and 200.
    """
    generator = generator or torch.Generator().manual_seed(0)
    target, kernels = split(weight, groups), stage_kernels(weight.shape[2:])
    if len(widths) != len(kernels) - 1 or any(m < groups or m % groups for m in widths):
        raise ValueError(f"{len(kernels) - 1} widths that are multiples of {groups} are wanted, not {list(widths)}")
    shape = [m // groups for m in widths]
    check_finite(target, "weights")
    norm = target.flatten(1).norm(dim=1).clamp_min(1e-300)
    target = target / _like(norm, target)
    starts = min(_STARTS // (target.shape[1] * target.shape[2]), 8, 8 * _STARTS // groups)
    if starts > 1:
        stages = _alternate(target, _best_of(starts, target, shape, kernels, generator, limit), sweeps, limit)
    else:
        stages = _fit(target, shape, kernels, generator, sweeps, limit, groups)
    scale = norm.pow(1 / len(stages))
    return [(x * _like(scale, x)).flatten(0, 1) for x in stages]


def energy_widths(weight: Tensor, energy: float, groups: int = 1, round_to: int = 1, sweeps: int = 12) -> list[int]:
    """The fewest channels between the stages of `stack` that keep this share of the squared norm of W in every group.

    A chain of M channels has rank M at each frequency, so what the leading M singular values of W^ leave out there is
    lost (Eckart and Young): with fewer channels than these need none is tried. The rest is bisection, up to
    `exact_width`. Rounded up to a multiple of `round_to`.
    """
    target, most = split(weight, groups), exact_width(weight.shape, groups)
    squared = target.flatten(1).square().sum(1)
    values = linalg.svdvals(torch.fft.fftn(target, dim=tuple(range(3, target.dim()))).flatten(3).movedim(3, 1))
    low, high = energy_rank(values.square().sum(1).sqrt(), energy), most[0] // groups
    while low < high:
        middle = (low + high) // 2
        stages = stack(weight, [middle * groups] * len(most), groups, sweeps=sweeps)
        lost = _error(target, [split(x, groups) for x in stages])
        low, high = (low, middle) if bool((lost <= (1 - energy) * squared).all()) else (middle + 1, high)
    return [rounded_up(low, groups, round_to) * groups] * len(most)


def _best_of(
    starts: int,
    target: Tensor,
    widths: list[int],
    kernels: list[tuple[int, ...]],
    generator: torch.Generator,
    limit: float,
) -> list[Tensor]:
    """Group by group the best of several short fits, for few channels: more local minima, and cheap sweeps."""
    groups, repeated = len(target), target.repeat(starts, *[1] * (target.dim() - 1))
    stages = _fit(repeated, widths, kernels, generator, 10, limit, groups)
    errors = _error(repeated, stages).reshape(starts, groups)
    best = errors.argmin(0) * groups + torch.arange(groups, device=target.device)
    return [x[best] for x in stages]


def _fit(
    target: Tensor,
    widths: list[int],
    kernels: list[tuple[int, ...]],
    generator: torch.Generator,
    sweeps: int | None,
    limit: float,
    seen: int,
) -> list[Tensor]:
    """Stages of `target` [g, O, C, *k]; groups after the first `seen` start at random.

    If W is the chain (rest, last), each window W[o, :, u + .] of the size of `rest` is a sum of shifted kernels of
    `rest`: the leading right singular vectors of all windows are those kernels, up to shifts. `rest` is fitted first.
    """
    rest = [k - s + 1 for k, s in zip(target.shape[3:], kernels[-1], strict=True)]
    windows = target
    for axis, size in enumerate(rest):
        windows = windows.unfold(3 + axis, size, 1)  # [g, O, C, *k_last, *rest]
    windows = windows.movedim(2, 2 + len(rest)).flatten(1, 1 + len(rest)).flatten(2)
    found = _leading(windows[:seen], widths[-1], generator)
    start = torch.randn(len(target), widths[-1], windows.shape[2], generator=generator, dtype=torch.float64).to(target)
    start *= found.norm(dim=2).mean() / start.shape[2] ** 0.5
    start[:seen, : found.shape[1]] = found
    early = [start.unflatten(2, (target.shape[2], *rest))]
    if len(kernels) > 2:
        early = _fit(early[0], widths[:-1], kernels[:-1], generator, sweeps, limit, seen)
    last = target.new_zeros(*target.shape[:2], widths[-1], *kernels[-1])
    return _alternate(target, [*early, last], sweeps, limit)


def _leading(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The `count` leading right singular vectors of `rows` [g, n, m] times their singular values."""
    count = min(count, *rows.shape[1:])
    if min(rows.shape[1:]) <= 1024:
        return _scaled(rows)[:, :count]
    sketch = torch.randn(len(rows), rows.shape[2], count + 8, generator=generator, dtype=torch.float64).to(rows)
    for _ in range(3):
        sketch = linalg.qr(rows.mT @ (rows @ sketch))[0]
    return _scaled(rows @ sketch)[:, :count] @ sketch.mT


def _scaled(rows: Tensor) -> Tensor:
    """All right singular vectors, as rows, times their singular values."""
    values: tuple[Tensor, Tensor, Tensor] = linalg.svd(rows, full_matrices=False)
    return values[1][:, :, None] * values[2]


def _alternate(target: Tensor, stages: list[Tensor], sweeps: int | None, limit: float) -> list[Tensor]:
    """The stages after the sweeps; `stages[-1]` is found first. A group that has settled drops out.

    After a sweep the stages are extrapolated along their last change, further each time that lowers the objective.
    """
    grid = target.shape[3:]
    sweeps = sweeps or min(max(int(_FLOPS / _work(stages, grid)), _SWEEPS[0]), _SWEEPS[1])
    decay = max(0.5, 1e-5 ** (3 / sweeps))
    wanted, squared = spectrum(target, grid), target.flatten(1).square().sum(1)
    ridge = torch.full_like(squared, _START_RIDGE ** (len(stages) / 2))  # more stages collapse to zero sooner
    step = torch.ones_like(squared)
    active, reached = torch.arange(len(target), device=target.device), torch.full_like(squared, math.inf)
    stages = balance([*stages[:-1], _solve(wanted, stages, len(stages) - 1, grid, ridge)])
    result = [x.clone() for x in stages]
    for sweep in range(sweeps):
        before, last = stages, reached
        for at in range(len(stages)):
            stages = [*stages[:at], _solve(wanted, stages, at, grid, ridge), *stages[at + 1 :]]
        stages = balance(stages)
        reached = _error(target, stages, ridge)
        if sweep:
            further = [x + _like(step, x) * (x - y) for x, y in zip(stages, before, strict=True)]
            theirs = _error(target, further, ridge)
            better = theirs < reached
            stages = [torch.where(_like(better, x), y, x) for x, y in zip(stages, further, strict=True)]
            reached = torch.where(better, theirs, reached)
            step = torch.where(better, step * 1.5, (step / 3).clamp_min(0.5))
        done = (last - reached <= 2 * _CONVERGED * reached) | (reached <= 1e-24 * squared)
        done &= (ridge < 1e-8) & (sweep >= _SWEEPS[0])
        done |= sweep == sweeps - 1
        if bool(done.any()):
            for whole, x in zip(result, stages, strict=True):
                whole[active[done]] = x[done]
            held = (active, target, wanted, squared, ridge, step, reached, *stages)
            active, target, wanted, squared, ridge, step, reached, *stages = (x[~done] for x in held)
            if not len(active):
                break
        cancelling = squares(stages) > limit**2 * squared
        ridge = torch.where(
            cancelling, (ridge * 3 + 1e-9).clamp_max(_MOST_RIDGE), torch.where(ridge > 1e-8, ridge * decay, 0)
        )
    return result


def _error(target: Tensor, stages: Sequence[Tensor], ridge: Tensor | None = None) -> Tensor:
    """[g]: |W - chain|^2, plus ridge times sum |X_i|^2."""
    grid = target.shape[3:]
    error = (target - taps(chain([spectrum(x, grid) for x in stages]), grid)).flatten(1).square().sum(1)
    return error if ridge is None else error + ridge * sum(x.flatten(1).square().sum(1) for x in stages)


def _solve(wanted: Tensor, stages: list[Tensor], at: int, grid: torch.Size, ridge: Tensor) -> Tensor:
    """The stage at `at` that minimises |W - L X R|^2 + ridge |X|^2, with R and L the chains before and after it.

    Solved for the change of X, so that rounding is relative to the residual. 1e-10 of the mean diagonal is added to the
    normal matrix but not to the gradient: a proximal step, which never raises the objective nor moves its minimum.
    """
    x, spectra = stages[at], [spectrum(s, grid) for s in stages]
    before, after, residual = spectra[:at], spectra[at + 1 :], wanted - chain(spectra)
    if not after:
        right = chain(before)
        gradient = crop(taps(residual @ right.mH, grid), x.shape[3:]) - _like(ridge, x) * x
        return x + _normal_step(right @ right.mH, gradient, grid, ridge)
    if not before:
        left = chain(after)
        gradient = crop(taps(left.mH @ residual, grid), x.shape[3:]) - _like(ridge, x) * x
        return x + _normal_step((left.mH @ left).mT, gradient.transpose(1, 2), grid, ridge).transpose(1, 2)
    left, right = chain(after), chain(before)
    gradient = crop(taps(left.mH @ residual @ right.mH, grid), x.shape[3:]) - _like(ridge, x) * x
    outer, inner = left.mH @ left, right @ right.mH
    if x[0].numel() > _DIRECT:
        return x + _gradient_steps(outer, inner, gradient, grid, ridge)
    pairs = torch.einsum("gfab,gfdc->gfbdac", outer, inner).flatten(4).flatten(2, 3)
    return x + _normal_step(pairs, gradient.flatten(1, 2)[:, None], grid, ridge).reshape(x.shape)


def _normal_step(gram: Tensor, gradient: Tensor, grid: torch.Size, ridge: Tensor) -> Tensor:
    """The X [g, O, M, *k] at which crop(taps(X^ gram)) = gradient: all outputs share one system of size M |k|.

    Its matrix is block Toeplitz, G[(m, u), (n, v)] = P[m, n, v - u] with P the taps of `gram` [g, f, M, M].
    """
    kernel = gradient.shape[3:]
    offsets = torch.cartesian_prod(*[torch.arange(k) for k in kernel]).reshape(-1, len(kernel))
    lags = torch.zeros(len(offsets), len(offsets), dtype=torch.long)
    for axis, points in enumerate(grid):
        lags = lags * points + (offsets[None, :, axis] - offsets[:, None, axis]) % points
    normal = taps(gram, grid).flatten(3)[..., lags].transpose(2, 3).flatten(3).flatten(1, 2)
    return _positive_solve(normal, gradient.flatten(2).mT, ridge).mT.reshape(gradient.shape)


def _positive_solve(normal: Tensor, wanted: Tensor, ridge: Tensor) -> Tensor:
    """(normal + ridge + tiny) x = wanted, for positive semidefinite `normal` [g, n, n], which is overwritten.

    Raises:
        FitError: a number is NaN or infinite.
    """
    check_finite(normal, "products of kernels")
    diagonal = normal.diagonal(dim1=1, dim2=2)
    tiny = _PROXIMAL * diagonal.mean(1) + 1e-300
    diagonal += (ridge + tiny)[:, None]
    factor, failed = linalg.cholesky_ex(normal)
    while bool(failed.any()):
        tiny = 100 * tiny
        diagonal += tiny[:, None]
        factor, failed = linalg.cholesky_ex(normal)
    return torch.cholesky_solve(wanted, factor)


def _gradient_steps(
    outer: Tensor, inner: Tensor, gradient: Tensor, grid: torch.Size, ridge: Tensor, steps: int = 8
) -> Tensor:
    """A good change of an inner stage by conjugate gradients, each step of which lowers the objective.

    The system, outer X^ inner with outer = L^H L and inner = R R^H, couples all of X; the sums of the two over all
    frequencies precondition it.
    """
    kernel = gradient.shape[3:]
    factors = [_positive_factor(taps(gram, grid).flatten(3)[..., 0]) for gram in (outer, inner)]

    def apply(v: Tensor) -> Tensor:
        return crop(taps(outer @ spectrum(v, grid) @ inner, grid), kernel) + _like(ridge, v) * v

    def precondition(v: Tensor) -> Tensor:
        rows = torch.cholesky_solve(v.flatten(2), factors[0]).reshape(v.shape).transpose(1, 2)
        return torch.cholesky_solve(rows.flatten(2), factors[1]).reshape(rows.shape).transpose(1, 2)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1)

    change, left_over = torch.zeros_like(gradient), gradient
    direction = fixed = precondition(left_over)
    slope = dot(left_over, fixed)
    for _ in range(steps):
        image = apply(direction)
        length = slope / dot(direction, image).clamp_min(1e-300)
        change = change + _like(length, change) * direction
        left_over = left_over - _like(length, change) * image
        fixed = precondition(left_over)
        before, slope = slope, dot(left_over, fixed)
        direction = fixed + _like(slope / before.clamp_min(1e-300), change) * direction
    return change


def _positive_factor(gram: Tensor) -> Tensor:
    """Cholesky factor of `gram` [g, n, n], semidefinite, with 1e-6 of its mean diagonal added."""
    extra = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-300
    factor: Tensor = linalg.cholesky(gram + torch.diag_embed(extra[:, None].expand(gram.shape[:2])))
    return factor


def balance(stages: list[Tensor]) -> list[Tensor]:
    """The same chain with equal norms on both sides of each channel between stages."""
    stages = list(stages)
    for at in range(len(stages) - 1):
        into, out = stages[at].flatten(2).norm(dim=2), stages[at + 1].transpose(1, 2).flatten(2).norm(dim=2)
        scale = torch.where((into > 1e-150) & (out > 1e-150), (out / into.clamp_min(1e-150)).sqrt(), 1.0)
        stages[at] = stages[at] * scale.reshape(*scale.shape, *[1] * (stages[at].dim() - 2))
        stages[at + 1] = stages[at + 1] / scale.reshape(len(scale), 1, -1, *[1] * (stages[at].dim() - 3))
    return stages


def _work(stages: list[Tensor], grid: torch.Size) -> float:
    """Floating-point operations of a sweep, roughly."""
    groups, points = len(stages[0]), math.prod(grid)
    outputs, inputs = stages[-1].shape[1], stages[0].shape[2]
    work = 2e7 + 1e7 * groups  # calls cost as much
    for x in stages:
        rows, columns, size = x.shape[1], x.shape[2], math.prod(x.shape[3:])
        shared, unknowns = (rows, columns * size) if x is not stages[0] else (columns, rows * size)
        if x is stages[0] or x is stages[-1]:
            work += groups * (unknowns**3 / 3 + 2 * unknowns**2 * shared)
        work += groups * points * 4 * (2 * rows * columns * (inputs + outputs) + inputs * outputs * columns)
    return work


def spectrum(x: Tensor, grid: Sequence[int]) -> Tensor:
    """[g, O, C, *k] -> its DFT [g, f, O, C] on a grid of real points."""
    axes = tuple(range(-len(grid), 0))
    found: Tensor = torch.fft.rfftn(x, s=tuple(grid), dim=axes)
    return found.flatten(-len(grid)).movedim(-1, 1).contiguous()


def taps(spectra: Tensor, grid: Sequence[int]) -> Tensor:
    """[g, f, O, C] -> [g, O, C, *grid], the inverse of `spectrum`."""
    axes, half = tuple(range(-len(grid), 0)), (*grid[:-1], grid[-1] // 2 + 1)
    found: Tensor = torch.fft.irfftn(spectra.movedim(1, -1).unflatten(-1, half), s=tuple(grid), dim=axes)
    return found


def chain(spectra: Sequence[Tensor]) -> Tensor:
    """The spectrum of the chain."""
    product = spectra[0]
    for factor in spectra[1:]:
        product = factor @ product
    return product


def crop(x: Tensor, kernel: Sequence[int]) -> Tensor:
    """The first `kernel` taps of x [g, O, C, *grid]."""
    return cut(x, [(0, k) for k in kernel])


def _like(values: Tensor, x: Tensor) -> Tensor:
    """[g] -> [g, 1, ..., 1], to multiply x [g, ...]."""
    return values.reshape(-1, *[1] * (x.dim() - 1))
