"""Replaces a large convolution by a stack of 3x3 ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from fxcompile.contracts import Approximate, Contract, Trained
from fxcompile.fitting import solve
from fxcompile.layer_stats import LayerStats, check_finite, grouped, mean_output
from fxcompile.layers import CONVOLUTIONS
from fxcompile.program import Program
from fxcompile.rewriting import Pass, Site, Skip

from ._stacking import compose, refine, relu_shift, stack, stack_macs, widths_for

MOST_FEATURES = 4096
"""Largest number of inputs to one output (C/g * kernel) for which the joint data-aware step is taken."""
ROUND_TO = 8
"""ONNX Runtime has blocks of 8 channels with AVX2, 16 with AVX-512. With the latter, on one thread, 32 -> M -> 32 at
14 x 14 takes .41 of the 5x5 layer's time for M = 16, .68 for 18, .75 for 22, .62 for 24 and for 32, 1.02 for 34.
"""
MARGIN = 0.25
"""Share of its range on the calibration data by which a channel before a ReLU is lifted above zero."""
SWEEPS = 12
"""Of alternating least squares before that step, which ends as low after 12 as after 200."""


class StackKernels(Pass):
    """conv[O, C, k, k]  =>  conv[M, C, 3, 3], ..., conv[O, M, 3, 3]      for odd k >= 5, (k - 1) / 2 layers

    Kernels compose by full convolution, W[o, c] = sum over m of A[m, c] * B[o, m], and their sizes add as k1 + k2 - 1
    (Simonyan and Zisserman 2015 stack them; here the stack is solved for). The weights come from alternating least
    squares; with calibration data, all of them together from the error of the outputs, tr(E S E^T) with the Gram matrix
    S of the layer's inputs and E what the stack lacks of the best dense weight. Where S would be larger than 4096
    squared, only the last layer is fitted to the data.

    The first layer takes the whole padding, with its mode, and the others none: sharing it out, (1, 1) for (2, 0),
    would zero what the first layer computes outside the map. The stride goes to the last layer, the dilation to all,
    and groups stay. Nothing but the last layer has a bias, unless `activation` puts a ReLU between: then the inner
    biases lift the calibrated range above zero, so that fine-tuning starts from the same function.

    Kernels of any number of dimensions, non-square ones too; an axis of 1 stays 1.
    """

    name: ClassVar = "stack-kernels"
    contract: ClassVar = Approximate(exact_when="rank gives at least 1.52 times as many channels between as go in")

    kernel: int | None = Field(
        None, ge=5, description="only kernels whose largest side is this, an odd number; by default all"
    )
    rank: int | float = Field(
        0.5,
        gt=0,
        description="share of the layer's MACs to spend, as a fraction; or the channels between, as an integer",
    )
    round_to: int | None = Field(
        None,
        ge=1,
        description="round the channels between down to a multiple of this, where that leaves any; by default to 8 if "
        "rank is a share, since ONNX Runtime computes channels in blocks of 8 or 16",
    )
    activation: Literal["none", "relu"] = Field("none", description="what stands between; relu wants fine-tuning")
    min_saving: float | None = Field(0.0, le=1, description="smallest share of its MACs that a site must save")

    @field_validator("kernel")
    @classmethod
    def _odd(cls, kernel: int | None) -> int | None:
        if kernel is not None and kernel % 2 == 0:
            raise ValueError("3x3 kernels compose to odd sizes")
        return kernel

    @property
    def promise(self) -> Contract:
        """Approximate, or Trained with an activation between."""
        return Trained() if self.activation == "relu" else self.contract

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Convolutions with a side of 5 or more, all sides odd."""
        tied = program.tied()
        for node, conv in program.layers(*CONVOLUTIONS):
            largest = max(conv.kernel_size)
            if largest < 5 or (self.kernel is not None and largest != self.kernel):
                continue
            even = [size for size in conv.kernel_size if size % 2 == 0]
            others = ", ".join(f"'{name}'" for name in program.tied_to(node, tied))
            site = Site.of(program, node)
            if even:
                yield Skip.of(node, f"3x3 kernels compose to odd sizes, and {even[0]} is even")
            elif others:
                yield Skip.of(node, f"it shares its weight with {others}, which would keep it")
            else:
                reason = self.too_costly(site)
                yield Skip.of(node, reason) if reason else site

    def too_costly(self, site: Site) -> str | None:
        """Why a stack is not worth its cost, or None; known before anything is fitted."""
        share = self.macs_share(site)
        if isinstance(self.rank, float) and share > self.rank * (1 + 1e-9):
            groups = " a group" if site.layer.groups > 1 else ""
            return f"one channel{groups} between costs {share:.0%} of its MACs already, above rank={self.rank:g}"
        if self.min_saving is not None and 1 - share < self.min_saving:
            return f"it would save {1 - share:.0%} of its MACs, below min_saving={self.min_saving:g}"
        return None

    def macs_share(self, site: Site) -> float:
        """What the stack costs, as a share of what the layer costs."""
        shape = shape_of_work(site)
        dense = math.prod(shape["out_size"]) * math.prod(shape["weight_shape"])
        return stack_macs(**shape, widths=self.widths(site)) / dense if dense else 1.0

    def widths(self, site: Site) -> list[int]:
        """Channels between the layers."""
        round_to = self.round_to or (ROUND_TO if isinstance(self.rank, float) else 1)
        return widths_for(**shape_of_work(site), rank=self.rank, round_to=round_to)

    def rewrite(self, site: Site) -> list[nn.Module]:
        """The stack of layers, with ReLUs between if asked."""
        conv = site.layer
        check_finite(conv.weight, "weights")
        weight, bias = conv.weight.detach().double(), None if conv.bias is None else conv.bias.detach().double()
        widths = self.widths(site)
        if site.pairs and weight[0].numel() <= MOST_FEATURES:
            stages, bias = fitted(site.statistics(), weight, bias, widths, conv.groups)
        else:
            stages = stack(weight, widths, conv.groups)
        layers = make_layers(conv, stages, [*[None] * (len(stages) - 1), bias])
        if self.activation == "relu":
            layers = with_relus(layers, [x for x, _ in site.pairs])
        return layers


def shape_of_work(site: Site) -> dict[str, Any]:
    """What decides the cost of a convolution: the arguments that `widths_for` and `stack_macs` share."""
    conv: Any = site.layer
    dims = len(conv.kernel_size)
    return {
        "weight_shape": tuple(conv.weight.shape),
        "padded_size": tuple(n + 2 * p for n, p in zip(site.input_shape[-dims:], conv.padding, strict=True)),
        "out_size": site.output_shape[-dims:],
        "groups": conv.groups,
        "dilation": conv.dilation,
    }


def fitted(
    stats: LayerStats, weight: Tensor, bias: Tensor | None, widths: Sequence[int], groups: int
) -> tuple[list[Tensor], Tensor | None]:
    """Stages and bias whose outputs come nearest to the wanted ones.

    sum |chain x + b - y|² + a |chain - W|² is, but for a constant, tr(E (S + a I) Eᵀ) with E = W* - chain and W* the
    best dense weight (`solve`): so the stack is fitted to W* in the norm that the data give.
    """
    moments = stats.raw() if bias is None else stats.centred()
    wanted, level = solve(stats, weight, bias)
    stages = refine(stack(weight, widths, groups, sweeps=SWEEPS), wanted, moments.gram / stats.rows, groups)
    if level is None:
        return stages, None
    return stages, level + mean_output(grouped(wanted - compose(stages, groups), stats), None, stats)


def make_layers(conv: Any, stages: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[nn.Module]:
    """Convolutions with these weights that take the place of `conv`, in its dtype."""
    dims, last = len(conv.kernel_size), len(stages) - 1
    layers: list[nn.Module] = []
    for index, (weight, bias) in enumerate(zip(stages, biases, strict=True)):
        layer = type(conv)(
            weight.shape[1] * conv.groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            stride=conv.stride if index == last else 1,
            padding=conv.padding if index == 0 else (0,) * dims,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=bias is not None,
            padding_mode=conv.padding_mode if index == 0 else "zeros",
            device="meta",
        )
        trainable = conv.weight.requires_grad
        layer.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=trainable)
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=trainable)
        layers.append(layer.eval())
    return layers


@torch.no_grad()
def with_relus(layers: Sequence[Any], inputs: Sequence[Tensor]) -> list[nn.Module]:
    """The layers with a ReLU between each two, which is the identity on the inputs given and a little beyond.

    Each inner layer gets the bias -min of what it computes there, and the next one's bias takes that out again. What
    stands between sees no padding, so this holds at the border as well.
    """
    made: list[nn.Module] = []
    values = list(inputs)
    for layer, following in itertools.pairwise(layers):
        dims = len(layer.kernel_size)
        values = [layer(x) for x in values]
        lowest = torch.zeros(layer.out_channels, dtype=torch.float64)
        if values:
            ranges = [x.double().movedim(-1 - dims, 0).flatten(1).aminmax(dim=1) for x in values]
            lowest = torch.stack([part.min for part in ranges]).amin(0)
            lowest = lowest - MARGIN * (torch.stack([part.max for part in ranges]).amax(0) - lowest)
        shift = add_bias(layer, relu_shift(lowest, following.weight, following.groups)[0])
        add_bias(following, relu_shift(-shift, following.weight, following.groups)[1])
        values = [x + shift.to(x.dtype).view(-1, *[1] * dims) for x in values]
        made += [layer, nn.ReLU()]
    return [*made, layers[-1]]


def add_bias(layer: Any, change: Tensor) -> Tensor:
    """Add to a new layer's bias, which it may not have yet; returns what was added, after rounding."""
    held = torch.zeros_like(change) if layer.bias is None else layer.bias.detach().double()
    layer.bias = nn.Parameter((change + held).to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    rounded: Tensor = layer.bias.detach().double()
    return rounded - held
