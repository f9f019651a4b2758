"""Replaces a large convolution by a stack of 3x3 ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fxcompile.contracts import Approximate, Contract, Trained
from fxcompile.layers import CONVOLUTIONS
from fxcompile.program import Program
from fxcompile.rewriting import Pass, Site, Skip

from ._stacking import refine, relu_shift, stack, widths_for

MOST_FEATURES = 4096
"""Largest number of inputs to one output (C/g * kernel) for which the joint data-aware step is taken."""


class StackKernels(Pass):
    """conv[O, C, k, k]  =>  conv[M, C, 3, 3], ..., conv[O, M, 3, 3]      for odd k >= 5, (k - 1) / 2 layers

    Kernels compose by full convolution, W[o, c] = sum over m of A[m, c] * B[o, m], and their sizes add as k1 + k2 - 1
    (Simonyan and Zisserman 2015 stack them; here the stack is solved for). The weights come from alternating least
    squares; with calibration data, from a joint step on the error of the outputs, tr(E S E^T) with the Gram matrix S
    of the layer's inputs, and a least-squares fit of the last layer to the original's outputs.

    The first layer takes the whole padding, with its mode, and the others none: sharing it out, (1, 1) for (2, 0),
    would zero what the first layer computes outside the map. The stride goes to the last layer, the dilation to all,
    and groups stay. Nothing but the last layer has a bias, unless `activation` puts a ReLU between: then the inner
    biases lift the calibrated range above zero, so that fine-tuning starts from the same function.

    Kernels of any number of dimensions, non-square ones too; an axis of 1 stays 1.
    """

    name: ClassVar = "stack-kernels"
    contract: ClassVar = Approximate(exact_when="rank gives at least 1.52 times as many channels between as go in")

    kernel: int | None = Field(
        None, ge=5, description="only kernels whose largest side is this; by default all odd ones"
    )
    rank: int | float = Field(
        0.5,
        gt=0,
        description="share of the layer's MACs to spend, as a fraction; or the channels between, as an integer",
    )
    activation: Literal["none", "relu"] = Field("none", description="what stands between; relu wants fine-tuning")
    min_saving: float | None = Field(0.0, le=1, description="smallest share of its MACs that a site must save")

    @property
    def promise(self) -> Contract:
        """Approximate, or Trained with an activation between."""
        return Trained() if self.activation == "relu" else self.contract

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Convolutions with a side of 5 or more, all sides odd."""
        for node, conv in program.layers(*CONVOLUTIONS):
            largest = max(conv.kernel_size)
            if largest < 5 or (self.kernel is not None and largest != self.kernel):
                continue
            even = [size for size in conv.kernel_size if size % 2 == 0]
            if even:
                yield Skip.of(node, f"3x3 kernels compose to odd sizes, and {even[0]} is even")
            else:
                yield Site.of(program, node)

    def rewrite(self, site: Site) -> list[nn.Module]:
        """The stack of layers, with ReLUs between if asked."""
        conv = site.layer
        weight = conv.weight.detach().double()
        widths = widths_for(
            tuple(weight.shape), conv.stride, site.input_shape[2:], site.output_shape[2:], self.rank, conv.groups
        )
        stages = stack(weight, widths, conv.groups, torch.Generator().manual_seed(0))
        if site.pairs and weight[0].numel() <= MOST_FEATURES:
            statistics = site.statistics()
            stages = refine(stages, weight, statistics.centred().gram / statistics.rows, conv.groups)
        biases: list[Tensor | None] = [None] * len(stages)
        biases[-1] = None if conv.bias is None else conv.bias.detach().double()
        layers = make_layers(conv, stages, biases)
        if self.activation == "relu":
            layers = with_relus(layers, [x for x, _ in site.pairs])
        return layers


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
            padding=total_padding(conv) if index == 0 else (0,) * dims,
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


def total_padding(conv: Any) -> tuple[int, ...]:
    """The padding in pixels on each side of each axis; "same" is symmetric where all sides are odd."""
    if conv.padding == "same":
        return tuple(dilation * (size - 1) // 2 for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True))
    return (0,) * len(conv.kernel_size) if conv.padding == "valid" else tuple(conv.padding)


@torch.no_grad()
def with_relus(layers: Sequence[Any], inputs: Sequence[Tensor]) -> list[nn.Module]:
    """The layers with a ReLU between each two, which is the identity on the inputs given.

    Each inner layer gets the bias -min of what it computes there, and the next one's bias takes that out again. What
    stands between sees no padding, so this holds at the border as well.
    """
    made: list[nn.Module] = []
    values = list(inputs)
    for index, layer in enumerate(layers[:-1]):
        following = layers[index + 1]
        values = [layer(x) for x in values]
        axes = [axis for axis in range(values[0].dim()) if axis != 1] if values else []
        lowest = torch.stack([x.amin(axes) for x in values]).amin(0) if values else torch.zeros(layer.out_channels)
        shift, correction = relu_shift(lowest.double(), following.weight.double(), following.groups)
        add_bias(layer, shift)
        add_bias(following, correction)
        values = [x + shift.to(x.dtype).view(-1, *[1] * (x.dim() - 2)) for x in values]
        made += [layer, nn.ReLU()]
    return [*made, layers[-1]]


def add_bias(layer: Any, change: Tensor) -> None:
    """Add to a new layer's bias, which it may not have yet."""
    held = 0.0 if layer.bias is None else layer.bias.detach().double()
    layer.bias = nn.Parameter((change + held).to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
