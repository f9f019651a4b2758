"""The rank of a noisy matrix by variational Bayes: Nakajima, Sugiyama, Babacan and Tomioka, JMLR 14 (2013)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, linalg

_GRID, _ROUNDS = 200, 4


def evidence_rank(matrix: Tensor) -> int:
    """The rank of [L, M] that is left when noise of unknown size is taken off: at least 1.

    With the best noise variance v, singular values above sqrt(M v (1 + t) (1 + a / t)) stay, with a = L / M, L <= M,
    and t = 2.5129 sqrt(a) (Theorem 2 and Corollary 3 there). v minimises the free energy, which is searched for on
    finer and finer grids of log v between the bounds of Theorem 3.
    """
    rows, columns = sorted(matrix.shape)
    squares = linalg.svdvals(matrix.double()).square()
    if not bool(squares[0] > 0):
        return 1
    ratio = rows / columns
    threshold = 2.5129 * math.sqrt(ratio)
    edge = (1 + threshold) * (1 + ratio / threshold)
    most = min(math.ceil(rows / (1 + ratio)) - 1, rows) - 1
    rest = squares[max(most, 0) + 1 :]
    high = float(squares.sum()) / (rows * columns)
    low = max(float(rest[0]) / (columns * edge), float(rest.mean()) / columns) if len(rest) else 0.0
    low = max(low, 1e-12 * high)
    for _ in range(_ROUNDS):
        grid = torch.logspace(math.log10(low), math.log10(high), _GRID, dtype=torch.float64)
        best = int(_free_energy(squares / columns, grid, ratio, edge).argmin())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, _GRID - 1)])
    variance = math.sqrt(low * high)
    return max(1, int((squares > columns * variance * edge).sum()))


def _free_energy(squares: Tensor, variances: Tensor, ratio: float, edge: float) -> Tensor:
    """[n], but for a constant and a factor, for noise variances [n] and squared singular values by M, [L]."""
    x = squares / variances[:, None]
    large = x > edge
    centre = x.clamp_min(edge) - (1 + ratio)
    tau = 0.5 * (centre + (centre.square() - 4 * ratio).clamp_min(0).sqrt())
    noise = x - x.clamp_min(1e-300).log()
    signal = x - tau + ((tau + 1) / x.clamp_min(1e-300)).log() + ratio * (tau / ratio + 1).log()
    return torch.where(large, signal, noise).sum(1)
