"""Right: a batch norm folded into the convolution before it. Wrong: what is easily forgotten there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fxcompile.contracts import Exact
from fxcompile.layers import BATCH_NORMS, CONVOLUTIONS, TRANSPOSED
from fxcompile.program import Program
from fxcompile.rewriting import Pass, Site

from .common import alone, rows, with_weights


class FoldNorm(Pass):
    """conv -> batch norm  =>  conv"""

    name: ClassVar = "gallery-fold-norm"
    contract: ClassVar = Exact()

    def sites(self, program: Program) -> Iterator[Site]:
        for conv, norm in rows(program, (*CONVOLUTIONS, *TRANSPOSED), BATCH_NORMS):
            layer: Any = program.layer(norm)
            if layer.running_mean is not None and alone(program, norm) and self.may_change(program, conv):
                yield Site.of(program, conv, norm)

    def may_change(self, program: Program, conv: Any) -> bool:
        return alone(program, conv)

    def rewrite(self, site: Site) -> list[nn.Module]:
        conv: Any = site.layers[0]
        scale, shift = self.affine(site.layers[1])
        weight = self.scaled(conv, self.cast(conv.weight.detach()), scale)
        bias = self.bias(None if conv.bias is None else self.cast(conv.bias.detach()), scale, shift)
        return [with_weights(conv, weight, bias)]

    def cast(self, tensor: Tensor) -> Tensor:
        return tensor.double()

    def affine(self, norm: Any) -> tuple[Tensor, Tensor]:
        mean = self.cast(norm.running_mean)
        gamma = torch.ones_like(mean) if norm.weight is None else self.cast(norm.weight.detach())
        beta = torch.zeros_like(mean) if norm.bias is None else self.cast(norm.bias.detach())
        scale = gamma / self.deviation(self.cast(norm.running_var), norm.eps)
        return scale, beta - mean * scale

    def deviation(self, variance: Tensor, eps: float) -> Tensor:
        return (variance + eps).sqrt()

    def scaled(self, conv: Any, weight: Tensor, scale: Tensor) -> Tensor:
        spatial = [1] * (weight.dim() - 2)
        if isinstance(conv, TRANSPOSED):
            groups = weight.unflatten(0, (conv.groups, -1))
            return (groups * scale.reshape(conv.groups, 1, -1, *spatial)).flatten(0, 1)
        return weight * scale.reshape(-1, 1, *spatial)

    def bias(self, bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor | None:
        return shift if bias is None else bias * scale + shift


class ForgetsEps(FoldNorm):
    """The deviation without eps: off by 5e-6 of the scale."""

    def deviation(self, variance: Tensor, eps: float) -> Tensor:
        return variance.sqrt()


class EpsOutsideTheRoot(FoldNorm):
    """sqrt(var) + eps"""

    def deviation(self, variance: Tensor, eps: float) -> Tensor:
        return variance.sqrt() + eps


class VarianceForDeviation(FoldNorm):
    """Divides by the variance."""

    def deviation(self, variance: Tensor, eps: float) -> Tensor:
        return variance + eps


class ClampsTheVariance(FoldNorm):
    """A lower bound that only tiny variances meet."""

    def deviation(self, variance: Tensor, eps: float) -> Tensor:
        return (variance.clamp_min(1e-3) + eps).sqrt()


class ForgetsGamma(FoldNorm):
    """As if the norm had no weight."""

    def affine(self, norm: Any) -> tuple[Tensor, Tensor]:
        scale = 1 / self.deviation(norm.running_var.double(), norm.eps)
        beta = torch.zeros_like(scale) if norm.bias is None else norm.bias.detach().double()
        return scale, beta - norm.running_mean.double() * scale


class PositiveGamma(FoldNorm):
    """Takes the size of gamma for gamma."""

    def affine(self, norm: Any) -> tuple[Tensor, Tensor]:
        scale, shift = super().affine(norm)
        return scale.abs(), shift


class MeanNotScaled(FoldNorm):
    """beta - mean"""

    def affine(self, norm: Any) -> tuple[Tensor, Tensor]:
        scale, _ = super().affine(norm)
        beta = 0.0 if norm.bias is None else norm.bias.detach().double()
        return scale, beta - norm.running_mean.double()


class AssumesAffine(FoldNorm):
    """Fails on a norm without gamma and beta."""

    def affine(self, norm: Any) -> tuple[Tensor, Tensor]:
        scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        return scale, norm.bias.detach().double() - norm.running_mean.double() * scale


class BiasNotScaled(FoldNorm):
    """bias + shift"""

    def bias(self, bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor | None:
        return shift if bias is None else bias + shift


class NoBiasWhereThereWasNone(FoldNorm):
    """The shift is lost where the convolution had no bias."""

    def bias(self, bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor | None:
        return None if bias is None else bias * scale + shift


class ScalesTheFirstAxis(FoldNorm):
    """The axis of the outputs of a convolution, and of the inputs of a transposed one."""

    def scaled(self, conv: Any, weight: Tensor, scale: Tensor) -> Tensor:
        if isinstance(conv, TRANSPOSED) and conv.in_channels != conv.out_channels:
            return super().scaled(conv, weight, scale)
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))


class ForgetsGroupsOfTransposed(FoldNorm):
    """The second axis of a transposed weight holds the outputs of one group only."""

    def scaled(self, conv: Any, weight: Tensor, scale: Tensor) -> Tensor:
        if isinstance(conv, TRANSPOSED):
            return weight * scale[: weight.shape[1]].reshape(1, -1, *[1] * (weight.dim() - 2))
        return super().scaled(conv, weight, scale)


class RoundsOnTheWay(FoldNorm):
    """Computes in float32."""

    def cast(self, tensor: Tensor) -> Tensor:
        return tensor.float()


class CopiesATiedWeight(FoldNorm):
    """The weight of two layers becomes two."""

    def may_change(self, program: Program, conv: Any) -> bool:
        return len(program.calls()[id(program.layer(conv))]) == 1


class AcrossABranch(FoldNorm):
    """The convolution's output goes elsewhere, too, and gets there folded."""

    def sites(self, program: Program) -> Iterator[Site]:
        for norm, layer in program.layers(*BATCH_NORMS):
            source = norm.all_input_nodes[0]
            conv: Any = program.layer(source)
            if layer.running_mean is None or not isinstance(conv, (*CONVOLUTIONS, *TRANSPOSED)):
                continue
            if alone(program, norm) and alone(program, source):
                self.norms[id(conv)] = layer
                yield Site.of(program, source)
                yield Site.of(program, norm)

    norms: ClassVar[dict[int, nn.Module]] = {}

    def rewrite(self, site: Site) -> list[nn.Module]:
        if isinstance(site.layer, BATCH_NORMS):
            return []
        both = replace(site, layers=(site.layer, self.norms[id(site.layer)]))
        return super().rewrite(both)


RIGHT = [FoldNorm]
WRONG = [
    ForgetsEps, EpsOutsideTheRoot, VarianceForDeviation, ClampsTheVariance, ForgetsGamma, PositiveGamma, MeanNotScaled,
    AssumesAffine, BiasNotScaled, NoBiasWhereThereWasNone, ScalesTheFirstAxis, ForgetsGroupsOfTransposed,
    RoundsOnTheWay, CopiesATiedWeight, AcrossABranch,
]  # fmt: skip
