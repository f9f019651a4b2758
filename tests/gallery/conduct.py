"""Right: layers rebuilt, a redundant ReLU added. Wrong: the right function, by forbidden means or for some callers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from fxcompile.contracts import Approximate, Contract, Exact
from fxcompile.layers import CONVOLUTIONS
from fxcompile.program import Program, shape_of
from fxcompile.rewriting import Pass, Site
from fxcompile.testing import Recipe, Step

from .common import alone, plain_convolution, untied, with_weights


class Rebuild(Pass):
    """conv  =>  an equal one with tensors of its own"""

    name: ClassVar = "gallery-rebuild"
    contract: ClassVar[Contract] = Exact()

    def sites(self, program: Program) -> Iterator[Site]:
        for node, _ in program.layers(*CONVOLUTIONS):
            if self.may_change(program, node):
                yield Site.of(program, node)

    def may_change(self, program: Program, node: fx.Node) -> bool:
        return alone(program, node)

    def rewrite(self, site: Site) -> list[nn.Module]:
        return [with_weights(site.layer, site.layer.weight.detach().clone(), site.layer.bias)]


class CopiesTied(Rebuild):
    """Two layers with one weight become two with one each."""

    def may_change(self, program: Program, node: fx.Node) -> bool:
        return True


class WritesToTheModel(Rebuild):
    """Doubles the weights on the way, in the user's own tensors."""

    def rewrite(self, site: Site) -> list[nn.Module]:
        with torch.no_grad():
            site.layer.weight.mul_(2.0)
        return [with_weights(site.layer, site.layer.weight.detach() / 2.0, site.layer.bias)]


class FreezesTheModel(Rebuild):
    """The user's own weights do not train any more, and so nothing seems to have changed."""

    def rewrite(self, site: Site) -> list[nn.Module]:
        site.layer.requires_grad_(False)
        return super().rewrite(site)


class StridesTheModel(Rebuild):
    """Takes the stride away from the layer that it was given, and puts it into a slice behind."""

    def may_change(self, program: Program, node: fx.Node) -> bool:
        conv: Any = program.layer(node)
        return super().may_change(program, node) and min(conv.stride) > 1 and len(conv.stride) == 2

    def rewrite(self, site: Site) -> list[nn.Module]:
        (rows, columns), site.layer.stride = site.layer.stride, (1, 1)
        return [super().rewrite(site)[0], nn.MaxPool2d(1, (rows, columns))]


class Unhelpful(Rebuild):
    """Rewrites everything or nothing."""

    def sites(self, program: Program) -> Iterator[Site]:
        if not (self.only or self.skip):
            yield from super().sites(program)


class UsesTheGlobalGenerator(Rebuild):
    """Draws a number that it does not need, from torch's own generator."""

    def rewrite(self, site: Site) -> list[nn.Module]:
        noise = torch.rand_like(site.layer.weight)
        return [with_weights(site.layer, site.layer.weight.detach() + 0 * noise, site.layer.bias)]


class NeverTheSameTwice(Rebuild):
    """Off by less than rounding, differently each time."""

    def rewrite(self, site: Site) -> list[nn.Module]:
        factor = 1 + random.SystemRandom().randrange(1, 50) * 2.0**-52
        return [with_weights(site.layer, site.layer.weight.detach() * factor, site.layer.bias)]


class Freezes(Rebuild):
    """The new weights do not train."""

    def rewrite(self, site: Site) -> list[nn.Module]:
        made = with_weights(site.layer, site.layer.weight.detach().clone(), site.layer.bias)
        return [made.requires_grad_(False)]


class NarrowsTheDtype(Rebuild):
    """A float32 layer in a float64 network."""

    def rewrite(self, site: Site) -> list[nn.Module]:
        made = super().rewrite(site)[0]
        return [made.float()]


class NeedsABias(Rebuild):
    """Fails where there is none."""

    def rewrite(self, site: Site) -> list[nn.Module]:
        return [with_weights(site.layer, site.layer.weight.detach().clone(), site.layer.bias.detach())]


class ClaimsIdempotence(Rebuild):
    """It finds the same layers again, each time."""

    idempotent: ClassVar = True


class GoesEverywhere(Rebuild):
    """Does not look at `only` and `skip`."""

    def selects(self, name: str) -> bool:
        return True


class LimitTooFar(Rebuild):
    """Right up to one, and takes an option up to two."""

    share: float = Field(1.0, ge=0, le=2, description="from here on of the weight")

    def rewrite(self, site: Site) -> list[nn.Module]:
        return [with_weights(site.layer, site.layer.weight.detach() * max(self.share, 1.0), site.layer.bias)]


class CallsItExact(Rebuild):
    """Rounds weights to three digits."""

    def rewrite(self, site: Site) -> list[nn.Module]:
        return [with_weights(site.layer, (site.layer.weight.detach() * 1e3).round() / 1e3, site.layer.bias)]


class RoundsABit(CallsItExact):
    """The same, said as it is."""

    contract: ClassVar[Contract] = Approximate()


class DropDeadTaps(Pass):
    """conv with taps that see nothing but padding, the map being so small  =>  the same with zeros there"""

    name: ClassVar = "gallery-drop-dead-taps"
    contract: ClassVar = Exact()

    planted: ClassVar = (
        Recipe(
            (
                Step("adaptive pool", (("size", "1"),)),
                Step("convolution", (("spelling", "layer"), ("kernel", 3), ("padding", "half")), ((0, 0),)),
                Step("again", (), ((1, -1),)),
            )
        ),
    )

    def sites(self, program: Program) -> Iterator[Site]:
        for node, conv in program.layers(nn.Conv2d):
            if plain_convolution(conv) and untied(program, conv) and self.dead(conv, node).any():
                yield Site.of(program, node)

    def dead(self, conv: nn.Conv2d, node: fx.Node) -> Tensor:
        """[h, w]: taps that see only padding, wherever the layer is called."""
        live = torch.zeros(conv.kernel_size, dtype=torch.bool)
        for call in self.calls(node):
            height, width = (shape_of(call.all_input_nodes[0]) or ())[-2:]
            live |= live_taps(conv, 0, height)[:, None] & live_taps(conv, 1, width)
        return ~live

    def calls(self, node: fx.Node) -> list[fx.Node]:
        return [call for call in node.graph.nodes if (call.op, call.target) == (node.op, node.target)]

    def rewrite(self, site: Site) -> list[nn.Module]:
        dead = self.dead(site.layer, site.node)
        return [with_weights(site.layer, site.layer.weight.detach().masked_fill(dead, 0), site.layer.bias)]


def live_taps(conv: Any, axis: int, size: int) -> Tensor:
    """[k]: whether a tap sees a pixel of a map of this size at any position."""
    stride, dilation, padding = conv.stride[axis], conv.dilation[axis], conv.padding[axis]
    taps = torch.arange(conv.kernel_size[axis])
    last = size + 2 * padding - dilation * (len(taps) - 1) - 1
    seen = torch.arange(last // stride + 1)[:, None] * stride + taps * dilation - padding
    return ((seen >= 0) & (seen < size)).any(0)


class ForgetsOtherCallers(DropDeadTaps):
    """A shared layer is rewritten once, by the size of the map of its first caller."""

    def calls(self, node: fx.Node) -> list[fx.Node]:
        return [node]


class ForgetsTheStride(DropDeadTaps):
    """Right for stride 1: of two pixels that padding leaves, a tap may see the other one."""

    def dead(self, conv: nn.Conv2d, node: fx.Node) -> Tensor:
        every = with_weights(conv, conv.weight, conv.bias, stride=(3, 3))
        return super().dead(every, node)


class Shift(Pass):
    """conv with bias  =>  conv without, and the bias added behind it"""

    name: ClassVar = "gallery-shift"
    contract: ClassVar = Exact()

    def sites(self, program: Program) -> Iterator[Site]:
        for node, conv in program.layers(*CONVOLUTIONS):
            if conv.bias is not None and alone(program, node):
                yield Site.of(program, node)

    def rewrite(self, site: Site) -> nn.Module:
        conv = site.layer
        column = conv.bias.detach().clone().reshape(-1, *[1] * (conv.weight.dim() - 2))
        return Shifted(with_weights(conv, conv.weight, None), self.held(column, conv.bias.requires_grad))

    def held(self, column: Tensor, trains: bool) -> Tensor:
        return nn.Parameter(column, trains)


class Shifted(nn.Module):
    """A convolution, and a shift for each channel."""

    def __init__(self, conv: Any, shift: Tensor) -> None:
        super().__init__()
        self.conv = conv
        if isinstance(shift, nn.Parameter):
            self.shift = shift
        else:
            self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.conv(x) + self.shift
        return moved


class Detaches(Shift):
    """What was a parameter becomes a constant."""

    def held(self, column: Tensor, trains: bool) -> Tensor:
        return column


RIGHT = [Rebuild, RoundsABit, DropDeadTaps, Shift]
WRONG = [
    CopiesTied, WritesToTheModel, FreezesTheModel, StridesTheModel, Unhelpful, UsesTheGlobalGenerator,
    NeverTheSameTwice, Freezes, NarrowsTheDtype, NeedsABias, ClaimsIdempotence, GoesEverywhere, LimitTooFar,
    CallsItExact, ForgetsOtherCallers, ForgetsTheStride, Detaches,
]  # fmt: skip
