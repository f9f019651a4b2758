"""Folds batch norms into the convolution or linear layer before or after them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxcompile.contracts import Exact
from fxcompile.labels import node_name
from fxcompile.layers import BATCH_NORMS, CONVOLUTIONS, TRANSPOSED, is_finite, with_weights
from fxcompile.program import Program, shape_of
from fxcompile.rewriting import Pass, Site, Skip

from ._call import Call
from ._channels import Way, carry, follow

LINEAR = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as `scale * x + shift`, both [C] in float64."""
    mean, var = norm.running_mean.detach().double(), norm.running_var.detach().double()
    gamma = norm.weight.detach().double() if norm.weight is not None else torch.ones_like(mean)
    beta = norm.bias.detach().double() if norm.bias is not None else torch.zeros_like(mean)
    scale = gamma * torch.rsqrt(var + norm.eps)
    return scale, beta - scale * mean


def scale_outputs(
    layer: Any, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight and bias of `scale * layer(x) + shift` over the output channels, in the dtype of the operands.

    Weights: Linear [O, I], convolution [O, I/g, ...]; a transposed one has [I, O/g, ...], its outputs by group.
    """
    if isinstance(layer, TRANSPOSED):
        grouped = weight.unflatten(0, (layer.groups, -1))  # [g, I/g, O/g, ...]
        scaled = (grouped * scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
    else:
        scaled = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    return scaled, shift if bias is None else bias * scale + shift


def scale_inputs(
    layer: Any, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight and bias of `layer(scale * x + shift)` over the input channels.

    Right for a shift only where each output sees all taps: no zero padding, no transposed convolution.
    """
    spatial = [1] * (weight.dim() - 2)
    if isinstance(layer, TRANSPOSED):
        scaled = weight * scale.view(-1, 1, *spatial)
        added = torch.zeros(layer.out_channels, dtype=weight.dtype)
    else:
        groups = getattr(layer, "groups", 1)
        grouped = weight.unflatten(0, (groups, -1))  # [g, O/g, I/g, ...]
        scaled = (grouped * scale.view(groups, 1, -1, *spatial)).flatten(0, 1)
        added = torch.einsum("goi,gi->go", grouped.flatten(3).sum(3) if spatial else grouped, shift.view(groups, -1))
    return scaled, added.flatten() if bias is None else bias + added.flatten()


class FoldBatchNorm(Pass):
    """conv/linear [O] -> batch norm  =>  conv/linear with weight * s[o], bias * s[o] + t[o]

    and, where none stands before, batch norm [C] -> conv/linear  =>  weight * s[c], bias + sum over taps of W t[c],
    with s = gamma / sqrt(var + eps) and t = beta - s * mean, computed in float64 and rounded once (Jacob et al. 2018).

    Folding forwards needs t to reach every output alike: no zero padding, unless t is 0; a transposed convolution,
    whose outputs see different taps, only with t = 0. Padding that repeats the map (reflect, replicate, circular)
    repeats t as well. Several norms may fold into one layer. Between may stand what moves channels or averages inside
    them: flatten, transpose, average pooling, interpolation, dropout. A layer called several times, or one that shares
    its weight, stays: it would have to be copied. So does one whose folded weight its dtype cannot hold.
    """

    name: ClassVar = "fold-batchnorm"
    contract: ClassVar = Exact()
    idempotent: ClassVar = True

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Each convolution or linear layer with the batch norms that fold into it; with reasons, those that stay."""
        search = _Search(program)
        found: list[tuple[fx.Node, Site | Skip]] = []
        for norm, reason in search.left.items():
            found.append((norm, Skip.of(norm, reason)))
        for layer, nodes in search.chains.items():
            found.append((nodes[0], Site.of(program, *nodes, name=str(layer.target))))
        order = {node: index for index, node in enumerate(program.graph.nodes)}
        yield from (item for _, item in sorted(found, key=lambda pair: order[pair[0]]))

    def rewrite(self, site: Site) -> list[nn.Module]:
        """The folded layer, and around it what carries the channels."""
        layers = iter(site.layers)
        chain: list[nn.Module] = [next(layers) if node.op == "call_module" else Call.of(node) for node in site.nodes]
        at = next(index for index, layer in enumerate(chain) if isinstance(layer, LINEAR))
        layer: Any = chain[at]
        weight = layer.weight.detach().double()
        bias = None if layer.bias is None else layer.bias.detach().double()
        for norm in chain[at + 1 :]:
            if isinstance(norm, BATCH_NORMS):
                weight, bias = scale_outputs(layer, weight, bias, *affine(norm))
        for norm in reversed(chain[:at]):
            if isinstance(norm, BATCH_NORMS):
                repeat = in_channels(layer) // norm.num_features  # flattened pixels are channels of their own
                maps = [item.repeat_interleave(repeat) for item in affine(norm)]
                weight, bias = scale_inputs(layer, weight, bias, *maps)
        if layer.bias is None and bias is not None and not bias.any():
            bias = None
        chain[at] = with_weights(layer, weight, bias)
        return [item for item in chain if not isinstance(item, BATCH_NORMS)]


class _Search:
    """Decides for each batch norm of a program which layer it folds into.

    Attributes:
        chains: by the node of that layer, all nodes from the first norm before it to the last after it.
        left: by the node of a norm that stays, the reason.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.calls, self.tied = program.calls(), program.tied()
        self.ways: dict[fx.Node, Way] = {}
        self.chains: dict[fx.Node, list[fx.Node]] = {}
        self.left: dict[fx.Node, str] = {}
        self.into: dict[fx.Node, fx.Node] = {}  # norm -> the layer before it that it folds into
        arriving: dict[fx.Node, fx.Node] = {}
        for node in program.graph.nodes:
            layer = program.layer(node)
            if isinstance(layer, (*LINEAR, *BATCH_NORMS)):
                way = self.ways[node] = follow(program, node, channel_axis(layer, node))
                if way.end is not None:
                    arriving[way.end] = node
        ahead: set[fx.Node] = set()
        for norm, _ in program.layers(*BATCH_NORMS):
            if norm not in ahead:
                ahead.update(self.settle(norm, arriving.get(norm)))

    def settle(self, norm: fx.Node, previous: fx.Node | None) -> list[fx.Node]:
        """Give a norm its chain, or the reason why it has none; returns what it takes along into a layer after it."""
        reason = self.unfit(norm)
        if reason is not None:
            self.left[norm] = reason
            return []
        behind = self.behind(norm, previous)
        if behind is None and previous is not None:
            target = self.into[norm] = self.into.get(previous, previous)
            self.chains.setdefault(target, [target]).extend((*self.ways[previous].between, norm))
            return []
        ahead = self.ahead(norm)
        if isinstance(ahead, str):
            self.left[norm] = f"it folds into no layer before it ({behind}) and into none after it ({ahead})"
            return []
        self.chains[ahead[-1]] = [norm, *ahead]
        return ahead

    def unfit(self, node: fx.Node) -> str | None:
        """Why a norm folds nowhere, or None."""
        norm: Any = self.program.layer(node)
        if norm.running_mean is None:
            return "it keeps no statistics and normalises by the batch"
        calls = len(self.calls[id(norm)])
        if calls > 1:
            return f"it is called {calls} times, and only norms called once fold"
        if not all(map(is_finite, affine(norm))):
            return "its scale or shift is not finite"
        return None

    def behind(self, norm: fx.Node, previous: fx.Node | None) -> str | None:
        """Why a norm cannot fold into the layer before it, or None where it can."""
        if previous is None:
            return self.nothing_behind(norm)
        layer: Any = self.program.layer(previous)
        way = self.ways[previous]
        if way.axis != 1:
            return f"'{previous.target}' gives its channels on axis {way.axis} and the norm works on axis 1"
        if out_channels(layer) != self.features(norm):
            return f"a channel of '{previous.target}' has several values and the norm another scale for each"
        if isinstance(layer, BATCH_NORMS):
            return None if previous in self.into else f"'{previous.target}' stays"
        return self.unshared(previous, layer)

    def nothing_behind(self, norm: fx.Node) -> str:
        """What stands before a norm, where that is no layer to fold into, or its output is used elsewhere too."""
        source = norm.all_input_nodes[0]
        while source not in self.ways and carry(self.program, source, 1) is not None:
            source = source.all_input_nodes[0]
        return self.ways[source].reason if source in self.ways else f"it normalises the output of '{node_name(source)}'"

    def ahead(self, norm: fx.Node, shifted: bool = False) -> list[fx.Node] | str:
        """The nodes from a norm (without it) to the layer after it that it can fold into, or why there is none."""
        way = self.ways[norm]
        if way.end is None:
            return way.reason
        layer: Any = self.program.layer(way.end)
        name = node_name(way.end)
        if not isinstance(layer, (*LINEAR, *BATCH_NORMS)):
            return "its output is the network's" if way.end.op == "output" else f"its output goes to '{name}'"
        axis = channel_axis(layer, way.end.all_input_nodes[0])
        if way.axis != axis:
            return f"'{name}' takes its channels on axis {axis} and they arrive on axis {way.axis}"
        shifted = shifted or bool(affine(self.program.layer(norm))[1].any())
        if isinstance(layer, BATCH_NORMS):
            following = self.unfit(way.end) or self.ahead(way.end, shifted)
            if isinstance(following, str) or layer.num_features != self.features(norm):
                return f"'{name}' stays"
            return [*way.between, way.end, *following]
        reason = self.unshared(way.end, layer)
        if reason is None and shifted and isinstance(layer, TRANSPOSED):
            reason = f"outputs of '{name}' see different taps, and so different parts of the norm's shift"
        if reason is None and shifted and pads_zeros(layer):
            reason = f"the zeros around the input of '{name}' would lack the norm's shift"
        return [*way.between, way.end] if reason is None else reason

    def features(self, norm: fx.Node) -> int:
        """The number of channels of a norm."""
        return out_channels(self.program.layer(norm))

    def unshared(self, node: fx.Node, layer: nn.Module) -> str | None:
        """Why a layer's weights must not change for this call alone, or None."""
        if len(self.calls[id(layer)]) > 1:
            return f"'{node.target}' is called {len(self.calls[id(layer)])} times"
        if len(node.args) != 1 or node.kwargs:
            return f"'{node.target}' is called with an output size"
        others = ", ".join(f"'{name}'" for name in self.program.tied_to(node, self.tied))
        return f"'{node.target}' shares its weight with {others}" if others else None


def channel_axis(layer: Any, node: fx.Node) -> int:
    """On which axis of a node's value a layer takes or gives its channels."""
    rank = len(shape_of(node) or ())
    if isinstance(layer, BATCH_NORMS):
        return 1
    return rank - 1 if isinstance(layer, nn.Linear) else rank - 1 - len(layer.kernel_size)


def out_channels(layer: Any) -> int:
    """How many channels a layer gives."""
    if isinstance(layer, nn.Linear):
        return int(layer.out_features)
    return int(layer.num_features if isinstance(layer, BATCH_NORMS) else layer.out_channels)


def in_channels(layer: Any) -> int:
    """How many channels a convolution or linear layer takes."""
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def pads_zeros(layer: Any) -> bool:
    """Whether a layer puts zeros around its input."""
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
        return False
    return isinstance(layer.padding, str) or any(layer.padding)  # as text only where its two sides differ
