"""Replaces a convolution by a grouped one, alone or with one over single pixels, and puts channels in order for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fxcompile.contracts import Approximate
from fxcompile.layer_stats import check_finite
from fxcompile.layers import CONVOLUTIONS, TRANSPOSED
from fxcompile.program import Program
from fxcompile.rewriting import Replacement, Site, Skip

from ._chain_fitting import fit_statistics, fitted_by
from ._convolutions import IS_TRANSPOSED, channel_axis, convolution, float64, why_tied
from ._grouping import Pair, by_group, compose, lost, nearest_pair, refined, singular_values
from ._permuting import Arrangement, as_they_stand, searched, within
from ._ranks import Draft, RankedPass, energy_rank, rank_for, rounded_up
from ._reordering import reorder, shuffle
from ._stack_refining import held, hold_, squared_norm

MOST_GROUPS = 8
"""Of those to choose from. At equal cost 4 to 8 came nearest on trained layers of 32 to 128 channels, 3x3 and 5x5."""


class GroupShuffle(RankedPass):
    """conv[O, C, k, k]  =>  conv[M, C/g, k, k], conv[O, M, 1, 1]                                     style=pointwise
                      =>  conv[C r, 1, k, k], conv[O, C r, 1, 1]                                   style=depthwise
                      =>  conv[M, C/g, k, k], channel shuffle, conv[O, M/g, 1, 1]                  style=shuffle-unit
                      =>  inputs in order, conv[O, C/g, k, k], outputs in order                       style=permuted

    The first three are blocks of the weight, from a group of inputs to one of outputs, by a few channels each (Zhang et
    al. 2018; depthwise separable: Guo et al. 2018; over single pixels: the Monarch matrices of Dao et al. 2022). From
    the weights alone, each block's singular value decomposition, which is the nearest there is. With calibration data,
    each block of the best dense weight is reduced in the norm of what it sees, its part of the Gram matrix S of the
    layer's inputs, the last layer is solved for all blocks together, and then both layers are fitted to the error of
    the outputs, tr(E S E^T).

    `groups` is the number for the k x k layer, and in a shuffle unit for both; by default any from 2 to 8 which the
    channels allow: that which comes nearest at the share of the cost that `rank` gives, else that which costs least.
    A layer that has groups already gets so many in each. At equal cost `pointwise` comes nearest on trained layers.
    Only `shuffle-unit` and `permuted` take the place of layers over single pixels, as in ShuffleNet.

    `permuted` leaves out what is between groups, the fewest that cost no more than the share `rank`. Channels are put
    together so that it is little, by turns of inputs and outputs; with calibration data the rest is solved for, and the
    layer's own order is kept where that comes nearer. A block-diagonal weight in disorder comes out exactly. Run
    `absorb-shuffles` after it, and the orders go into the layers around where those allow it. It is the cheapest form
    and the farthest, and calibration data bring it more than the order does.

    Stride, padding and dilation stay with the first layer; the bias goes to the last.
    """

    name: ClassVar = "group-shuffle"
    contract: ClassVar = Approximate(
        exact_when="rank gives each block as many channels as it has outputs, or as it sees; with style=permuted, no "
        "weight is between the groups"
    )
    steps_if_large: ClassVar = True

    style: Literal["pointwise", "depthwise", "shuffle-unit", "permuted"] = Field(
        "pointwise", description="what stands for the layer: see above"
    )
    groups: int | None = Field(
        None, ge=1, description="groups of inputs, and in a shuffle unit of outputs; by default chosen for each layer"
    )

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.style == "depthwise" and self.groups is not None:
            raise ValueError("groups has no meaning with style=depthwise, where each input is a group")
        if self.style == "permuted":
            for option in filter(self.differs, ("energy", "round_to")):
                raise ValueError(f"{option} has no meaning with style=permuted, which has one layer")
            if isinstance(self.rank, int) and self.differs("rank"):
                raise ValueError("rank as channels has no meaning with style=permuted, which has one layer")
            if self.groups is not None and self.differs("rank"):
                raise ValueError("give rank or groups with style=permuted, not both: one says the other")
        return self

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Convolutions over more than one pixel; with `style=shuffle-unit` and `permuted` over one too."""
        tied = program.tied()
        for node, conv in program.layers(*CONVOLUTIONS, *TRANSPOSED):
            if self.style in ("pointwise", "depthwise") and max(conv.kernel_size) == 1:
                continue
            if isinstance(conv, TRANSPOSED):
                yield Skip.of(node, IS_TRANSPOSED)
                continue
            site = Site.of(program, node)
            reason = self.unfit(conv) or why_tied(program, node, tied)
            if reason is None and not self.by_weight and self.style != "permuted":
                form = min(self.forms(site))
                reason = self.too_costly(form.share, conv.groups * form.ins * form.outs)
            yield Skip.of(node, reason) if reason else site

    def unfit(self, conv: Any) -> str | None:
        """Why a convolution has no such form, or None."""
        inputs, outputs = conv.weight.shape[1], conv.out_channels // conv.groups
        each = " in each of its groups" if conv.groups > 1 else ""
        if inputs < 2:
            return f"it has {'one' if inputs else 'no'} input{each}"
        if self.splits(inputs, outputs):
            return None
        channels = f"{inputs} inputs" if self.style == "pointwise" else f"{inputs} inputs and {outputs} outputs"
        wanted = f"any number of groups from 2 to {MOST_GROUPS}"
        if self.style == "permuted":
            wanted = f"{self.least_groups} groups or more, as rank={self.rank:.3g} wants"
        return f"its {channels}{each} do not fall into {self.groups or wanted}"

    @property
    def least_groups(self) -> int:
        """How many groups cost no more than the share `rank`."""
        return max(2, math.ceil(1 / self.rank - 1e-9))

    def splits(self, inputs: int, outputs: int) -> list[tuple[int, int]]:
        """The numbers of groups of inputs and of outputs to choose from."""
        if self.style == "depthwise":
            return [(inputs, 1)]
        if self.style == "permuted":
            common = math.gcd(inputs, outputs)
            wanted = range(self.least_groups, common + 1) if self.groups is None else [self.groups]
            return [(count, count) for count in wanted if common % count == 0][:1]
        shuffled = self.style == "shuffle-unit"
        common = math.gcd(inputs, outputs) if shuffled else inputs
        wanted = range(2, MOST_GROUPS + 1) if self.groups is None else [self.groups]
        return [(count, count if shuffled else 1) for count in wanted if common % count == 0]

    def candidates(self, site: Site) -> Iterator[Replacement]:
        """What the weights alone give, and what the data do."""
        check_finite(site.layer.weight, "weights")
        weight, bias = float64(site.layer)

        if self.style == "permuted":
            yield from self.permuted(site, weight, bias)
            return

        def fit(wanted: Tensor, gram: Tensor) -> tuple[Pair, Tensor]:
            target, norm = by_group(wanted, site.layer.groups), hold_(gram)
            pair = refined(self.nearest(site, target, norm), target, norm)
            return pair, compose(pair).reshape(wanted.shape)

        yield self.layers(site, self.nearest(site, by_group(weight, site.layer.groups)), bias)
        stats = fit_statistics(site)
        if stats is not None:
            yield self.layers(site, *fitted_by(stats, weight, bias, fit))

    @property
    def takes_steps(self) -> bool:
        """Whether joint steps bring its drafts nearer: one layer is solved for at once."""
        return self.style != "permuted"

    def draft(self, site: Site, weight: Tensor, gram: Tensor | None = None, steps: int = 0) -> Draft:
        """The closed form, and so many joint steps."""
        target, norm = by_group(weight, site.layer.groups), None if gram is None else held(gram)
        if self.style == "permuted":
            (made, arrangement), dense = self.arranged(site, weight, gram)
            return Draft(self.grouped(site, made, arrangement, float64(site.layer)[1]), dense)
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

    def pinned(self, site: Site, layers: Sequence[nn.Module]) -> Self:
        """With so many groups as the first of these layers has."""
        first: Any = layers[0]
        if self.style in ("depthwise", "permuted"):
            return self
        return self.model_copy(update={"groups": first.groups // site.layer.groups})

    def affordable_forms(self, site: Site) -> list[Form]:
        """Those that cost no more than the share that `rank` gives; else the one that costs least."""
        forms, fit = self.forms(site), []
        if not self.by_weight and isinstance(self.rank, float):
            fit = [form for form in forms if not self.too_costly(form.share, 1)]
        return fit or sorted(forms)[:1]

    def forms(self, site: Site) -> list[Form]:
        """Those that the options and the channels allow."""
        conv = site.layer
        inputs, outputs = conv.weight.shape[1], conv.out_channels // conv.groups
        taps, positions = math.prod(conv.kernel_size), math.prod(site.output_shape[-len(conv.kernel_size) :])
        dense, found = positions * conv.weight.numel(), []
        for ins, outs in self.splits(inputs, outputs):
            count = conv.groups * ins * outs
            if self.style == "permuted":
                found.append(Form(1 / ins, ins, outs, 0))
                continue
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

    def permuted(self, site: Site, weight: Tensor, bias: Tensor | None) -> Iterator[Replacement]:
        """The layer's own order, in which it is then solved for; another; and what comes nearest on the data."""
        target, taps, ins = by_group(weight, site.layer.groups), math.prod(site.layer.kernel_size), self.ins(site)
        for arrangement in (as_they_stand(target, taps), searched(target, taps, ins)):
            made, _ = within(target, arrangement, taps, ins)
            yield self.grouped(site, made, arrangement, bias)
        stats = fit_statistics(site)
        if stats is not None:
            (made, arrangement), bias = fitted_by(stats, weight, bias, lambda *wanted: self.arranged(site, *wanted))
            yield self.grouped(site, made, arrangement, bias)

    def arranged(
        self, site: Site, weight: Tensor, gram: Tensor | None = None
    ) -> tuple[tuple[Tensor, Arrangement], Tensor]:
        """The grouped weight in the order in which it comes nearest, that order, and the weight as a dense one."""
        target, taps, ins = by_group(weight, site.layer.groups), math.prod(site.layer.kernel_size), self.ins(site)
        norm = None if gram is None else held(gram)
        tried: list[tuple[float, int, Tensor, Arrangement, Tensor]] = []
        for arrangement in (as_they_stand(target, taps), searched(target, taps, ins, norm)):
            made, dense = within(target, arrangement, taps, ins, norm)
            tried.append((squared_norm(target - dense, norm), len(tried), made, arrangement, dense))
        _, _, made, arrangement, dense = min(tried)
        return (made, arrangement), dense.reshape(weight.shape)

    def ins(self, site: Site) -> int:
        """Groups that each group of a layer gets."""
        return self.forms(site)[0].ins

    def grouped(self, site: Site, made: Tensor, arrangement: Arrangement, bias: Tensor | None) -> list[nn.Module]:
        """The grouped convolution, and its inputs and outputs in order where they are not."""
        conv, (groups, ins, *_) = site.layer, made.shape
        inputs, outputs = (order + order.shape[1] * torch.arange(groups)[:, None] for order in arrangement)
        layer = convolution(
            conv,
            made.flatten(0, 2).unflatten(1, (-1, *conv.kernel_size)),
            None if bias is None else bias[outputs.flatten()],
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=groups * ins,
        )
        axis = channel_axis(site)
        return [*reorder(inputs.flatten(), axis), layer, *reorder(outputs.flatten().argsort(), axis)]


@dataclass(frozen=True, order=True)
class Form:
    """What stands in a layer's place: its cost as a share, groups of inputs and outputs, channels of each block."""

    share: float
    ins: int
    outs: int
    width: int
