"""Right: a 5x5 convolution as two of 3x3, by construction. Wrong: padding, stride and dilation shared out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fxcompile.contracts import Exact
from fxcompile.program import Program
from fxcompile.rewriting import Pass, Site

from .common import like, plain_convolution, untied

CORNERS = ((0, 0), (0, 2), (2, 0), (2, 2))


class StackCorners(Pass):
    """conv[O, C, 5, 5]  =>  conv[4 C, C, 3, 3], conv[O, 4 C, 3, 3]

    The first shifts each input by the four corners of its kernel; each tap of the old kernel is reached from one of
    them by a tap of the second.
    """

    name: ClassVar = "gallery-stack-corners"
    contract: ClassVar = Exact()

    def sites(self, program: Program) -> Iterator[Site]:
        for node, conv in program.layers(nn.Conv2d):
            if conv.kernel_size == (5, 5) and plain_convolution(conv) and untied(program, conv):
                yield Site.of(program, node)

    def rewrite(self, site: Site) -> list[nn.Module]:
        conv = site.layer
        weight = conv.weight.detach()
        first = self.shifts(weight).repeat(conv.groups, 1, 1, 1)
        second = self.shares(weight)
        return [
            like(conv, first, None, groups=conv.groups, **self.first(conv)),
            like(conv, second, conv.bias, groups=conv.groups, **self.second(conv)),
        ]

    def shifts(self, weight: Tensor) -> Tensor:
        """[4 c, c, 3, 3], corner by corner."""
        inputs = weight.shape[1]
        made = weight.new_zeros(4, inputs, inputs, 3, 3)
        for index, (row, column) in enumerate(CORNERS):
            made[index, :, :, row, column] = torch.eye(inputs, dtype=weight.dtype)
        return made.flatten(0, 1)

    def shares(self, weight: Tensor) -> Tensor:
        """[O, 4 c, 3, 3]: each tap of the old kernel once."""
        left = weight.clone()
        parts = []
        for row, column in CORNERS:
            parts.append(left[:, :, row : row + 3, column : column + 3].clone())
            left[:, :, row : row + 3, column : column + 3] = 0
        return torch.cat(parts, 1)

    def first(self, conv: Any) -> dict[str, Any]:
        return {"padding": conv.padding, "dilation": conv.dilation}

    def second(self, conv: Any) -> dict[str, Any]:
        return {"stride": conv.stride, "dilation": conv.dilation}


class SharesThePadding(StackCorners):
    """(1, 1) for (2, 0): sizes are right, and what the first layer computes outside of the map is zero."""

    def first(self, conv: Any) -> dict[str, Any]:
        return {**super().first(conv), "padding": tuple(pad - pad // 2 for pad in conv.padding)}

    def second(self, conv: Any) -> dict[str, Any]:
        return {**super().second(conv), "padding": tuple(pad // 2 for pad in conv.padding)}


class StrideBeforeTheLast(StackCorners):
    """The second sees every other pixel only."""

    def first(self, conv: Any) -> dict[str, Any]:
        return {**super().first(conv), "stride": conv.stride}

    def second(self, conv: Any) -> dict[str, Any]:
        return {"dilation": conv.dilation}


class DilatesTheFirstOnly(StackCorners):
    """Another kernel, and another size unless the padding makes up for it."""

    def second(self, conv: Any) -> dict[str, Any]:
        return {"stride": conv.stride}


class CountsTheCentreTwice(StackCorners):
    """The four windows overlap in the middle row and column."""

    def shares(self, weight: Tensor) -> Tensor:
        return torch.cat([weight[:, :, r : r + 3, c : c + 3] for r, c in CORNERS], 1)


RIGHT = [StackCorners]
WRONG = [SharesThePadding, StrideBeforeTheLast, DilatesTheFirstOnly, CountsTheCentreTwice]
