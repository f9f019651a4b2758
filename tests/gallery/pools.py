"""Right: pools and activations in another order or form, a head as a convolution. Wrong: an option overlooked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fxcompile.contracts import Exact
from fxcompile.layers import BATCH_NORMS, CONVOLUTIONS
from fxcompile.program import Program, dtype_of, shape_of
from fxcompile.rewriting import Pass, Site
from fxcompile.testing import Recipe, Step

from .common import alone, like, rows


class PoolFirst(Pass):
    """activation -> max pool  =>  max pool -> activation, which has less to do then"""

    name: ClassVar = "gallery-pool-first"
    contract: ClassVar = Exact()

    monotone: ClassVar[tuple[type[nn.Module], ...]] = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Sigmoid)
    pools: ClassVar[tuple[type[nn.Module], ...]] = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)

    def sites(self, program: Program) -> Iterator[Site]:
        for nodes in rows(program, self.monotone, self.pools):
            pool: Any = program.layer(nodes[1])
            if not getattr(pool, "return_indices", False):
                yield Site.of(program, *nodes)

    def rewrite(self, site: Site) -> list[nn.Module]:
        activation, pool = site.layers
        return [self.pool(pool), activation]

    def pool(self, pool: Any) -> nn.Module:
        assert isinstance(pool, nn.Module)
        return pool


class AveragesFirst(PoolFirst):
    """An average of clipped values is no clipped average."""

    pools: ClassVar = (*PoolFirst.pools, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


class ThroughTheDip(PoolFirst):
    """SiLU and GELU fall before they rise."""

    monotone: ClassVar = (*PoolFirst.monotone, nn.SiLU, nn.GELU, nn.Hardswish)


class ForgetsCeilMode(PoolFirst):
    """A row or column less where the map does not divide."""

    def pool(self, pool: Any) -> nn.Module:
        return type(pool)(pool.kernel_size, pool.stride, pool.padding, pool.dilation)  # type: ignore[no-any-return]


class ForgetsPoolDilation(PoolFirst):
    """Right for nearly all pools that there are."""

    def pool(self, pool: Any) -> nn.Module:
        return type(pool)(pool.kernel_size, pool.stride, pool.padding, ceil_mode=pool.ceil_mode)  # type: ignore[no-any-return]


class AverageAsConv(Pass):
    """average pool  =>  depthwise convolution"""

    name: ClassVar = "gallery-average-as-conv"
    contract: ClassVar = Exact()

    def sites(self, program: Program) -> Iterator[Site]:
        for node, pool in program.layers(nn.AvgPool2d):
            shape = shape_of(node.all_input_nodes[0])
            if len(shape or ()) == 4 and self.takes(pool):
                yield Site.of(program, node)

    def takes(self, pool: nn.AvgPool2d) -> bool:
        padded = any(pair(pool.padding))
        return not pool.ceil_mode and (pool.count_include_pad or not padded)

    def share(self, pool: Any) -> float:
        height, width = pair(pool.kernel_size)
        return 1 / (pool.divisor_override or height * width)

    def rewrite(self, site: Site) -> list[nn.Module]:
        pool, channels = site.layer, site.input_shape[1]
        height, width = pair(pool.kernel_size)
        made = nn.Conv2d(
            channels, channels, (height, width), pair(pool.stride), pair(pool.padding),
            groups=channels, bias=False, device="meta",
        )  # fmt: skip
        weight = torch.full((channels, 1, height, width), self.share(pool), dtype=torch.float64)
        made.weight = nn.Parameter(weight.to(dtype_of(site.node)), requires_grad=False)
        return [made.eval()]


def pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


class CountsThePadding(AverageAsConv):
    """count_include_pad=False divides by less at the border."""

    def takes(self, pool: nn.AvgPool2d) -> bool:
        return not pool.ceil_mode


class AveragesWithoutCeil(AverageAsConv):
    """Where ceil_mode gives another size, the replacement does not fit."""

    def takes(self, pool: nn.AvgPool2d) -> bool:
        return bool(pool.count_include_pad or not any(pair(pool.padding)))


class DividesByTheWrongSide(AverageAsConv):
    """height * height"""

    def share(self, pool: Any) -> float:
        return float(1 / (pool.divisor_override or pair(pool.kernel_size)[0] ** 2))


class OneActivationLess(Pass):
    """ReLU after an activation that is never negative  =>  that activation alone"""

    name: ClassVar = "gallery-one-activation-less"
    contract: ClassVar = Exact()

    planted: ClassVar = (Recipe((Step("activation"), Step("activation", (), ((0, 0),)))),)

    before: ClassVar[tuple[type[nn.Module], ...]] = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Softplus)
    after: ClassVar[tuple[type[nn.Module], ...]] = (nn.ReLU,)

    def sites(self, program: Program) -> Iterator[Site]:
        for nodes in rows(program, self.before, self.after):
            yield Site.of(program, *nodes)

    def rewrite(self, site: Site) -> list[nn.Module]:
        return [site.layers[0]]


class AnyActivationBefore(OneActivationLess):
    """Leaky and smooth ones do go below zero."""

    before: ClassVar = (*OneActivationLess.before, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.ELU)


class AnyClipAfter(OneActivationLess):
    """A ReLU6 after a ReLU still clips."""

    after: ClassVar = (nn.ReLU, nn.ReLU6)


class InPlace(Pass):
    """conv or norm -> ReLU  =>  the same in place, where nobody else reads what is overwritten"""

    name: ClassVar = "gallery-in-place"
    contract: ClassVar = Exact()

    def sites(self, program: Program) -> Iterator[Site]:
        for nodes in rows(program, (*CONVOLUTIONS, *BATCH_NORMS), (nn.ReLU,)):
            yield Site.of(program, nodes[-1])

    def rewrite(self, site: Site) -> list[nn.Module]:
        return [nn.ReLU(inplace=True)]


class OverwritesABranch(InPlace):
    """An in-place operation ahead of those that still read its input."""

    def sites(self, program: Program) -> Iterator[Site]:
        for node, _ in program.layers(nn.ReLU):
            yield Site.of(program, node)


class HeadAsConv(Pass):
    """flatten -> linear  =>  convolution over the whole map -> flatten"""

    name: ClassVar = "gallery-head-as-conv"
    contract: ClassVar = Exact()

    def sites(self, program: Program) -> Iterator[Site]:
        for linear, layer in program.layers(nn.Linear):
            flatten: Any = linear.args[0]
            if flatten.target is not torch.flatten or flatten.args[1:] != (1, 3) or len(flatten.users) != 1:
                continue
            shape = shape_of(flatten.args[0]) or ()
            if len(shape) == 4 and layer.in_features == math.prod(shape[1:]) and alone(program, linear):
                yield Site.of(program, flatten, linear)

    def rewrite(self, site: Site) -> list[nn.Module]:
        linear, (_, channels, height, width) = site.layer, site.input_shape
        weight = self.kernel(linear.weight.detach(), channels, height, width)
        conv = nn.Conv2d(1, 1, 1, dtype=weight.dtype, device="meta").requires_grad_(linear.weight.requires_grad)
        return [like(conv, weight, linear.bias), nn.Flatten()]

    def kernel(self, weight: Tensor, channels: int, height: int, width: int) -> Tensor:
        return weight.reshape(-1, channels, height, width)


class ChannelsLast(HeadAsConv):
    """As if the map had been flattened pixel by pixel."""

    def kernel(self, weight: Tensor, channels: int, height: int, width: int) -> Tensor:
        return weight.reshape(-1, height, width, channels).permute(0, 3, 1, 2)


class ColumnsFirst(HeadAsConv):
    """As if the map had been flattened column by column."""

    def kernel(self, weight: Tensor, channels: int, height: int, width: int) -> Tensor:
        return weight.reshape(-1, channels, width, height).transpose(2, 3)


RIGHT = [InPlace, PoolFirst, AverageAsConv, OneActivationLess, HeadAsConv]
WRONG = [
    AveragesFirst, ThroughTheDip, ForgetsCeilMode, ForgetsPoolDilation, CountsThePadding, AveragesWithoutCeil,
    DividesByTheWrongSide, AnyActivationBefore, AnyClipAfter, OverwritesABranch, ChannelsLast, ColumnsFirst,
]  # fmt: skip
