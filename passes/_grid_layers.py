"""The layers of `reduce-grid`: their geometry, their cost, and how they are put together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxcompile.layers import BATCH_NORMS, CONVOLUTIONS, Reorder
from fxcompile.patches import padding_amounts
from fxcompile.program import dtype_of, shape_of
from fxcompile.rewriting import Pairs, Site

from . import _grid_fitting as fitting
from ._branches import Branches, pad_ahead
from ._convolutions import convolution, float64
from ._grid import Mix
from ._grid_sites import AVG_POOLS, CLAMPS, MAX_POOLS, each_axis, reach
from .fold_batchnorm import affine, scale_outputs

Kind = Literal["max", "avg"]
Sides = list[tuple[int, int]]


@dataclass(frozen=True)
class Grid:
    """A site with one window to an output, in which both branches have theirs in the middle.

    Attributes:
        conv: the site's convolution.
        weight: of a strided convolution that is near, with what follows folded into it, [O, C/g, *k], float64.
        bias: [O].
        dilation: pixels from tap to tap of it.
        last: the activation behind both branches, or none.
        stride: pixels from window to window.
        window: pixels of one.
        sides: zeros around the map, or below zero what is cut off it.
        axis: of the channels.
        before: positions of the convolution's own outputs.
        after: positions of the outputs.
    """

    conv: Any
    weight: Tensor
    bias: Tensor
    dilation: tuple[int, ...]
    last: tuple[nn.Module, ...]
    stride: tuple[int, ...]
    window: tuple[int, ...]
    sides: Sides
    axis: int
    before: int
    after: int

    @classmethod
    def of(cls, site: Site, whole: bool = False) -> Grid:
        """The grid of a convolution, of one with what follows up to a pooling, or of a pooling, as of one behind the
        1x1 convolution that changes nothing.

        Args:
            whole: the strided convolution is to see all that such a pair saw; otherwise as much as the one before did.
        """
        layers: list[Any] = list(site.layers)
        if isinstance(layers[0], (*MAX_POOLS, *AVG_POOLS)):
            layers.insert(0, unchanging(site))
        conv, dims = layers[0], len(layers[0].kernel_size)
        weight, bias = float64(conv)
        bias = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias
        stride, dilation, sides = tuple(conv.stride), tuple(conv.dilation), padding_amounts(conv)
        window = tuple(map(reach, conv.kernel_size, dilation))
        for layer in layers[1:]:
            if isinstance(layer, BATCH_NORMS):
                weight, folded = scale_outputs(conv, weight, bias, *affine(layer))
                bias = folded if folded is not None else bias
        if len(layers) > 1:
            pool = layers[-1]
            size, gaps, stride = (each_axis(pool, name) for name in ("kernel_size", "dilation", "stride"))
            spare = [step - 1 if pool.ceil_mode else 0 for step in stride]
            around = zip(sides, each_axis(pool, "padding"), spare, strict=True)
            sides = [(left + pad, right + pad + more) for (left, right), pad, more in around]
            if getattr(pool, "divisor_override", None):
                weight, bias = (item * (math.prod(size) / pool.divisor_override) for item in (weight, bias))
            window = tuple(own + more - 1 for own, more in zip(window, map(reach, size, gaps), strict=True))
            if whole:
                weight, dilation = averaged(weight, dilation, size, gaps), (1,) * dims
        before = site.input_shape if conv is not site.layer else shape_of(site.node) or ()
        return cls(
            conv,
            weight,
            bias,
            dilation,
            tuple(layer for layer in layers if isinstance(layer, CLAMPS)),
            stride,
            window,
            sides,
            len(site.input_shape) - dims - 1,
            math.prod(before[-dims:]),
            math.prod(site.output_shape[-dims:]),
        )

    # what it costs

    @property
    def groups(self) -> int:
        """Groups of the convolution."""
        return int(self.conv.groups)

    @property
    def channels(self) -> int:
        """Channels of the input."""
        return int(self.conv.in_channels)

    @property
    def outputs(self) -> int:
        """Outputs of each group."""
        return len(self.weight) // self.groups

    @property
    def features(self) -> int:
        """Numbers of a patch in each group."""
        return self.weight[0].numel()

    @property
    def dense(self) -> int:
        """MACs of the convolution as it is."""
        return self.before * int(self.conv.weight.numel())

    def bounds(self, mix: Mix) -> tuple[int, int]:
        """The fewest and the most convolved channels for each group."""
        inputs = self.channels // self.groups
        if mix == "all":
            return 1, min(self.outputs, self.features)
        return max(1, self.outputs - inputs if mix == "none" else 1), self.outputs - 1

    def costs(self, mix: Mix) -> tuple[int, int]:
        """MACs of one convolved channel in every group, beyond what a pooled one costs; and MACs with none."""
        positions, inputs = self.groups * self.after, self.channels // self.groups
        if mix == "all":
            return positions * (self.features + self.outputs), positions * self.outputs * inputs
        pooled = 1 if mix == "none" else inputs
        return positions * (self.features - pooled), positions * self.outputs * pooled

    def share(self, width: int, mix: Mix) -> float:
        """What so many convolved channels in each group cost, of the MACs of the convolution as it is."""
        unit, fixed = self.costs(mix)
        return (unit * width + fixed) / self.dense if self.dense else 1.0

    # how it is fitted

    def from_weights(self, width: int, mix: Mix, kind: Kind) -> list[nn.Module]:
        """The layers with what the weights alone give."""
        return self.layers(fitting.from_weights(self.target, width, mix), kind)

    def from_data(self, width: int, mix: Mix, kind: Kind, pairs: Pairs) -> list[nn.Module]:
        """The layers fitted to calibration batches."""
        ahead, conv = self.convolution(self.weight.to(self.conv.weight.dtype))
        pool = nn.Sequential(*self.pooling(kind))

        def prepared(x: Tensor) -> tuple[Tensor, Tensor]:
            return nn.Sequential(*ahead)(x), pool(x)

        return self.layers(fitting.from_data(self.target, width, mix, conv, prepared, pairs), kind)

    @property
    def target(self) -> fitting.Target:
        """What the branches are fitted to."""
        groups = self.groups
        start, size = zip(*map(middle_window, self.window, self.stride), strict=True)
        first = [(whole - reach(k, d)) // 2 for whole, k, d in zip(self.window, *self.taps, strict=True)]
        inside = torch.ones(self.weight.shape[2:], dtype=torch.bool)
        for axis, (k, d) in enumerate(zip(*self.taps, strict=True)):
            at = first[axis] + d * torch.arange(k)
            seen = (at >= start[axis]) & (at < start[axis] + size[axis])
            inside &= seen.view(-1, *[1] * (len(self.window) - 1 - axis))
        hidden = clamped_range(self.last[0]) if self.last else (-math.inf, math.inf)
        weight = self.weight.unflatten(0, (groups, -1))
        return fitting.Target(weight, self.bias.view(groups, -1), inside, math.prod(size), hidden)

    @property
    def taps(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Kernel and dilation of the strided convolution."""
        return tuple(self.weight.shape[2:]), self.dilation

    # what it is made of

    def layers(self, fit: fitting.Fit, kind: Kind) -> list[nn.Module]:
        """The branches side by side, and what is behind them."""
        parts, bias = fit
        groups, width = parts.conv.shape[:2]
        kernels = parts.conv.flatten(0, 1).unflatten(1, (-1, *self.weight.shape[2:]))
        pool = self.pooling(kind)
        if parts.convolved is None:
            pooled = groups * width + torch.arange(self.channels)
            order = torch.cat([torch.arange(groups * width).view(groups, -1), pooled.view(groups, -1)], 1).flatten()
            mixed = self.pointwise(parts.mixed.flatten(0, 1), bias.flatten(), groups)
            return [Branches([self.convolved(kernels), joined(pool)], order, self.axis), mixed, *self.last]
        assert parts.pooled is not None
        rows = torch.arange(groups).unsqueeze(1)
        weights, offsets = parts.mixed[rows, parts.pooled, width:].flatten(0, 1), bias[rows, parts.pooled].flatten()
        if parts.channels is None:
            pool.append(self.pointwise(weights, offsets, groups))
        else:
            passed = (parts.channels + rows * (self.channels // groups)).flatten()
            if len(passed) < self.channels:
                pool.append(Reorder(passed, self.axis))
            scales = weights.gather(1, parts.channels.flatten().unsqueeze(1))
            pool.append(self.pointwise(scales, offsets, len(passed)))
        numbers = torch.cat([(item + rows * self.outputs).flatten() for item in (parts.convolved, parts.pooled)])
        branches = [self.convolved(kernels, bias[rows, parts.convolved].flatten()), joined(pool)]
        return [Branches(branches, numbers.argsort(), self.axis), *self.last]

    def convolved(self, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        """The branch with the strided convolution."""
        ahead, conv = self.convolution(weight, bias)
        return joined([*ahead, conv])

    def convolution(self, weight: Tensor, bias: Tensor | None = None) -> tuple[list[nn.Module], Any]:
        """What pads for the strided convolution where it does not itself, and that."""
        sides = []
        for whole, (left, right), k, d in zip(self.window, self.sides, *self.taps, strict=True):
            start = (whole - reach(k, d)) // 2
            sides.append((left - start, right - (whole - reach(k, d) - start)))
        even = all(left == right >= 0 for left, right in sides)
        conv = convolution(
            self.conv,
            weight,
            bias,
            stride=self.stride,
            padding=[left if even else 0 for left, _ in sides],
            dilation=self.dilation,
            groups=self.groups,
        )
        return [] if even else [pad_ahead(sides)], conv

    def pooling(self, kind: Kind) -> list[nn.Module]:
        """The pooling, and what pads for it where it does not itself."""
        sizes, sides = [], []
        for whole, step, (left, right) in zip(self.window, self.stride, self.sides, strict=True):
            start, size = middle_window(whole, step)
            sizes.append(size)
            sides.append((left - start, right - (whole - size - start)))
        even = all(size // 2 >= left == right >= 0 for size, (left, right) in zip(sizes, sides, strict=True))
        if kind == "avg" and len(sizes) == 3:  # it takes no map that is smaller than its window before it is padded
            even = not any(left or right for left, right in sides)
        pool: Any = (MAX_POOLS if kind == "max" else AVG_POOLS)[len(sizes) - 1]
        made = pool(tuple(sizes), self.stride, tuple(left if even else 0 for left, _ in sides))
        return [made] if even else [pad_ahead(sides), made]

    def pointwise(self, weight: Tensor, bias: Tensor, groups: int) -> nn.Module:
        """A layer over single pixels with a weight [O, C/g]."""
        made: nn.Module = convolution(self.conv, weight[(..., *[None] * len(self.window))], bias, groups=groups)
        return made


def unchanging(site: Site) -> Any:
    """A convolution over single pixels that gives what a site of a pooling takes."""
    dims = len(each_axis(site.layer, "kernel_size"))
    channels = site.input_shape[-1 - dims]
    conv: Any = CONVOLUTIONS[dims - 1](channels, channels, 1, bias=False, device="meta")
    weight = torch.eye(channels, dtype=dtype_of(site.node))
    conv.weight = nn.Parameter(weight[(..., *[None] * dims)])
    return conv


def middle_window(whole: int, step: int) -> tuple[int, int]:
    """Where a pooling's window begins in the middle of a window of so many pixels, and how many it has: as many as the
    stride or one more, so that it is in the middle; more than the whole, and a begin below 0, where that is smaller.
    """
    size = step + (whole - step) % 2
    return (whole - size) // 2, size


def averaged(weight: Tensor, dilation: Sequence[int], size: Sequence[int], gaps: Sequence[int]) -> Tensor:
    """The kernel without dilation, [O, C/g, *K], of a convolution and an average pooling with these gaps behind it."""
    spans = list(map(reach, weight.shape[2:], dilation))
    whole = [span + gap * (n - 1) for span, n, gap in zip(spans, size, gaps, strict=True)]
    kernel = weight.new_zeros(*weight.shape[:2], *whole)
    for at in itertools.product(*map(range, size)):
        steps = zip(at, gaps, spans, dilation, strict=True)
        places = (slice(index * gap, index * gap + span, step) for index, gap, span, step in steps)
        kernel[(slice(None), slice(None), *places)] += weight / math.prod(size)
    return kernel


def clamped_range(activation: nn.Module) -> tuple[float, float]:
    """The values between which an activation gives what it gets."""
    if isinstance(activation, nn.Hardtanh):  # and ReLU6
        return float(activation.min_val), float(activation.max_val)
    return 0.0, math.inf


def joined(layers: Sequence[nn.Module]) -> nn.Module:
    """Layers one after the other; one as it is."""
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)
