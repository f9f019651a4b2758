"""Turns the linear head of a network into convolutions: the same function, or its nearest on pooled features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from fxcompile.contracts import Approximate, Contract, Exact
from fxcompile.fitting import collect, row_count, solve
from fxcompile.layer_stats import LayerStats
from fxcompile.layers import CONVOLUTIONS
from fxcompile.program import Program, shape_of
from fxcompile.rewriting import Pass, Replacement, Site, Skip

from ._call import Call
from ._convolutions import filled, float64, why_tied

ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.LogSigmoid, nn.Softshrink, nn.Hardshrink, nn.Threshold,
    nn.Dropout, nn.PReLU,
)  # fmt: skip
"""Layers that do to [N, M, 1, 1] what they do to [N, M]; PReLU has its channels on axis 1 of both."""

POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


class HeadToConv(Pass):
    """flatten, linear[O, C H W], ..., linear[K, O]
      =>  conv[O, C, H, W], ..., conv[K, O, 1, 1], flatten             style=exact
    flatten, linear[O, C H W]
      =>  global average pool, conv[O, C, 1, 1], flatten               style=pool

    `exact` only writes the head as convolutions (Long et al. 2015): it computes the same, and on a larger map would
    give one output for each place. Activations and dropout between linear layers stay where they are.

    `pool` is the head of Network in Network (Lin et al. 2014), who pool after the convolution: the mean may be taken
    before as well, which is the same function. 1 / (H W) of the weights and of the multiply-accumulates is left, and
    the outputs see the mean of each channel only. The convolution is the sum of the linear layer's weights over the
    places of the map, exact where all places hold the same; with calibration data it is solved for by least squares on
    the means.

    Maps of one, two and three dimensions. A linear layer on a map of one place becomes a 1x1 convolution.
    """

    name: ClassVar = "head-to-conv"
    contract: ClassVar = Exact()
    idempotent: ClassVar = True

    style: Literal["exact", "pool"] = Field(
        "exact", description="the same function, or a 1x1 convolution on means over the map"
    )

    @property
    def promise(self) -> Contract:
        """Exact, or with `style=pool` approximate."""
        return self.contract if self.style == "exact" else Approximate(exact_when="the map has one value a channel")

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Linear layers on a flattened map; with `style=exact` those that follow them, too."""
        calls, tied = program.calls(), program.tied()
        for flatten in program.graph.nodes:
            node = only_user(flatten)
            if flatten.target is not torch.flatten or node is None or not isinstance(program.layer(node), nn.Linear):
                continue
            reason = self.unfit(flatten) or why_kept(program, node, calls, tied)
            if reason is not None:
                yield Skip.of(node, reason)
            else:
                rest = self.following(program, node, calls, tied) if self.style == "exact" else []
                yield Site.of(program, flatten, node, *rest)

    def unfit(self, flatten: fx.Node) -> str | None:
        """Why what is flattened ahead of a linear layer is nothing for a convolution, or None."""
        before, after = shape_of(flatten.all_input_nodes[0]), shape_of(flatten)
        if before is None or after is None or flatten.args[1] != 1 or len(after) != 2 or not 3 <= len(before) <= 5:
            return "what is flattened ahead of it is no map [N, C, ...]"
        if self.style == "pool" and after[1] == before[1]:
            return "the map has one place, and nothing to pool"
        return None

    def following(
        self, program: Program, node: fx.Node, calls: Mapping[int, list[fx.Node]], tied: Mapping[int, set[str]]
    ) -> list[fx.Node]:
        """The nodes of the head after its first linear layer, up to the last linear one."""
        chain: list[fx.Node] = []
        length = 0
        following = only_user(node)
        while following is not None:
            layer = program.layer(following)
            if isinstance(layer, nn.Linear) and why_kept(program, following, calls, tied) is None:
                length = len(chain) + 1
            elif not isinstance(layer, ELEMENTWISE):
                break
            chain.append(following)
            following = only_user(following)
        return chain[:length]

    def rewrite(self, site: Site) -> Replacement:
        """The head as convolutions; with `style=pool` and calibration data the one that is fitted to them."""
        return list(self.candidates(site))[-1]

    def candidates(self, site: Site) -> Iterator[Replacement]:
        """The same function; or what the weights alone give, and what the data do."""
        channels, *size = site.input_shape[1:]
        flatten = Call.of(site.node)
        if self.style == "exact":
            yield [*convolutions(site.layers, channels, size), flatten]
            return
        pool = POOLS[len(size) - 1](1)
        weight, bias = float64(site.layer)
        weight = weight.unflatten(1, (channels, -1)).sum(2)
        yield [pool, as_convolution(site.layer, with_places(weight, size), bias), flatten]
        if site.pairs:
            weight, bias = solve(mean_statistics(site), weight, bias)
            yield [pool, as_convolution(site.layer, with_places(weight, size), bias), flatten]


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that takes a value; None where there are several."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def why_kept(
    program: Program, node: fx.Node, calls: Mapping[int, list[fx.Node]], tied: Mapping[int, set[str]]
) -> str | None:
    """Why a linear layer must stay as it is, or None: it stands elsewhere, too."""
    times = len(calls[id(program.layer(node))])
    return f"it is called {times} times" if times > 1 else why_tied(program, node, tied)


def convolutions(layers: Sequence[nn.Module], channels: int, size: Sequence[int]) -> Iterator[nn.Module]:
    """The layers of a head, the linear ones as convolutions: the first over a map of so many channels and that size."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            yield as_convolution(layer, layer.weight.unflatten(1, (channels, *size)), layer.bias)
            channels, size = layer.out_features, [1] * len(size)
        else:
            yield layer


def mean_statistics(site: Site) -> LayerStats:
    """Statistics of a linear layer on the mean of each channel, in the place of the site's."""
    layer = nn.Linear(site.input_shape[1], site.layer.out_features, bias=site.layer.bias is not None, device="meta")
    means = [(x.flatten(2).double().mean(2), y) for x, y in site.pairs]
    return collect(layer, means, sum(row_count(layer, y) for _, y in means))


def with_places(weight: Tensor, size: Sequence[int]) -> Tensor:
    """A weight [O, C] as that of a convolution of one place: [O, C, 1, ...]."""
    return weight.view(*weight.shape, *[1] * len(size))


def as_convolution(linear: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """A convolution over a weight [O, C, *k] and bias [O], in a linear layer's dtype, trained if it is."""
    kind: Any = CONVOLUTIONS[weight.dim() - 3]
    made = kind(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False, device="meta")
    return filled(made, linear, weight, bias)
