"""Folds batch norms into the convolution or linear layer before or after them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxcompile.contracts import Exact
from fxcompile.layers import BATCH_NORMS, CONVOLUTIONS, TRANSPOSED
from fxcompile.program import Program, shape_of
from fxcompile.rewriting import Pass, Site, Skip

LINEAR = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as `scale * x + shift`, both [C] in float64."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    gamma = norm.weight.double() if norm.weight is not None else torch.ones_like(mean)
    beta = norm.bias.double() if norm.bias is not None else torch.zeros_like(mean)
    scale = gamma * torch.rsqrt(var + norm.eps)
    return scale, beta - scale * mean


def scale_outputs(layer: Any, scale: Tensor, shift: Tensor) -> nn.Module:
    """The layer followed by `scale * y + shift` over its output channels.

    Weights: Linear [O, I], Conv [O, I/g, ...]; a transposed convolution has [I, O/g, ...], outputs by group.
    """
    weight = layer.weight.double()
    if isinstance(layer, TRANSPOSED):
        grouped = weight.unflatten(0, (layer.groups, -1))  # [g, I/g, O/g, ...]
        by_group = scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = (grouped * by_group).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    bias = shift if layer.bias is None else layer.bias.double() * scale + shift
    return with_weights(layer, weight, bias)


def scale_inputs(layer: Any, scale: Tensor, shift: Tensor) -> nn.Module:
    """The layer applied to `scale * x + shift` over its input channels.

    The shift passes through as a constant only where no zero padding mixes with it, which the caller has checked.
    """
    weight = layer.weight.double()
    spatial = [1] * (weight.dim() - 2)
    if isinstance(layer, TRANSPOSED):
        wide = weight * scale.view(-1, 1, *spatial)
        added = torch.zeros(layer.out_channels, dtype=torch.float64)
    elif isinstance(layer, nn.Linear):
        wide, added = weight * scale, weight @ shift
    else:
        groups = layer.groups
        grouped = weight.unflatten(0, (groups, -1))  # [g, O/g, I/g, ...]
        wide = (grouped * scale.view(groups, 1, -1, *spatial)).flatten(0, 1)
        added = torch.einsum("goi,gi->go", grouped.flatten(3).sum(3) if spatial else grouped, shift.view(groups, -1))
        added = added.flatten()
    bias = added if layer.bias is None else layer.bias.double() + added
    keep_bias = layer.bias is not None or bool(shift.any())
    return with_weights(layer, wide, bias if keep_bias else None)


def with_weights(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of the layer with other weights, rounded once to its dtype."""
    dtype, trainable = layer.weight.dtype, layer.weight.requires_grad
    made = copy.copy(layer)
    made.__dict__["_parameters"] = dict(layer._parameters)
    made.register_parameter("weight", nn.Parameter(weight.to(dtype), requires_grad=trainable))
    made.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=trainable))
    return made


class FoldBatchNorm(Pass):
    """conv/linear [O] -> batch norm  =>  conv/linear with weight * s[o], bias * s[o] + t[o]

    and, where none stands before, batch norm [C] -> conv/linear  =>  weight * s[c], bias + sum over taps of W t[c],
    with s = gamma / sqrt(var + eps) and t = beta - s * mean, computed in float64 and rounded once (Jacob et al. 2018).

    Folding forwards needs the shift t to reach every output alike: no zero padding, unless t is 0; a transposed
    convolution, whose border sees fewer taps, only with t = 0. Padding that repeats the map (reflect, replicate,
    circular) repeats t as well. Between the two may stand a flatten of a map of one pixel a channel, or of any size.
    """

    name: ClassVar = "fold-batchnorm"
    contract: ClassVar = Exact()

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Each batch norm with the layer it folds into; with reasons, those that stay."""
        calls, tied = program.calls(), program.tied()
        for node, norm in program.layers(*BATCH_NORMS):
            if norm.running_mean is None:
                yield Skip.of(node, "it keeps no statistics and normalises by the batch")
                continue
            if len(calls[id(norm)]) > 1:
                yield Skip.of(node, f"the batch norm is called {len(calls[id(norm)])} times")
                continue
            behind, reason_behind = self._behind(program, node, calls, tied)
            if behind is not None:
                yield Site.of(program, behind, node)
                continue
            ahead, reason_ahead = self._ahead(program, node, norm, calls, tied)
            if ahead:
                yield Site.of(program, node, *ahead, name=str(ahead[-1].target))
            else:
                yield Skip.of(node, f"{reason_behind}; {reason_ahead}")

    def _behind(
        self, program: Program, node: fx.Node, calls: dict[int, list[fx.Node]], tied: dict[int, set[str]]
    ) -> tuple[fx.Node | None, str]:
        source = node.all_input_nodes[0]
        layer = program.layer(source)
        if not isinstance(layer, LINEAR):
            return None, "no convolution or linear layer comes before it"
        if isinstance(layer, nn.Linear) and len(shape_of(source) or ()) != 2:
            return None, f"'{source.target}' gives features on the last axis and the norm works on axis 1"
        reason = unshared(source, layer, calls, tied)
        if reason is None and len(source.users) > 1:
            reason = f"the output of '{source.target}' is used elsewhere too"
        return (source, "") if reason is None else (None, reason)

    def _ahead(
        self, program: Program, node: fx.Node, norm: Any, calls: dict[int, list[fx.Node]], tied: dict[int, set[str]]
    ) -> tuple[list[fx.Node], str]:
        between: list[fx.Node] = []
        current = node
        while True:
            if len(current.users) != 1:
                return [], f"its output is used {len(current.users)} times"
            following = next(iter(current.users))
            if following.target is torch.flatten and following.args[1:] == (1, len(shape_of(current) or ()) - 1):
                between.append(following)
                current = following
                continue
            break
        layer = program.layer(following)
        if not isinstance(layer, LINEAR):
            return [], "none comes after it"
        if isinstance(layer, nn.Linear) and len(shape_of(current) or ()) != 2:
            return [], f"'{following.target}' works on the last axis and the norm on axis 1"
        reason = unshared(following, layer, calls, tied)
        if reason is None and not isinstance(layer, nn.Linear) and bool(affine(norm)[1].any()):
            padded = isinstance(layer, TRANSPOSED) or (layer.padding_mode == "zeros" and pads(layer))
            reason = f"zero padding of '{following.target}' would miss the norm's shift" if padded else None
        return ([*between, following], "") if reason is None else ([], reason)

    def rewrite(self, site: Site) -> list[nn.Module]:
        """The folded layer, with the flatten that stands before it."""
        first, second = site.layers
        if isinstance(second, BATCH_NORMS):
            return [scale_outputs(first, *affine(second))]
        scale, shift = affine(first)
        if isinstance(second, nn.Linear):
            repeat = second.in_features // scale.numel()
            scale, shift = scale.repeat_interleave(repeat), shift.repeat_interleave(repeat)
        folded = scale_inputs(second, scale, shift)
        return [nn.Flatten(), folded] if len(site.nodes) > 2 else [folded]


def pads(layer: Any) -> bool:
    """Whether a convolution pads at all."""
    if isinstance(layer.padding, str):
        return bool(layer.padding == "same" and max(layer.kernel_size) > 1)
    return max(layer.padding) > 0


def unshared(
    node: fx.Node, layer: nn.Module, calls: dict[int, list[fx.Node]], tied: dict[int, set[str]]
) -> str | None:
    """Why the layer's weights must not change for this call alone, or None."""
    if len(calls[id(layer)]) > 1:
        return f"'{node.target}' is called {len(calls[id(layer)])} times"
    for tensor in layer.parameters():
        if len(tied[id(tensor)]) > 1:
            others = ", ".join(sorted(tied[id(tensor)] - {str(node.target)}))
            return f"'{node.target}' shares its weight with {others}"
    return None
