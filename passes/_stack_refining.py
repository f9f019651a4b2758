"""Refits all stages of a stack together to the data that its layer sees, given as the second moments of its patches.

The output error of a stack is tr(E S E^T) with E = W - chain and S = E[x x^T] over patches: a polynomial in the stages.
The last stage is solved exactly first; then L-BFGS moves all stages at once, each in coordinates in which its own
Hessian is about the identity (Kronecker factors, as in Martens and Grosse 2015). Measured on 64 x 32 x 5 x 5 with
correlated inputs: output error .200 at the start, .114 after the exact solve, .096 and .092 after 20 and 100 steps;
without the coordinates L-BFGS is at .121 after 100. Coordinates that are made anew every 30 steps are better than old
ones, most of all with few channels, where they lead out of valleys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor, linalg

from fxcompile.chains import PatchMap
from fxcompile.fitting import RIDGE
from fxcompile.layer_stats import check_finite

from ._stack_algebra import cut, split
from ._stack_fitting import balance, chain, crop, spectrum, taps

_FLOPS, _STEPS, _ROUND, _ENOUGH = 2e11, (12, 120), 30, 0.99
_STARTS, _TRIAL, _DAMPING = 256, 60, 1e-4


def refine(
    stages: Sequence[Tensor],
    weight: Tensor,
    gram: Tensor,
    groups: int = 1,
    ridge: float = RIDGE,
    steps: int | None = None,
    starts: int | None = None,
) -> list[Tensor]:
    """Stages [M_i, M_{i-1}/g, *k_i] with a smaller tr(E S' E^T) in each group, or as they were.

    `gram` is S [g, F, F] (or [F, F] for one group) with F = C/g * |k| in the order of `weight.flatten(1)` and of
    `unfold`; uncentred, or centred if the caller then moves the mean error into the bias. S' = S + ridge mean(diag S) I
    holds the stack near the dense weight where the data say little. With few channels it also starts at random, up to
    seven times, for there are more local minima; `starts` is how often in all. Time grows as steps * O * F^2: `steps`
    is by default what a fixed amount of arithmetic allows, between 12 and 120. Meant for F up to 4608.
    """
    target = split(weight, groups)
    moments = gram.detach().double().reshape(groups, target[0, 0].numel(), -1)
    check_finite(moments, "second moments")
    moments = held(moments, ridge)
    problem = _Problem(target, moments)
    steps = steps or min(max(int(_FLOPS / (2.0 * target.numel() * moments.shape[2])), _STEPS[0]), _STEPS[1])
    found = given = [split(x, groups) for x in stages]
    starts = starts or min(_STARTS // (target.shape[1] * target.shape[2]), 8)
    generator = torch.Generator().manual_seed(0)
    if starts > 1:
        trial = min(steps, _TRIAL)
        found, steps = problem.lowered(given, trial), steps - trial
        for _ in range(1, starts):
            start = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(target) for x in given]
            found = problem.better(problem.lowered(start, trial), found)
    found = problem.better(problem.lowered(found, steps), given)
    return [x.flatten(0, 1) for x in found]


class _Problem:
    """Stages [g, M_i, M_{i-1}, *k_i] whose chain is near `target` [g, O, C, *k] in the norm of `moments` [g, F, F]."""

    def __init__(self, target: Tensor, moments: Tensor) -> None:
        self.target, self.moments, self.grid = target, moments, target.shape[3:]
        rows = target.flatten(2)
        self.total = ((rows @ moments) * rows).sum().clamp_min(1e-300)

    def objective(self, stages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """[g], the error; and a scalar with the gradient of their sum (S E is computed once, since S is symmetric)."""
        error = (self.target - taps(chain([spectrum(x, self.grid) for x in stages]), self.grid)).flatten(2)
        weighted = error.detach() @ self.moments / self.total
        return (error.detach() * weighted).sum((1, 2)), 2 * (error * weighted).sum()

    def better(self, stages: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
        """Group by group the stages with the smaller error; the others where that is not a number."""
        wins = self.objective(stages)[0] < self.objective(others)[0]
        return [torch.where(wins.reshape(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(stages, others, strict=True)]

    def lowered(self, stages: Sequence[Tensor], steps: int) -> list[Tensor]:
        """The stages after at most `steps` steps, in rounds: the exact solve for the last stage, then L-BFGS on all, in
        new coordinates. Fewer where a round brings less than a hundredth.
        """
        found = list(stages)
        for done in range(0, steps, _ROUND):
            before = self.objective(found)[0].sum()
            moved = balance(found)
            moved[-1] = best_last(moved, self.target, self.moments)
            coordinates = _coordinates(moved, self.moments, self.grid)
            found = self.better(descend(moved, coordinates, self.objective, min(steps - done, _ROUND)), found)
            if bool(self.objective(found)[0].sum() > _ENOUGH * before):
                break
        return found


Coordinates = tuple[Tensor | None, Tensor, tuple[int, ...]]
"""Factors A and B, and the shape [g, rows, columns, *k], of X = A^-T Y B^-1, with X arranged as a matrix."""


def descend(
    stages: list[Tensor],
    coordinates: list[Coordinates],
    objective: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]],
    steps: int,
) -> list[Tensor]:
    """At most `steps` L-BFGS steps on all stages, in their coordinates."""
    free = [_enter(x, c).clone(memory_format=torch.contiguous_format).requires_grad_() for x, c in
            zip(stages, coordinates, strict=True)]  # fmt: skip
    for y in free:
        y.register_hook(Tensor.contiguous)
    search = torch.optim.LBFGS(free, max_iter=steps, max_eval=steps * 5 // 4, history_size=20,
                               tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> float:
        search.zero_grad()
        errors, surrogate = objective([_leave(y, c) for y, c in zip(free, coordinates, strict=True)])
        surrogate.backward()
        return float(errors.sum())

    with torch.enable_grad():
        search.step(closure)
    search.state.clear()  # the gradients and steps of the past, which only the garbage collector would free
    return [_leave(y.detach(), c) for y, c in zip(free, coordinates, strict=True)]


def squared_norm(lacks: Tensor, gram: Tensor | None = None) -> float:
    """tr(E S Eᵀ) of E [g, O, F] over all groups; its squared norm where no S [g, F, F] is given."""
    return float((lacks.square() if gram is None else lacks @ gram * lacks).sum())


def best_last(stages: list[Tensor], target: Tensor, moments: Tensor) -> Tensor:
    """The last stage that is best given the others: X (D S D^T) = W S D^T, with D the design of the others."""
    last = stages[-1]
    design = PatchMap(_prefix(stages, len(stages) - 1, target.shape[3:]), tuple(last.shape[3:]))
    with_inputs, seen = design.moments(moments)
    factor = cholesky_factor(seen, 1e-10)
    return torch.cholesky_solve(with_inputs @ target.flatten(2).mT, factor).mT.reshape(last.shape)


def _coordinates(stages: list[Tensor], moments: Tensor, grid: Sequence[int]) -> list[Coordinates]:
    """For each stage, factors of its Hessian sum_{o,w,w'} L[o, a, w-v] S_R[(c, w), (d, w')] L[o, b, w'-v'].

    S_R, the moments that the stage sees behind the chain R before it, is replaced by a product of what it is between
    channels and between taps. For the last stage, where L is the identity, the Hessian is S_R itself.
    """
    found: list[Coordinates] = []
    for at, x in enumerate(stages):
        reach = [1 + sum(y.shape[3 + axis] - 1 for y in stages[at:]) for axis in range(len(grid))]
        seen = PatchMap(_prefix(stages, at, grid), tuple(reach)).moments(moments)[1] if at else moments
        if at == len(stages) - 1:
            found.append((None, cholesky_factor(seen, 1e-10), tuple(x.shape)))
            continue
        joint = seen.unflatten(2, (x.shape[2], -1)).unflatten(1, (x.shape[2], -1))  # [g, c, w, d, w']
        between_taps, between_channels = joint.diagonal(dim1=1, dim2=3).sum(3), joint.diagonal(dim1=2, dim2=4).sum(3)
        after = taps(chain([spectrum(y, grid) for y in stages[at + 1 :]]), grid).transpose(1, 2)
        extent = [n - k + 1 for n, k in zip(reach, x.shape[3:], strict=True)]
        outward = _design(crop(after, extent), x.shape[3:]).unflatten(2, (after.shape[2], -1))
        hessian = (outward @ between_taps[:, None]).flatten(2) @ outward.flatten(2).mT
        trace = between_taps.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        same = torch.eye(x.shape[2], dtype=x.dtype, device=x.device)  # for a group whose chain up to here is all zero
        between_channels = torch.where(trace > 0, between_channels / trace.clamp_min(1e-300), same)
        found.append((cholesky_factor(hessian, _DAMPING), cholesky_factor(between_channels, _DAMPING), tuple(x.shape)))
    return found


def _enter(x: Tensor, coordinates: Coordinates) -> Tensor:
    left, right, _ = coordinates
    if left is None:
        return x.flatten(2) @ right
    return left.mT @ x.movedim(2, -1).flatten(1, -2) @ right


def _leave(y: Tensor, coordinates: Coordinates) -> Tensor:
    left, right, shape = coordinates
    matrix: Tensor = linalg.solve_triangular(right, y, upper=False, left=False)
    if left is None:
        return matrix.reshape(shape)
    matrix = linalg.solve_triangular(left.mT, matrix, upper=True)
    return matrix.reshape(*shape[:2], *shape[3:], shape[2]).movedim(-1, 2)


def _prefix(stages: list[Tensor], at: int, grid: Sequence[int]) -> Tensor:
    """The kernel [g, M, C, *k] of the stages before `at`."""
    kernel = taps(chain([spectrum(x, grid) for x in stages[:at]]), grid)
    extent = [1 + sum(x.shape[3 + axis] - 1 for x in stages[:at]) for axis in range(len(grid))]
    return crop(kernel, extent)


def _design(kernel: Tensor, reach: Sequence[int]) -> Tensor:
    """D[(m, u), (c, w)] = kernel[m, c, w - u]: [g, M, C, *k] -> [g, M |reach|, C |k + reach - 1|]."""
    groups, rows, columns, *extent = kernel.shape
    full = [k + n - 1 for k, n in zip(extent, reach, strict=True)]
    design = kernel.new_zeros(groups, rows, *reach, columns, *full)
    for at in product(*map(range, reach)):
        block = design
        for shift in at:
            block = block.select(2, shift)
        cut(block, zip(at, extent, strict=True)).copy_(kernel)
    return design.flatten(2 + len(reach)).flatten(1, 1 + len(reach))


def cholesky_factor(gram: Tensor, damping: float, level: Tensor | None = None) -> Tensor:
    """Cholesky factor of `gram` [g, n, n], semidefinite but for rounding, with `damping` of a level added, or more;
    the identity where there is none, as of inputs that are always zero.

    Args:
        level: [g], by default the mean diagonal; where `gram` is a small difference, that of what it is one of.

    Raises:
        FitError: a number is NaN or infinite.
    """
    check_finite(gram, "second moments")
    level = gram.diagonal(dim1=1, dim2=2).mean(1) if level is None else level
    while True:
        factor: Tensor
        factor, failed = linalg.cholesky_ex(add_diagonal_(gram.clone(), torch.where(level > 0, damping * level, 1.0)))
        if not bool(failed.any()):
            return factor
        damping *= 100


def held(gram: Tensor, ridge: float = RIDGE) -> Tensor:
    """S [g, F, F] with a share of its mean diagonal added, to hold a fit near the weight where S says little."""
    return hold_(gram.clone(), ridge)


def hold_(gram: Tensor, ridge: float = RIDGE) -> Tensor:
    """The same in place: of 4608 features S takes 170 MB."""
    level = gram.diagonal(dim1=1, dim2=2).mean(1)
    return add_diagonal_(gram, torch.where(level > 0, ridge * level, 1.0))


def add_diagonal_(gram: Tensor, added: Tensor) -> Tensor:
    """`gram` [g, n, n] after a number [g] was added on the diagonal of each."""
    gram.diagonal(dim1=1, dim2=2).add_(added.unsqueeze(1))
    return gram
