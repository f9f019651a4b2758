"""The mathematics of `reduce-grid`: outputs of a layer from a few convolved and a few pooled channels.

For each group the outputs are to be y ~ V z + b, z = (x, p): x [F] is the patch that the convolution sees, p [P] are
the channels pooled. In the least-squares sense that is known from G = E[z zᵀ] and C = E[z yᵀ], G Vᵀ = C, and V has the
form

    V = mixed [o, m + P] @ (conv [m, F], identity [P])

where `mixed` is free, or each output has either one convolved channel or pooled ones. Tensors have the groups first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fxcompile.fitting import leading_outputs

from ._assignment import assignment
from ._stack_refining import cholesky_factor

Mix = Literal["none", "pooled", "all"]
"""Where a layer over single pixels mixes channels: nowhere, behind the pooling, behind both."""

_DAMPING = 1e-10


@dataclass(frozen=True)
class Parts:
    """What the two branches hold.

    Attributes:
        conv: kernels of the strided convolution, [g, m, F].
        mixed: what each output takes of the convolved and of the pooled channels, [g, o, m + P].
        convolved: the outputs that the convolution gives, in its order, [g, m]; None where all are mixed.
        pooled: the other outputs, [g, o - m].
        channels: the input that each of these passes through, [g, o - m]; None where these are mixed.
    """

    conv: Tensor
    mixed: Tensor
    convolved: Tensor | None = None
    pooled: Tensor | None = None
    channels: Tensor | None = None

    @property
    def dense(self) -> Tensor:
        """V, [g, o, F + P]."""
        width = self.conv.shape[1]
        return torch.cat([self.mixed[:, :, :width] @ self.conv, self.mixed[:, :, width:]], 2)


@dataclass(frozen=True)
class Moments:
    """G [g, F + P, F + P], of F numbers of a patch and P pooled channels, with what is solved once for all targets."""

    gram: Tensor
    features: int

    @property
    def _blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        n = self.features
        return self.gram[:, :n, :n], self.gram[:, n:, :n], self.gram[:, n:, n:]

    @cached_property
    def _patch_factor(self) -> Tensor:
        return cholesky_factor(self._blocks[0], _DAMPING)

    @cached_property
    def _pool_factor(self) -> Tensor:
        return cholesky_factor(self._blocks[2], _DAMPING)

    @cached_property
    def _left(self) -> tuple[Tensor, Tensor]:
        """What pooled channels do not say of patches, E[x xᵀ] - E[x pᵀ] E[p pᵀ]⁻¹ E[p xᵀ]; and its factor."""
        patches, both, _ = self._blocks
        left = patches - both.mT @ torch.cholesky_solve(both, self._pool_factor)
        left = (left + left.mT) / 2
        return left, cholesky_factor(left, 1e-9, level=patches.diagonal(dim1=1, dim2=2).mean(1))

    def parts(self, cross: Tensor, width: int, mix: Mix) -> Parts:
        """The best parts for C = `cross` [g, F + P, o] with so many convolved channels in each group: the global
        optimum of E |V z - y|².
        """
        return self._all_mixed(cross, width) if mix == "all" else self._shared_out(cross, width, mix)

    def _all_mixed(self, cross: Tensor, width: int) -> Parts:
        """Reduced-rank regression on what pooled channels, which are free, do not say (Anderson 1951)."""
        n, (_, both, _) = self.features, self._blocks
        left, factor = self._left
        rest = cross[:, :n] - both.mT @ torch.cholesky_solve(cross[:, n:], self._pool_factor)
        best = torch.cholesky_solve(rest, factor).mT
        basis = leading_outputs(best, left, width)
        conv = basis.mT @ best
        pooled = torch.cholesky_solve(cross[:, n:] - both @ (basis @ conv).mT, self._pool_factor)
        return Parts(conv, torch.cat([basis, pooled.mT], 2))

    def _shared_out(self, cross: Tensor, width: int, mix: Mix) -> Parts:
        """The outputs that lose the least by it are pooled; with no mixing each from an input of its own."""
        n, outputs = self.features, cross.shape[2]
        convolving = torch.cholesky_solve(cross[:, :n], self._patch_factor)
        won = (convolving * cross[:, :n]).sum(1)
        if mix == "pooled":
            pooling = torch.cholesky_solve(cross[:, n:], self._pool_factor)
            loss = won - (pooling * cross[:, n:]).sum(1)
            order = loss.argsort(dim=1, stable=True)
            pooled, convolved = (part.sort(1).values for part in order.split([outputs - width, width], 1))
            channels = None
        else:
            scale = self._blocks[2].diagonal(dim1=1, dim2=2).unsqueeze(2)
            pooling = torch.where(scale > 0, cross[:, n:] / scale, 0.0)  # what does not vary passes nothing on
            losses = won.unsqueeze(1) - pooling * cross[:, n:]
            chosen = [_passed(loss, outputs - width) for loss in losses]
            pooled, convolved, channels = (torch.stack(items) for items in zip(*chosen, strict=True))
        mixed = cross.new_zeros(cross.shape[0], outputs, width + cross.shape[1] - n)
        group = torch.arange(cross.shape[0]).unsqueeze(1)
        mixed[group, convolved, torch.arange(width)] = 1.0
        if channels is None:
            mixed[group, pooled, width:] = pooling.mT[group, pooled]
        else:
            mixed[group, pooled, width + channels] = pooling[group, channels, pooled]
        return Parts(convolving.mT[group, convolved], mixed, convolved, pooled, channels)


def _passed(loss: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """So many outputs each from a channel of its own, at the smallest sum of `loss` [P, o]: these outputs, all others,
    and the channels, ascending.
    """
    channels, outputs = loss.shape
    # The outputs that pass nothing take one of o - count further columns, which are cheaper than any channel.
    free = loss.new_full((outputs, outputs - count), float(loss.min()) - float(loss.abs().sum()) - 1.0)
    columns = assignment(torch.cat([loss.mT, free], 1))
    taken, pooled = columns[columns < channels].sort()[0], (columns < channels).nonzero().flatten()
    pooled = pooled[columns[pooled].argsort()]
    return pooled, (columns >= channels).nonzero().flatten(), taken


def white(weight: Tensor, inside: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """G and C where all pixels vary alike and by themselves, and a pooling is a mean: all that the weights alone say.

    Args:
        weight: [g, o, C, *k], which gives y.
        inside: the taps of the kernel [*k] that the pooling sees too.
        pixels: how many it sees.
    """
    groups, _, channels = weight.shape[:3]
    features = weight.flatten(2).shape[2]
    mean = torch.einsum("cd,t->cdt", torch.eye(channels, dtype=torch.float64), inside.flatten().double() / pixels)
    mean = mean.flatten(1).expand(groups, -1, -1)
    top = torch.cat([torch.eye(features, dtype=torch.float64).expand(groups, -1, -1), mean.mT], 2)
    bottom = torch.cat([mean, (torch.eye(channels, dtype=torch.float64) / pixels).expand(groups, -1, -1)], 2)
    gram = torch.cat([top, bottom], 1)
    return gram, gram[:, :, :features] @ weight.flatten(2).mT
