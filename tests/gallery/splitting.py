"""Right: a convolution as two, along one axis and then the other. Wrong: geometry on the wrong one of the two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fxcompile.contracts import Exact
from fxcompile.program import Program
from fxcompile.rewriting import Pass, Site

from .common import like, plain_convolution, untied


class SplitAxes(Pass):
    """conv[O, C, h, w]  =>  conv[C w, C, 1, w], conv[O, C w, h, 1]

    The first copies each pixel of a row to a channel of its own; the second has all weights.
    """

    name: ClassVar = "gallery-split-axes"
    contract: ClassVar = Exact()

    def sites(self, program: Program) -> Iterator[Site]:
        for node, conv in program.layers(nn.Conv2d):
            if self.takes(conv) and min(conv.kernel_size) > 1 and untied(program, conv):
                yield Site.of(program, node)

    def takes(self, conv: nn.Conv2d) -> bool:
        return plain_convolution(conv)

    def padding(self, conv: Any) -> tuple[int, int]:
        vertical, horizontal = conv.padding
        return vertical, horizontal

    def rewrite(self, site: Site) -> list[nn.Module]:
        conv = site.layer
        weight, bias = conv.weight.detach(), conv.bias
        first = self.rows(weight).repeat(conv.groups, 1, 1, 1)
        second = self.columns(weight, conv.groups)
        return [
            like(conv, first, self.middle(conv, first), groups=conv.groups, **self.first(conv)),
            like(conv, second, self.last(conv, second, bias), groups=conv.groups, **self.second(conv)),
        ]

    def rows(self, weight: Tensor) -> Tensor:
        """[c w, c, 1, w] of one group: channel (c, j) has a one at input c, tap j."""
        inputs, width = weight.shape[1], weight.shape[3]
        ones = torch.eye(inputs * width, dtype=weight.dtype)
        return ones.reshape(inputs * width, inputs, 1, width)

    def columns(self, weight: Tensor, groups: int) -> Tensor:
        """[O, c w, h, 1]"""
        return weight.permute(0, 1, 3, 2).flatten(1, 2).unsqueeze(3)

    def middle(self, conv: Any, first: Tensor) -> Tensor | None:
        return None

    def last(self, conv: Any, second: Tensor, bias: Tensor | None) -> Tensor | None:
        return bias

    def first(self, conv: Any) -> dict[str, Any]:
        (_, stride), (_, dilation), (_, padding) = conv.stride, conv.dilation, self.padding(conv)
        return {"stride": (1, stride), "dilation": (1, dilation), "padding": (0, padding)}

    def second(self, conv: Any) -> dict[str, Any]:
        (stride, _), (dilation, _), (padding, _) = conv.stride, conv.dilation, self.padding(conv)
        return {"stride": (stride, 1), "dilation": (dilation, 1), "padding": (padding, 0)}


class ForgetsGroups(SplitAxes):
    """A dense convolution, in which every output sees all groups by its own group's weights."""

    def rewrite(self, site: Site) -> list[nn.Module]:
        conv = site.layer
        weight = conv.weight.detach().repeat(1, conv.groups, 1, 1)
        return [like(conv, weight, conv.bias, stride=conv.stride, dilation=conv.dilation, padding=conv.padding)]


class StrideOnTheFirst(SplitAxes):
    """Rows are dropped before the vertical taps have seen them."""

    def first(self, conv: Any) -> dict[str, Any]:
        return {**super().first(conv), "stride": conv.stride}

    def second(self, conv: Any) -> dict[str, Any]:
        return {**super().second(conv), "stride": (1, 1)}


class PaddingOnTheLast(SplitAxes):
    """The sizes come out right, and the border columns wrong."""

    def first(self, conv: Any) -> dict[str, Any]:
        return {**super().first(conv), "padding": (0, 0)}

    def second(self, conv: Any) -> dict[str, Any]:
        return {**super().second(conv), "padding": conv.padding}


class ForgetsDilation(SplitAxes):
    """The second has none."""

    def second(self, conv: Any) -> dict[str, Any]:
        vertical = conv.dilation[0] * (conv.kernel_size[0] - 1) - (conv.kernel_size[0] - 1)
        padding = max(conv.padding[0] - vertical // 2, 0)
        return {**super().second(conv), "dilation": (1, 1), "padding": (padding, 0)}


class DilationOfTheOtherAxis(SplitAxes):
    """Right where both are the same."""

    def first(self, conv: Any) -> dict[str, Any]:
        return {**super().first(conv), "dilation": (1, conv.dilation[0])}


class ForgetsTheOrderOfGroups(SplitAxes):
    """Copies come tap by tap, over all groups, and are taken group by group."""

    def rows(self, weight: Tensor) -> Tensor:
        inputs, width = weight.shape[1], weight.shape[3]
        return super().rows(weight).reshape(inputs, width, inputs, 1, width).transpose(0, 1).flatten(0, 1)


class TransposesTheKernel(SplitAxes):
    """Right for symmetric kernels."""

    def columns(self, weight: Tensor, groups: int) -> Tensor:
        square = weight.shape[2] == weight.shape[3]
        return super().columns(weight.transpose(2, 3) if square else weight, groups)


class FlipsTheKernel(SplitAxes):
    """Convolution in the sense of mathematics."""

    def columns(self, weight: Tensor, groups: int) -> Tensor:
        return super().columns(weight.flip(2), groups)


class BiasInTheMiddle(SplitAxes):
    """A constant between the two that the last one takes out again: not where it sees the border's zeros."""

    def middle(self, conv: Any, first: Tensor) -> Tensor | None:
        return first.new_ones(first.shape[0])

    def last(self, conv: Any, second: Tensor, bias: Tensor | None) -> Tensor | None:
        constant = second.flatten(1).sum(1)
        return -constant if bias is None else bias.detach() - constant


class DropsTheBias(SplitAxes):
    """The new layer has none."""

    def last(self, conv: Any, second: Tensor, bias: Tensor | None) -> Tensor | None:
        return None


class SymmetricSame(SplitAxes):
    """Padding "same" of an even kernel has one pixel more behind than before."""

    def takes(self, conv: nn.Conv2d) -> bool:
        return True

    def padding(self, conv: Any) -> tuple[int, int]:
        if not isinstance(conv.padding, str):
            return super().padding(conv)
        vertical, horizontal = (d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        return vertical, horizontal


class LosesASingleTap(SplitAxes):
    """The last tap of the last row, where there are three rows or more."""

    def columns(self, weight: Tensor, groups: int) -> Tensor:
        taps = super().columns(weight, groups).clone()
        if taps.shape[2] > 2:
            taps[-1, -1, -1] = 0
        return taps


RIGHT = [SplitAxes]
WRONG = [
    ForgetsGroups, StrideOnTheFirst, PaddingOnTheLast, ForgetsDilation, DilationOfTheOtherAxis, ForgetsTheOrderOfGroups,
    TransposesTheKernel, FlipsTheKernel, BiasInTheMiddle, DropsTheBias, SymmetricSame, LosesASingleTap,
]  # fmt: skip
