"""Right: inner channels permuted, rescaled, or their constants folded. Wrong: one of the parties forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fxcompile.contracts import Exact
from fxcompile.layers import BATCH_NORMS, CONVOLUTIONS
from fxcompile.program import Program
from fxcompile.rewriting import Pass, Site
from fxcompile.testing import Recipe, Step

from .common import ELEMENTWISE, alone, plain_convolution, rows, with_weights


class RollChannels(Pass):
    """conv -> activation -> conv, the channels between moved on by one"""

    name: ClassVar = "gallery-roll-channels"
    contract: ClassVar = Exact()

    def sites(self, program: Program) -> Iterator[Site]:
        for nodes in rows(program, CONVOLUTIONS, ELEMENTWISE, CONVOLUTIONS):
            first, _, last = map(program.layer, nodes)
            if all(alone(program, node) for node in nodes) and self.takes(first, last):
                yield Site.of(program, *nodes)

    def takes(self, first: Any, last: Any) -> bool:
        return first.groups == 1 and last.groups == 1

    def rewrite(self, site: Site) -> list[nn.Module]:
        first, activation, last = site.layers
        order = torch.arange(first.out_channels).roll(1)
        bias = None if first.bias is None else self.bias(first.bias, order)
        return [
            with_weights(first, first.weight[order], bias),
            self.activation(activation, order),
            with_weights(last, self.inputs(last.weight, order), last.bias),
        ]

    def bias(self, bias: Tensor, order: Tensor) -> Tensor:
        return bias[order]

    def activation(self, activation: Any, order: Tensor) -> nn.Module:
        if isinstance(activation, nn.PReLU) and activation.weight.numel() > 1:
            made = nn.PReLU(activation.weight.numel(), dtype=activation.weight.dtype)
            made.weight = nn.Parameter(activation.weight.detach()[order], activation.weight.requires_grad)
            return made
        assert isinstance(activation, nn.Module)
        return activation

    def inputs(self, weight: Tensor, order: Tensor) -> Tensor:
        return weight[:, order]


class InverseOrder(RollChannels):
    """The consumer takes the inverse permutation: right for a swap of two."""

    def inputs(self, weight: Tensor, order: Tensor) -> Tensor:
        return weight[:, order.argsort()]


class BiasStays(RollChannels):
    """Only the weights move."""

    def bias(self, bias: Tensor, order: Tensor) -> Tensor:
        return bias


class SlopesStay(RollChannels):
    """A PReLU with a slope for each channel keeps its order."""

    def activation(self, activation: Any, order: Tensor) -> nn.Module:
        assert isinstance(activation, nn.Module)
        return activation


class AcrossGroups(RollChannels):
    """The consumer's inputs are moved within its groups, the producer's outputs across them."""

    def takes(self, first: Any, last: Any) -> bool:
        return first.groups == 1

    def inputs(self, weight: Tensor, order: Tensor) -> Tensor:
        return weight[:, order] if weight.shape[1] == len(order) else weight.roll(1, 1)


class Rescale(Pass):
    """conv -> activation -> conv, the channels between multiplied by powers of two: cross-layer equalisation"""

    name: ClassVar = "gallery-rescale"
    contract: ClassVar = Exact()

    homogeneous: ClassVar[tuple[type[nn.Module], ...]] = (nn.ReLU, nn.LeakyReLU, nn.PReLU)

    def sites(self, program: Program) -> Iterator[Site]:
        for nodes in rows(program, CONVOLUTIONS, self.homogeneous, CONVOLUTIONS):
            last: Any = program.layer(nodes[2])
            if all(alone(program, node) for node in nodes) and last.groups == 1:
                yield Site.of(program, *nodes)

    def rewrite(self, site: Site) -> list[nn.Module]:
        first, activation, last = site.layers
        scale = self.scale(first)
        bias = None if first.bias is None else self.bias(first.bias, scale)
        return [
            with_weights(first, first.weight * self.column(scale, first.weight), bias),
            activation,
            with_weights(
                last, last.weight * self.inverse(scale).reshape(1, -1, *[1] * (last.weight.dim() - 2)), last.bias
            ),
        ]

    def scale(self, first: Any) -> Tensor:
        return 2.0 ** (torch.arange(first.out_channels, dtype=first.weight.dtype) % 3 - 1)

    def column(self, scale: Tensor, weight: Tensor) -> Tensor:
        return scale.reshape(-1, *[1] * (weight.dim() - 1))

    def bias(self, bias: Tensor, scale: Tensor) -> Tensor:
        return bias * scale

    def inverse(self, scale: Tensor) -> Tensor:
        return 1 / scale


class ThroughReLU6(Rescale):
    """Which clips at another place then."""

    homogeneous: ClassVar = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6)


class ThroughSmoothOnes(Rescale):
    """SiLU and GELU look like a ReLU."""

    homogeneous: ClassVar = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.GELU)


class NegativeScales(Rescale):
    """Only positive ones pass a ReLU."""

    def scale(self, first: Any) -> Tensor:
        return -super().scale(first)


class BiasNotRescaled(Rescale):
    """The bias keeps its size."""

    def bias(self, bias: Tensor, scale: Tensor) -> Tensor:
        return bias


class NotTakenBack(Rescale):
    """The consumer multiplies again."""

    def inverse(self, scale: Tensor) -> Tensor:
        return scale


class FoldConstants(Pass):
    """batch norm with gammas of zero -> conv  =>  the constants of those channels in the bias, their weights zero"""

    name: ClassVar = "gallery-fold-constants"
    contract: ClassVar = Exact()

    planted: ClassVar = (
        Recipe(
            (
                Step("batch norm", (("spelling", "layer"), ("affine", True), ("statistics", "zero gamma"))),
                Step("convolution", (("padding", "none"),), ((0, 0),)),
            )
        ),
    )

    def sites(self, program: Program) -> Iterator[Site]:
        for norm, conv in rows(program, BATCH_NORMS, CONVOLUTIONS):
            layer: Any = program.layer(norm)
            if layer.weight is None or layer.running_mean is None or not (layer.weight == 0).any():
                continue
            if alone(program, norm) and alone(program, conv) and self.takes(program.layer(conv)):
                yield Site.of(program, norm, conv)

    def takes(self, conv: Any) -> bool:
        return plain_convolution(conv) and not any(conv.padding)

    def rewrite(self, site: Site) -> list[nn.Module]:
        norm, conv = site.layers
        dead = norm.weight.detach() == 0
        weight = conv.weight.detach().clone()
        constants = torch.where(dead, norm.bias.detach(), 0.0)
        groups = weight.unflatten(0, (conv.groups, -1))
        added = torch.einsum("gok,gk->go", groups.flatten(3).sum(3), constants.reshape(conv.groups, -1)).flatten()
        groups.mul_((~dead).reshape(conv.groups, 1, -1, *[1] * (weight.dim() - 2)))
        return [norm, with_weights(conv, weight, self.bias(conv.bias, added))]

    def bias(self, bias: Tensor | None, added: Tensor) -> Tensor | None:
        return added if bias is None else bias.detach() + added


class ForgetsTheBorder(FoldConstants):
    """With zero padding the constant is missing at the border, and the bias is not."""

    def takes(self, conv: Any) -> bool:
        return plain_convolution(conv)


class TakesConstantsForZero(FoldConstants):
    """gamma = 0 leaves beta."""

    def bias(self, bias: Tensor | None, added: Tensor) -> Tensor | None:
        return bias


RIGHT = [RollChannels, Rescale, FoldConstants]
WRONG = [
    InverseOrder, BiasStays, SlopesStay, AcrossGroups, ThroughReLU6, ThroughSmoothOnes, NegativeScales,
    BiasNotRescaled, NotTakenBack, ForgetsTheBorder, TakesConstantsForZero,
]  # fmt: skip
