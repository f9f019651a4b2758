"""Replaces a convolution by a narrow one between two over single pixels, and a linear layer by a narrow pair."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from fxcompile.contracts import Approximate
from fxcompile.layer_stats import check_finite
from fxcompile.layers import CONVOLUTIONS, TRANSPOSED
from fxcompile.program import Program
from fxcompile.rewriting import Replacement, Site, Skip

from ._bottleneck_work import CanonicalWork, Work
from ._chain_fitting import drafted, fit_statistics, fitted, fitted_by, too_large
from ._convolutions import IS_TRANSPOSED, chain, even_padding, float64, linear, why_tied
from ._polyadic import nearest_terms, product, refined_terms
from ._ranks import Draft, RankedPass, energy_rank, rank_for, rounded_up
from ._relus import WithRelus
from ._separable import as_matrix, singular_values
from ._stacking import compose
from ._tucker import reduced_both, reduced_inputs
from ._vbmf import evidence_rank

DRAFT_SWEEPS, BRIEF_SWEEPS = (8, 3), (60, 6)
"""Of alternating least squares with `style=cp`, in a draft and in a brief fit, and those of a large layer."""


class Bottleneck(WithRelus, RankedPass):
    """conv[O, C, k, k]  =>  conv[R, C, 1, 1], conv[S, R, k, k], conv[O, S, 1, 1]              style=tucker
                      =>  conv[R, C, 1, 1], conv[O, R, k, k]                                style=inception
                      =>  conv[R, C, 1, 1], conv[R, 1, k, 1], conv[R, 1, 1, k], conv[O, R, 1, 1]    style=cp
    conv[O, C, 1, 1]  =>  conv[R, C, 1, 1], conv[O, R, 1, 1]           linear[O, C] likewise, in any style

    From the weights alone, the Tucker decomposition over inputs and outputs by alternation (De Lathauwer et al. 2000;
    Kim et al. 2016), and for one reduction the singular value decomposition. With calibration data the best dense
    weight W is reduced: to the outputs that vary the most, the leading eigenvectors of W S W^T with the Gram matrix S
    of the layer's inputs, and to the inputs that matter the most to them; then all layers together are fitted to the
    error of the outputs, tr(E S E^T). Over single pixels that is reduced-rank regression, the best that there is.

    `cp` is the canonical polyadic decomposition (Lebedev et al. 2015), in which every channel between goes through the
    axes of the kernel by itself: by alternating least squares, held so that its terms do not cancel, and with
    calibration data then all factors together as above. It is not known to find the best there is.

    Linear layers at the end are taken, too, and a classifier bears less than others: `skip` leaves it out, `max_error`
    only where it loses too much.

    `rank` as a share takes the R and S, of the multiples of `round_to`, that are most nearly in proportion to C and O,
    and then those that use it up most; as channels, both are that many. With `energy` either reduction may lose half of
    what may be lost. `vbmf` takes the ranks that variational Bayes finds to stand out from noise (Nakajima et al.
    2013), which are low: such networks want fine-tuning.

    Stride, padding and dilation stay with the k x k layer, or with the layers of their axes, groups with all, the bias
    with the last, unless `activation=relu` puts a ReLU between: then the others have one too, and the first pads for
    all.
    """

    name: ClassVar = "bottleneck"
    contract: ClassVar = Approximate(
        exact_when="rank gives as many channels as go in and come out, with style=cp times the taps of the kernel"
    )

    style: Literal["tucker", "inception", "cp"] = Field(
        "tucker",
        description="for kernels larger than one pixel: reduce inputs and outputs, or inputs only, or split each axis "
        "off, channel by channel",
    )
    vbmf: bool = Field(False, description="instead of rank: as many channels as stand out from noise in the weight")
    activation: Literal["none", "relu"] = Field("none", description="what stands between; relu wants fine-tuning")

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if self.vbmf and (self.energy is not None or self.differs("rank")):
            raise ValueError("give vbmf, or one of rank and energy, not both")
        if self.style == "cp" and self.by_weight:
            raise ValueError("with style=cp only rank says how many channels there are")
        return self

    @property
    def by_weight(self) -> bool:
        """Whether the weight says how many channels there are, and not its cost or the user."""
        return self.vbmf or self.energy is not None

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Convolutions and linear layers."""
        tied = program.tied()
        for node, layer in program.layers(*CONVOLUTIONS, *TRANSPOSED, nn.Linear):
            if isinstance(layer, TRANSPOSED):
                yield Skip.of(node, IS_TRANSPOSED)
                continue
            site = Site.of(program, node)
            reason = why_tied(program, node, tied)
            uneven = not isinstance(layer, nn.Linear) and even_padding(layer) is None
            if reason is None and self.activation == "relu" and uneven:
                reason = "it pads unevenly, and with a bias between the first layer would have to pad for all"
            if reason is None and not self.by_weight:
                work = self.work(site)
                reason = self.too_costly(work.share(self.ranks(site, work)), work.groups)
            yield Skip.of(node, reason) if reason else site

    def candidates(self, site: Site) -> Iterator[Replacement]:
        """What the weights alone give, and what the data do."""
        check_finite(site.layer.weight, "weights")
        work, (weight, bias) = self.work(site), float64(site.layer)
        weight, ranks = with_taps(weight), self.ranks(site, work)
        if isinstance(work, CanonicalWork):
            yield from self.canonical(site, ranks[0], None)
            return

        def start(wanted: Tensor, gram: Tensor | None = None) -> list[Tensor]:
            return reduced(wanted.reshape(weight.shape), ranks, work.groups, gram)

        measured = fit_statistics(site)
        for stats in [None] if measured is None else [None, measured]:
            stages, level = start(weight), bias
            if stats is not None:
                stages, level = fitted(stats, weight, bias, work.groups, start, near=True)
            yield self.activated(self.layers(site.layer, stages, level), site)

    def brief(self, site: Site) -> Iterator[Replacement]:
        """The candidates; of `style=cp` after fewer sweeps, behind which joint steps end within a few percent."""
        work = self.work(site)
        if not isinstance(work, CanonicalWork):
            return self.candidates(site)
        check_finite(site.layer.weight, "weights")
        return self.canonical(site, self.ranks(site, work)[0], BRIEF_SWEEPS[too_large(site.layer.weight)])

    def canonical(self, site: Site, rank: int, sweeps: int | None) -> Iterator[Replacement]:
        """The candidates with `style=cp`."""
        weight, bias = float64(site.layer)

        def fit(wanted: Tensor, gram: Tensor) -> tuple[list[Tensor], Tensor]:
            target = as_axes(wanted, site.layer.groups)
            factors = nearest_terms(target, rank, gram, sweeps)
            if not too_large(wanted):
                factors = refined_terms(factors, target, gram)
            return factors, product(factors).reshape(wanted.shape)

        found = nearest_terms(as_axes(weight, site.layer.groups), rank, None, sweeps)
        yield self.activated(self.canonical_layers(site.layer, found, bias), site)
        stats = fit_statistics(site)
        if stats is not None:
            yield self.activated(self.canonical_layers(site.layer, *fitted_by(stats, weight, bias, fit)), site)

    def canonical_layers(self, conv: Any, factors: Sequence[Tensor], bias: Tensor | None) -> list[nn.Module]:
        """The layers with these factors, each axis of the kernel in one of its own, with its stride and padding."""
        outer, inner, *axes = (factor.mT for factor in factors)
        ones, width = [1] * len(conv.kernel_size), outer.shape[0] * outer.shape[1]
        long = [axis for axis, size in enumerate(conv.kernel_size) if size > 1]
        stages = [inner.reshape(width, -1, *ones)]
        for axis, factor in zip(long, axes, strict=True):
            stages.append(factor.reshape(width, 1, *ones[:axis], -1, *ones[axis + 1 :]))
        stages.append(outer.mT.reshape(conv.out_channels, -1, *ones))
        owners = [long.index(axis) + 1 if axis in long else 0 for axis in range(len(ones))]
        padded = [0] * len(owners) if self.activation == "relu" else owners
        return chain(conv, stages, bias, owners, padded, [conv.groups, *[width] * len(long), conv.groups])

    def draft(self, site: Site, weight: Tensor, gram: Tensor | None = None, steps: int = 0) -> Draft:
        """The closed form, and so many joint steps."""
        work, target = self.work(site), with_taps(weight)
        if isinstance(work, CanonicalWork):
            target = as_axes(weight, work.groups)
            sweeps = DRAFT_SWEEPS[too_large(weight)]
            factors = nearest_terms(target, self.ranks(site, work)[0], gram, sweeps)
            if gram is not None and steps and not too_large(weight):
                factors = refined_terms(factors, target, gram, steps)
            made = self.canonical_layers(site.layer, factors, float64(site.layer)[1])
            return Draft(made, product(factors).reshape(weight.shape))
        stages = reduced(target, self.ranks(site, work), work.groups, gram)
        stages = drafted(stages, target, gram, work.groups, steps)
        layers = self.layers(site.layer, stages, float64(site.layer)[1])
        return Draft(layers, compose(stages, work.groups).reshape(weight.shape))

    def alternatives(self, site: Site) -> list[tuple[float, ...]]:
        """One, with its ranks."""
        work = self.work(site)
        ranks = self.ranks(site, work)
        return [(work.share(ranks), *ranks)]

    def layers(self, layer: Any, stages: Sequence[Tensor], bias: Tensor | None) -> list[nn.Module]:
        """The layers with these weights: stride and padding go to the one with the kernel, or the padding, before a
        ReLU, to the first.
        """
        if isinstance(layer, nn.Linear):
            return [linear(layer, stages[0].flatten(1)), linear(layer, stages[1].flatten(1), bias)]
        owners = [0 if max(layer.kernel_size) == 1 else 1] * len(layer.kernel_size)
        return chain(layer, stages, bias, owners, [0] * len(owners) if self.activation == "relu" else owners)

    def work(self, site: Site) -> Work:
        """What decides the cost of a site's layer."""
        layer = site.layer
        if isinstance(layer, nn.Linear):
            return Work(1, layer.in_features, layer.out_features, 1, 1, 1)
        dims, taps = len(layer.kernel_size), math.prod(layer.kernel_size)
        before, after = site.input_shape[-dims:], site.output_shape[-dims:]
        if taps == 1:
            before = after
        elif self.activation == "relu":
            before = tuple(n + 2 * p for n, p in zip(before, even_padding(layer) or (), strict=True))
        outputs = layer.out_channels // layer.groups
        work = Work(layer.groups, layer.weight.shape[1], outputs, taps, math.prod(before), math.prod(after))
        return CanonicalWork.of(work, layer.kernel_size, before, after) if self.style == "cp" and taps > 1 else work

    def ranks(self, site: Site, work: Work) -> tuple[int, ...]:
        """Channels between, for each group: R, and S where outputs are reduced too."""
        both = self.style == "tucker" and work.taps > 1
        most = work.most if both else work.most[:1]
        if self.by_weight:
            weight = float64(site.layer)[0].unflatten(0, (work.groups, -1))
            sides = (weight, weight.transpose(1, 2))[: len(most)]
            found = [self.rank_of(side, len(most)) for side in sides]
            each = [rounded_up(rank, work.groups, self.rounding) for rank in found]
        elif both and isinstance(self.rank, float):
            return work.widths(self.rank, self.rounding)
        else:
            unit = work.macs((1,)) if not both else 1.0
            each = [rank_for(self.rank, unit, work.dense, work.groups, self.rounding)] * len(most)
        return tuple(map(min, each, most))

    def rank_of(self, weight: Tensor, reductions: int) -> int:
        """Channels that a weight [g, O, C, *k] wants in place of C, if it is one of so many reductions."""
        if self.energy is None:
            return max(evidence_rank(matrix) for matrix in as_matrix(weight, ()))
        return energy_rank(singular_values(weight, ()), 1 - (1 - self.energy) / reductions)


def as_axes(weight: Tensor, groups: int) -> Tensor:
    """A weight [O, C/g, *k] by group and without the axes that have one tap: [g, O/g, C/g, *k]."""
    return weight.reshape(groups, -1, weight.shape[1], *[size for size in weight.shape[2:] if size > 1])


def with_taps(weight: Tensor) -> Tensor:
    """A linear layer's weight as that of a convolution over single pixels; any other as it is."""
    return weight.reshape(*weight.shape, *[1] * (weight.dim() == 2))


def reduced(weight: Tensor, ranks: Sequence[int], groups: int, gram: Tensor | None = None) -> list[Tensor]:
    """Stages near a weight [O, C/g, *k] with so many channels between in each group; near in the norm of S [g, F, F]
    if given.
    """
    target = weight.unflatten(0, (groups, -1))
    if len(ranks) == 2:
        stages = reduced_both(target, ranks[0], ranks[1], gram)
    else:
        stages = reduced_inputs(target, ranks[0], gram)
    return [stage.flatten(0, 1) for stage in stages]
