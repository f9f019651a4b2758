"""Replaces a convolution by a grouped one and one over single pixels, with a channel shuffle where both have groups."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from fxcompile.contracts import Approximate
from fxcompile.layer_stats import check_finite
from fxcompile.layers import CONVOLUTIONS
from fxcompile.program import Program
from fxcompile.rewriting import Replacement, Site, Skip

from ._chain_fitting import fit_statistics, fitted_by
from ._convolutions import channel_axis, convolution, float64, why_tied
from ._grouping import Pair, by_group, compose, held, lost, nearest_pair, refined, singular_values
from ._ranks import Draft, RankedPass, energy_rank, rank_for, rounded_up
from ._reordering import shuffle

MOST_GROUPS = 8
"""Of those to choose from. At equal cost 4 to 8 came nearest on trained layers of 32 to 128 channels, 3x3 and 5x5."""


class GroupShuffle(RankedPass):
    """conv[O, C, k, k]  =>  conv[M, C/g, k, k], conv[O, M, 1, 1]                                     style=pointwise
                      =>  conv[C r, 1, k, k], conv[O, C r, 1, 1]                                   style=depthwise
                      =>  conv[M, C/g, k, k], channel shuffle, conv[O, M/g, 1, 1]                  style=shuffle-unit

    All three are blocks of the weight, from a group of inputs to a group of outputs, by a few channels each (Zhang et
    al. 2018; depthwise separable: Guo et al. 2018; over single pixels: the Monarch matrices of Dao et al. 2022). From
    the weights alone, each block's singular value decomposition, which is the nearest there is. With calibration data,
    each block of the best dense weight is reduced in the norm of what it sees, its part of the Gram matrix S of the
    layer's inputs, the last layer is solved for all blocks together, and then both layers are fitted to the error of
    the outputs, tr(E S E^T).

    `groups` is the number for the k x k layer, and in a shuffle unit for both; by default any from 2 to 8 which the
    channels allow: that which comes nearest at the share of the cost that `rank` gives, else that which costs least.
    A layer that has groups already gets so many in each. At equal cost `pointwise` comes nearest on trained layers.
    Only a shuffle unit takes the place of layers over single pixels, as in ShuffleNet.

    Stride, padding and dilation stay with the first layer; the bias goes to the last.
    """

    name: ClassVar = "group-shuffle"
    contract: ClassVar = Approximate(
        exact_when="rank gives each block as many channels as it has outputs, or as it sees"
    )

    style: Literal["pointwise", "depthwise", "shuffle-unit"] = Field(
        "pointwise", description="what stands for the layer: see above"
    )
    groups: int | None = Field(
        None, ge=1, description="groups of inputs, and in a shuffle unit of outputs; by default chosen for each layer"
    )

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.style == "depthwise" and self.groups is not None:
            raise ValueError("groups has no meaning with style=depthwise, where each input is a group")
        return self

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Convolutions over more than one pixel; with `style=shuffle-unit` over one too."""
        tied = program.tied()
        for node, conv in program.layers(*CONVOLUTIONS):
            if self.style != "shuffle-unit" and max(conv.kernel_size) == 1:
                continue
            site = Site.of(program, node)
            reason = self.unfit(conv) or why_tied(program, node, tied)
            if reason is None and not self.by_weight:
                form = min(self.forms(site))
                reason = self.too_costly(form.share, conv.groups * form.ins * form.outs)
            yield Skip.of(node, reason) if reason else site

    def unfit(self, conv: Any) -> str | None:
        """Why a convolution has no such form, or None."""
        inputs, outputs = conv.weight.shape[1], conv.out_channels // conv.groups
        each = " in each of its groups" if conv.groups > 1 else ""
        if inputs == 1:
            return f"it has one input{each}"
        if self.splits(inputs, outputs):
            return None
        channels = f"{inputs} inputs and {outputs} outputs" if self.style == "shuffle-unit" else f"{inputs} inputs"
        return f"its {channels}{each} do not fall into {self.groups or f'any number of groups from 2 to {MOST_GROUPS}'}"

    def splits(self, inputs: int, outputs: int) -> list[tuple[int, int]]:
        """The numbers of groups of inputs and of outputs to choose from."""
        if self.style == "depthwise":
            return [(inputs, 1)]
        shuffled = self.style == "shuffle-unit"
        common = math.gcd(inputs, outputs) if shuffled else inputs
        wanted = range(2, MOST_GROUPS + 1) if self.groups is None else [self.groups]
        return [(count, count if shuffled else 1) for count in wanted if common % count == 0]

    def candidates(self, site: Site) -> Iterator[Replacement]:
        """What the weights alone give, and what the data do."""
        check_finite(site.layer.weight, "weights")
        weight, bias = float64(site.layer)

        def fit(wanted: Tensor, gram: Tensor) -> tuple[Pair, Tensor]:
            target, norm = by_group(wanted, site.layer.groups), held(gram)
            pair = refined(self.nearest(site, target, norm), target, norm)
            return pair, compose(pair).reshape(wanted.shape)

        yield self.layers(site, self.nearest(site, by_group(weight, site.layer.groups)), bias)
        stats = fit_statistics(site)
        if stats is not None:
            yield self.layers(site, *fitted_by(stats, weight, bias, fit))

    def draft(self, site: Site, weight: Tensor, gram: Tensor | None = None, steps: int = 0) -> Draft:
        """The closed form, and so many joint steps."""
        target, norm = by_group(weight, site.layer.groups), None if gram is None else held(gram)
        pair = self.nearest(site, target, norm)
        if norm is not None and steps:
            pair = refined(pair, target, norm, steps)
        return Draft(self.layers(site, pair, float64(site.layer)[1]), compose(pair).reshape(weight.shape))

    def nearest(self, site: Site, weight: Tensor, gram: Tensor | None = None) -> Pair:
        """The pair for a weight [G, O, F], of all forms that may be chosen; in the norm of S [G, F, F] if given."""
        forms = self.affordable_forms(site)
        tried = (nearest_pair(weight, form.ins, form.outs, form.width, gram) for form in forms)
        return min(tried, key=lambda pair: lost(pair, weight, gram))

    def alternatives(self, site: Site) -> list[tuple[float, ...]]:
        """The forms."""
        return [(form.share, form.ins, form.outs, form.width) for form in self.affordable_forms(site)]

    def affordable_forms(self, site: Site) -> list[Form]:
        """Those that cost no more than the share that `rank` gives; else the one that costs least."""
        forms, fit = self.forms(site), []
        if not self.by_weight and isinstance(self.rank, float):
            fit = [form for form in forms if not self.too_costly(form.share, 1)]
        return fit or [min(forms)]

    def forms(self, site: Site) -> list[Form]:
        """Those that the options and the channels allow."""
        conv = site.layer
        inputs, outputs = conv.weight.shape[1], conv.out_channels // conv.groups
        taps, positions = math.prod(conv.kernel_size), math.prod(site.output_shape[-len(conv.kernel_size) :])
        dense, found = positions * conv.weight.numel(), []
        for ins, outs in self.splits(inputs, outputs):
            count = conv.groups * ins * outs
            unit = positions * count * (inputs // ins * taps + outputs // outs)
            if self.energy is None:
                width = rank_for(self.rank, unit, dense, count, self.rounding) if unit else 1
            else:
                values = singular_values(by_group(float64(conv)[0], conv.groups), ins, outs)
                width = rounded_up(energy_rank(values, self.energy), count, self.rounding)
            width = min(width, inputs // ins * taps, outputs // outs)
            found.append(Form(unit * width / dense if dense else 1.0, ins, outs, width))
        return found

    def layers(self, site: Site, pair: Pair, bias: Tensor | None) -> list[nn.Module]:
        """The two layers, and the shuffle between."""
        conv, (groups, ins, outs, width, _) = site.layer, pair.inner.shape
        first = convolution(
            conv,
            pair.inner.flatten(0, 3).unflatten(1, (-1, *conv.kernel_size)),
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=groups * ins,
        )
        shuffled = outs > 1
        columns = (pair.outer.mT if shuffled else pair.outer).flatten(3).flatten(0, 2)
        last = convolution(conv, columns[(..., *[None] * len(conv.kernel_size))], bias, groups=groups * outs)
        if not shuffled:
            return [first, last]
        return [first, shuffle(groups, ins, outs, width, channel_axis(site)), last]


@dataclass(frozen=True, order=True)
class Form:
    """What stands in a layer's place: its cost as a share, groups of inputs and outputs, channels of each block."""

    share: float
    ins: int
    outs: int
    width: int
