"""The mathematics of `bottleneck`: a kernel with fewer channels before it, and behind it.

Weights are split by group, [g, O, C, *k], in float64. With ones for the kernel of a layer over single pixels,

    W[o, c, i] ~ sum_rs outer[o, s] core[s, r, i] inner[r, c]

    inner [g, R, C, 1]      core [g, S, R, *k]      outer [g, O, S, 1]

is the Tucker decomposition of two modes (De Lathauwer et al. 2000; Kim et al. 2016). Without `outer`, and with all i of
one output in one row, it is a low-rank matrix, as in `_separable` with no axis for the first layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, linalg

from fxcompile.fitting import leading_outputs

from . import _separable as separable
from ._stack_refining import best_last

_SWEEPS = 3
"""Of alternation: the first start is within 2 % of where it ends."""


def reduced_inputs(weight: Tensor, rank: int, gram: Tensor | None = None) -> list[Tensor]:
    """[inner, core], nearest to W; with S [g, F, F] of the inputs in its norm, the best core for an inner that is best
    if channels and taps vary independently, which is the best of all where there is one tap.
    """
    if gram is None:
        return [*separable.nearest_pair(weight, (), rank)]
    metric = separable.input_metric(gram, weight.shape[2], weight.shape[3:], ())
    inner, core = separable.nearest_pair(weight, (), rank, metric)
    return [inner, best_last([inner, core], weight, gram)]


def reduced_both(weight: Tensor, inner: int, outer: int, gram: Tensor | None = None) -> list[Tensor]:
    """[inner, core, outer], near W with so many channels between.

    From the weight alone by alternation (higher-order orthogonal iteration); with S [g, F, F] of the inputs, `outer`
    from the outputs that vary the most, W S Wᵀ, and the others for what is left of W in these.
    """
    if gram is None:
        behind = _leading(weight, outer)
        for _ in range(_SWEEPS):
            first, _ = reduced_inputs(_project(behind, weight), inner)
            basis = linalg.qr(first.flatten(2).mT)[0]  # [g, C, R]
            behind = _leading(torch.einsum("goc...,gcr->gor...", weight, basis), outer)
    else:
        behind = leading_outputs(weight.flatten(2), gram, outer)
    return [*reduced_inputs(_project(behind, weight), inner, gram), behind[(..., *[None] * (weight.dim() - 3))]]


def _leading(weight: Tensor, rank: int) -> Tensor:
    """[g, O, rank]: orthonormal, what is left of all W[., c, i] is the smallest in their span."""
    triangle = linalg.qr(weight.flatten(2).mT, mode="r")[1]
    vectors: Tensor = linalg.svd(triangle.mT, full_matrices=False)[0]
    return vectors[:, :, :rank]


def _project(basis: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("gos,goc...->gsc...", basis, weight)
