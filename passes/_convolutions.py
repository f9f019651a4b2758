"""Convolutions with other weights in the place of a given one: what all passes that split a convolution share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from fxcompile.patches import padding_amounts
from fxcompile.program import Program
from fxcompile.rewriting import Site


def convolution(
    like: Any,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | str | int = 0,
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
) -> Any:
    """A convolution over a weight [O, C/g, *k] and bias [O], of the kind of `like`, in its dtype, trained if it is."""
    layer = type(like)(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=False,
        device="meta",
    )
    return filled(layer, like, weight, bias)


def linear(like: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> Any:
    """A linear layer with a weight [O, C] and bias [O], in the dtype of `like`, trained if it is."""
    return filled(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"), like, weight, bias)


def filled(layer: Any, like: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """A layer without a bias, made anew, with this weight and bias in the dtype of `like`, each trained if its is."""
    dtype = like.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=like.weight.requires_grad)
    if bias is not None:
        trains = (like.weight if like.bias is None else like.bias).requires_grad
        layer.bias = nn.Parameter(bias.to(dtype).contiguous(), requires_grad=trains)
    return layer.eval()


def chain(
    conv: Any,
    stages: Sequence[Tensor],
    bias: Tensor | None,
    strided: Sequence[int],
    padded: Sequence[int],
    groups: Sequence[int] | None = None,
) -> list[nn.Module]:
    """Convolutions with these weights, one after the other, in the place of `conv`; the last one has the bias.

    Args:
        strided: for each axis, the number of the stage that has its stride.
        padded: the same for the padding; "same" is each stage's own.
        groups: of each stage; by default those of `conv`.
    """
    made = []
    for at, weight in enumerate(stages):
        padding = conv.padding
        if not isinstance(padding, str):
            padding = tuple(n if at == owner else 0 for n, owner in zip(padding, padded, strict=True))
        made.append(
            convolution(
                conv,
                weight,
                bias if at == len(stages) - 1 else None,
                stride=tuple(n if at == owner else 1 for n, owner in zip(conv.stride, strided, strict=True)),
                padding=padding,
                dilation=tuple(n if size > 1 else 1 for n, size in zip(conv.dilation, weight.shape[2:], strict=True)),
                groups=conv.groups if groups is None else groups[at],
            )
        )
    return made


def float64(conv: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer as they are fitted."""
    return conv.weight.detach().double(), None if conv.bias is None else conv.bias.detach().double()


def channel_axis(site: Site) -> int:
    """The axis of the channels in what a site of a convolution takes: 1, or 0 where it takes a single sample."""
    return len(site.input_shape) - len(site.layer.kernel_size) - 1


def even_padding(conv: Any) -> tuple[int, ...] | None:
    """The padding in pixels on each side of each axis; None where the two sides of an axis get unequal ones."""
    amounts = padding_amounts(conv)
    return tuple(before for before, _ in amounts) if all(before == after for before, after in amounts) else None


IS_TRANSPOSED = "it is a transposed convolution, and only plain ones have such a form"
"""Why such a layer stays, whose kernel is one that a pass would replace."""


def why_tied(program: Program, node: fx.Node, tied: Mapping[int, set[str]]) -> str | None:
    """Why a layer that shares its weight stays: another would keep it, and the network grow. None where it does not.

    Args:
        tied: what `program.tied` gives.
    """
    others = ", ".join(f"'{name}'" for name in program.tied_to(node, tied))
    return f"it shares its weight with {others}, which would keep it" if others else None
