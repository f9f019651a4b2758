"""The mathematics of `split-kernels` in sequence: a kernel as a chain of two kernels over different axes.

Weights are split by group, [g, O, C, *k], in float64. Axes are those of the kernel, 0 the first. A pair is

    first [g, R, C, *k with the later axes 1]      second [g, O, R, *k with the first axes 1]
    W[o, c, i, j] ~ sum_r second[o, r, j] first[r, c, i]

with i the taps on the first axes and j those on the others: for each group a matrix X[(c, i), (o, j)] of rank R.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, linalg

from ._stack_refining import cholesky_factor

_ROUNDS = 20
"""Of alternation towards the nearest Kronecker product; each halves what is left, or better."""


def first_axes(kernel: Sequence[int]) -> list[tuple[int, ...]]:
    """The ways to share out the axes of a kernel: those of the first layer, an axis of one tap never among them."""
    long = [axis for axis, size in enumerate(kernel) if size > 1]
    subsets = range(1, 2 ** len(long) - 1)
    return [tuple(axis for bit, axis in enumerate(long) if subset >> bit & 1) for subset in subsets]


def as_matrix(weight: Tensor, axes: Sequence[int]) -> Tensor:
    """W [g, O, C, *k] -> X [g, C * taps on these axes, O * taps on the others]."""
    dims = range(weight.dim() - 3)
    later = [axis for axis in dims if axis not in axes]
    ordered = weight.permute(0, 2, *(3 + axis for axis in axes), 1, *(3 + axis for axis in later))
    return ordered.flatten(1 + 1 + len(axes)).flatten(1, 1 + len(axes))


def as_pair(left: Tensor, right: Tensor, shape: Sequence[int], axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Factors [g, C * taps, R] and [g, R, O * other taps] as the weights of a pair for W of `shape` [g, O, C, *k]."""
    groups, outputs, inputs, *kernel = shape
    rank = left.shape[2]
    early = [size if axis in axes else 1 for axis, size in enumerate(kernel)]
    late = [1 if axis in axes else size for axis, size in enumerate(kernel)]
    first = left.mT.reshape(groups, rank, inputs, *early)
    second = right.reshape(groups, rank, outputs, *late).transpose(1, 2)
    return first, second


def singular_values(weight: Tensor, axes: Sequence[int]) -> Tensor:
    """[g, min]: of X, largest first."""
    values: Tensor = linalg.svdvals(as_matrix(weight, axes))
    return values


def nearest_pair(weight: Tensor, axes: Sequence[int], rank: int, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The pair with `rank` channels between, for each group, that comes nearest to W.

    In the Frobenius norm (Eckart and Young 1936; Tai et al. 2016), or, with a metric M [g, C * taps, C * taps] of the
    inputs, in that of M^{1/2} X.
    """
    return Spectrum.of(weight, axes, metric).pair(rank)


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of the smaller Gram matrix of [g, n, m], the largest last."""
    wide = matrix if matrix.shape[1] <= matrix.shape[2] else matrix.mT
    values: Tensor
    vectors: Tensor
    values, vectors = linalg.eigh(wide @ wide.mT)
    return values, vectors


def low_rank(matrix: Tensor, rank: int, known: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """[g, n, m] -> [g, n, r], [g, r, m]: the nearest product, its factors of one size.

    A projection on the leading eigenvectors of the smaller Gram matrix, in a quarter of the time of a singular value
    decomposition; where r is all, their span is, whatever rounding does to each.

    Args:
        known: its spectrum.
    """
    tall = matrix.shape[1] > matrix.shape[2]
    wide = matrix.mT if tall else matrix
    values, vectors = spectrum(matrix) if known is None else known
    left = vectors[:, :, -rank:].flip(2)
    scale = values[:, -rank:].flip(1).clamp_min(0).pow(0.25)
    scale = torch.where(scale > 1e-3 * scale[:, :1], scale, 1.0)
    left, right = left * scale.unsqueeze(1), (left.mT @ wide) / scale.unsqueeze(2)
    return (right.mT, left.mT) if tall else (left, right)


@dataclass(frozen=True)
class Spectrum:
    """A weight as one matrix, taken apart: pairs with any number of channels between come from it at once.

    Attributes:
        matrix: M^{T/2} X, or X.
        root: M^{1/2}, if there is one.
        values, vectors: of the smaller Gram matrix of `matrix`, the largest last.
    """

    matrix: Tensor
    root: Tensor | None
    values: Tensor
    vectors: Tensor
    shape: torch.Size
    axes: tuple[int, ...]

    @classmethod
    def of(cls, weight: Tensor, axes: Sequence[int], metric: Tensor | None = None) -> Spectrum:
        """Of W [g, O, C, *k], in the norm of a metric M of the inputs if one is given."""
        matrix = as_matrix(weight, axes)
        root = None if metric is None else cholesky_factor(metric, 1e-10)
        if root is not None:
            matrix = root.mT @ matrix
        return cls(matrix, root, *spectrum(matrix), weight.shape, tuple(axes))

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        """The nearest pair with so many channels between, for each group."""
        left, right = low_rank(self.matrix, rank, (self.values, self.vectors))
        if self.root is not None:
            left = linalg.solve_triangular(self.root.mT, left, upper=True)
        return as_pair(left, right, self.shape, self.axes)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """W [g, O, C, *k] of a pair."""
    return torch.einsum("grc...,gor...->goc...", first, second)


def input_metric(gram: Tensor, inputs: int, kernel: Sequence[int], axes: Sequence[int]) -> Tensor:
    """M [g, C * taps, C * taps], what the taps on these axes see, from S [g, F, F] over whole patches (c, *k).

    S is taken for a Kronecker product M x N with N over the other taps, the nearest there is in the Frobenius norm
    (Van Loan and Pitsianis 1993), and N, of which only its size would be left over, is given the trace of 1.
    """
    groups, dims = len(gram), len(kernel)
    later = [axis for axis in range(dims) if axis not in axes]
    order = [0, *(1 + axis for axis in axes), *(1 + axis for axis in later)]
    near, far = inputs * math.prod(kernel[axis] for axis in axes), math.prod(kernel[axis] for axis in later)
    both = gram.reshape(groups, inputs, *kernel, inputs, *kernel)
    both = both.permute(0, *(1 + item for item in order), *(2 + dims + item for item in order))
    blocks = both.reshape(groups, near, far, near, far).permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)
    short = far <= near  # [g, far * far, far * far]: alternation is power iteration on this
    of_taps = blocks @ blocks.mT if short else None
    others = torch.eye(far, dtype=gram.dtype).reshape(1, 1, -1).expand(groups, -1, -1) / far
    for _ in range(_ROUNDS):
        others = others @ of_taps if of_taps is not None else others @ blocks @ blocks.mT
        others = others / others[:, :, :: far + 1].sum(2, keepdim=True).clamp_min(1e-300)
    metric: Tensor = (others @ blocks).unflatten(2, (near, near)).squeeze(1)
    return (metric + metric.mT) / 2
