"""ReLUs between the layers that take another's place, which change nothing until training makes use of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fxcompile.contracts import Contract, Trained
from fxcompile.rewriting import Site

MARGIN = 0.25
"""Share of its range on the calibration data by which a channel before a ReLU is lifted above zero."""


class WithRelus:
    """What the passes share that have an option `activation`: "relu" puts ReLUs between, and wants fine-tuning."""

    if TYPE_CHECKING:
        activation: Literal["none", "relu"]
        contract: ClassVar[Contract]

    @property
    def promise(self) -> Contract:
        """Approximate, or Trained with an activation between."""
        return Trained() if self.activation == "relu" else self.contract

    def activated(self, layers: Sequence[Any], site: Site) -> Sequence[nn.Module]:
        """The layers that take a site's place, with what the option puts between."""
        return with_relus(layers, [x for x, _ in site.pairs]) if self.activation == "relu" else layers


@torch.no_grad()
def with_relus(layers: Sequence[Any], inputs: Sequence[Tensor]) -> list[nn.Module]:
    """The layers with a ReLU between each two, which is the identity on the inputs given and a little beyond.

    Each inner layer gets the bias -min of what it computes there, and the next one's bias takes that out again. What
    stands between sees no padding, so this holds at the border as well.
    """
    made: list[nn.Module] = []
    values = list(inputs)
    for layer, following in itertools.pairwise(layers):
        dims = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
        groups = getattr(following, "groups", 1)
        values = [layer(x) for x in values]
        lowest = torch.zeros(len(layer.weight), dtype=torch.float64)
        if values:
            ranges = [x.double().movedim(-1 - dims, 0).flatten(1).aminmax(dim=1) for x in values]
            lowest = torch.stack([part.min for part in ranges]).amin(0)
            lowest = lowest - MARGIN * (torch.stack([part.max for part in ranges]).amax(0) - lowest)
        shift = add_bias(layer, relu_shift(lowest, following.weight, groups)[0])
        add_bias(following, relu_shift(-shift, following.weight, groups)[1])
        values = [x + shift.to(x.dtype).view(-1, *[1] * dims) for x in values]
        made += [layer, nn.ReLU()]
    return [*made, layers[-1]]


def add_bias(layer: Any, change: Tensor) -> Tensor:
    """Add to a new layer's bias, which it may not have yet; returns what was added, after rounding."""
    held = torch.zeros_like(change) if layer.bias is None else layer.bias.detach().double()
    layer.bias = nn.Parameter((change + held).to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    rounded: Tensor = layer.bias.detach().double()
    return rounded - held


def relu_shift(minimum: Tensor, following: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Shift [M] of the channels before a ReLU, and correction [O] of the bias after it, that together change nothing.

    `minimum` [M] is the least response over calibration data, so with t = max(0, -minimum) the ReLU is the identity
    there. The stage after it, `following` [O, M/g, *k], has no padding, turns the constant t into a constant, and gets
    -sum_{m, u} B[., m, u] t_m.
    """
    shift = (-minimum.detach().double()).clamp_min(0)
    sums = following.detach().double().unflatten(0, (groups, -1)).unsqueeze(-1).flatten(3).sum(3)
    return shift, -(sums @ shift.reshape(groups, -1, 1)).flatten()
