"""Replaces a convolution by two over different axes, n x n by n x 1 and 1 x n, one after the other or side by side."""

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

from . import _cross as cross
from . import _separable as separable
from ._chain_fitting import drafted, fit_statistics, fitted
from ._convolutions import IS_TRANSPOSED, chain, channel_axis, even_padding, float64, why_tied
from ._ranks import Draft, RankedPass, energy_rank, rank_for, rounded_up
from ._relus import WithRelus
from ._stack_refining import best_last, squared_norm
from ._stacking import compose

Axes = tuple[int, ...]


class SplitKernels(WithRelus, RankedPass):
    """conv[O, C, n, m]  =>  conv[R, C, n, 1], conv[O, R, 1, m]                     arrangement=sequential
                      =>  conv[O, C, n, 1](x) + conv[O, C, 1, m](x)             arrangement=parallel, merge=sum
                      =>  [conv[O/2, C, n, 1](x), conv[O/2, C, 1, m](x)]        arrangement=parallel, merge=concat

    In sequence, W[o, c, i, j] = sum over r of H[o, r, j] V[r, c, i]: the singular value decomposition of W as a matrix
    (c, i) x (o, j) is the nearest pair with R channels between, exact from R = min(n C, m O) on (Jaderberg et al. 2014;
    Tai et al. 2016). Either axis may come first; all ways are tried. With calibration data the best dense weight is
    decomposed in the norm of what the first layer sees (the nearest Kronecker product of the inputs' Gram matrix S),
    and from there both layers together are fitted to the error of the outputs, tr(E S E^T). Stride, dilation and
    padding go to the layer that has the axis. The first layer has no bias, since the padding between the two would
    lack it; with `activation=relu` it has one, and pads for both.

    Side by side, both see the input: what is left of the weight is a cross, solved by least squares over its taps; the
    first branch holds the middle tap. `merge=concat` lets each give half of the outputs, those at which it is better
    than the other (Szegedy et al. 2016 give them as they come), and puts them back in order, which `absorb-shuffles`
    leaves to the layer behind. Far less is left of the weight than in sequence at the same cost: this is for
    architectures that need the form, and for training.

    Of kernels with three axes any share may come first in sequence; side by side there are three branches. Where S
    would be larger than 4608 squared, only the last layer in sequence is fitted to the data.
    """

    name: ClassVar = "split-kernels"
    contract: ClassVar = Approximate(exact_when="in sequence, rank gives min(n C, m O) channels")

    kernel: int | None = Field(None, ge=2, description="only kernels whose largest side is this; by default all")
    arrangement: Literal["sequential", "parallel"] = Field(
        "sequential", description="one layer after the other, or side by side"
    )
    merge: Literal["sum", "concat"] = Field("sum", description="how parallel branches come together")
    activation: Literal["none", "relu"] = Field(
        "none", description="what stands between two in sequence; relu wants fine-tuning"
    )

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        others = ("merge",) if self.arrangement == "sequential" else ("rank", "energy", "round_to", "activation")
        for option in filter(self.differs, others):
            raise ValueError(f"{option} has no meaning with arrangement={self.arrangement}")
        return self

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Convolutions with at least two sides of more than one."""
        tied = program.tied()
        for node, conv in program.layers(*CONVOLUTIONS, *TRANSPOSED):
            largest = max(conv.kernel_size)
            if len(conv.kernel_size) == 1 or largest == 1 or self.kernel not in (None, largest):
                continue
            if isinstance(conv, TRANSPOSED):
                yield Skip.of(node, IS_TRANSPOSED)
                continue
            site = Site.of(program, node)
            reason = self.unfit(conv) or why_tied(program, node, tied)
            if reason is None and self.arrangement == "sequential" and not self.by_weight:
                reason = self.too_costly(min(share for share, _, _ in self.all_ways(site)), conv.groups)
            yield Skip.of(node, reason) if reason else site

    def unfit(self, conv: Any) -> str | None:
        """Why a convolution has no such form, or None."""
        sides = [size for size in conv.kernel_size if size > 1]
        outputs = conv.out_channels // conv.groups
        if len(sides) < 2:
            return "its kernel has one axis only"
        if self.arrangement == "sequential":
            if self.activation == "relu" and even_padding(conv) is None:
                return "it pads unevenly, and with a bias between the first layer would have to pad for both"
        elif self.merge == "concat":
            if outputs < len(sides):
                return f"{outputs} outputs a group are too few for {len(sides)} branches"
        elif sum(sides) >= math.prod(sides):
            return "branches would cost what it costs"
        return None

    def candidates(self, site: Site) -> Iterator[Replacement]:
        """What the weights alone give, and what the data do."""
        conv = site.layer
        check_finite(conv.weight, "weights")
        measured = fit_statistics(site)
        for stats in [None] if measured is None else [None, measured]:
            if self.arrangement == "parallel":
                yield cross.branches(conv, self.merge, stats, channel_axis(site))
                continue
            weight, bias = float64(conv)
            if stats is None:
                pair = self.nearest_pair(site, weight)
            else:
                pair, bias = fitted(
                    stats, weight, bias, conv.groups, lambda *wanted: self.nearest_pair(site, *wanted), near=True
                )
            yield self.activated(self.layers(conv, pair, bias), site)

    @property
    def takes_steps(self) -> bool:
        """Whether joint steps bring its drafts nearer: what is side by side is solved for at once."""
        return self.arrangement == "sequential"

    def draft(self, site: Site, weight: Tensor, gram: Tensor | None = None, steps: int = 0) -> Draft:
        """The closed form, and in sequence so many joint steps."""
        groups = site.layer.groups
        if self.arrangement == "parallel":
            made, dense = cross.draft(site.layer, self.merge, weight, gram, channel_axis(site))
            return Draft([made], dense)
        pair = drafted(self.nearest_pair(site, weight, gram, site.memo), weight, gram, groups, steps)
        return Draft(self.layers(site.layer, pair, float64(site.layer)[1]), compose(pair, groups))

    def nearest_pair(
        self, site: Site, weight: Tensor, gram: Tensor | None = None, memo: dict[Any, Any] | None = None
    ) -> list[Tensor]:
        """The nearest two kernels to a weight, of all ways, [M, C/g, ...] and [O, M/g, ...].

        Args:
            gram: S [g, F, F] of the layer's inputs, in whose norm it is nearest, or nearly; by default all count alike.
            memo: what is kept of the same weight in the same norm for other numbers of channels.
        """
        target = weight.unflatten(0, (site.layer.groups, -1))
        tried: list[tuple[float, int, tuple[Tensor, Tensor]]] = []
        for axes, width in self.ways(site):
            key = SplitKernels, axes, id(weight), id(gram)
            if memo is None or key not in memo:
                metric = None if gram is None else separable.input_metric(gram, target.shape[2], target.shape[3:], axes)
                spectrum = separable.Spectrum.of(target, axes, metric)
                if memo is not None:
                    memo[key] = spectrum, weight, gram  # held, so that no other tensors get their numbers
            else:
                spectrum = memo[key][0]
            pair = spectrum.pair(width)
            if gram is not None:
                pair = pair[0], best_last([*pair], target, gram)
            error = squared_norm((separable.compose(*pair) - target).flatten(2), gram)
            tried.append((error, len(tried), pair))
        return [kernel.flatten(0, 1) for kernel in min(tried)[2]]

    def ways(self, site: Site) -> list[tuple[Axes, int]]:
        """The axes that the first layer may have, with the channels between for each group."""
        return [(axes, width) for _, axes, width in self.affordable_ways(site)]

    def alternatives(self, site: Site) -> list[tuple[float, ...]]:
        """The ways, with the channels between and the axes of the first layer; side by side there is one."""
        if self.arrangement == "parallel":
            conv = site.layer
            return [(cross.share(conv.kernel_size, conv.out_channels // conv.groups, self.merge),)]
        return [(share, width, *axes) for share, axes, width in self.affordable_ways(site)]

    def affordable_ways(self, site: Site) -> list[tuple[float, Axes, int]]:
        """Those of all that the options allow; with `energy` only the cheapest."""
        ways = self.all_ways(site)
        fit = [way for way in ways if not self.by_weight and not self.too_costly(way[0], site.layer.groups)]
        return fit or [min(ways)]

    def all_ways(self, site: Site) -> list[tuple[float, Axes, int]]:
        """What each way costs, as a share of the layer's MACs; the axes of its first layer; the channels between."""
        conv = site.layer
        dims, groups = len(conv.kernel_size), conv.groups
        inputs, outputs = conv.weight.shape[1], conv.out_channels // groups
        before, after = self.padded(site), site.output_shape[-dims:]
        dense = math.prod(after) * conv.weight.numel()
        found = []
        for axes in separable.first_axes(conv.kernel_size):
            early = math.prod(conv.kernel_size[axis] for axis in axes)
            late = math.prod(conv.kernel_size) // early
            between = math.prod(after[axis] if axis in axes else before[axis] for axis in range(dims))
            unit = groups * (between * early * inputs + math.prod(after) * late * outputs)
            if self.energy is None:
                width = rank_for(self.rank, unit, dense, groups, self.rounding)
            else:
                values = separable.singular_values(float64(conv)[0].unflatten(0, (groups, -1)), axes)
                width = rounded_up(energy_rank(values, self.energy), groups, self.rounding)
            width = min(width, inputs * early, outputs * late)
            found.append((unit * width / dense if dense else 1.0, axes, width))
        return found

    def padded(self, site: Site) -> tuple[int, ...]:
        """The size of the map between, along the axes that the first layer does not have."""
        size = site.input_shape[-len(site.layer.kernel_size) :]
        if self.activation == "none":
            return size
        return tuple(n + 2 * p for n, p in zip(size, even_padding(site.layer) or (), strict=True))

    def layers(self, conv: Any, pair: Sequence[Tensor], bias: Tensor | None) -> list[nn.Module]:
        """The two layers, each with the stride and the padding of its axes; all padding on the first before a ReLU."""
        owners = [0 if size > 1 else 1 for size in pair[0].shape[2:]]
        return chain(conv, pair, bias, owners, [0] * len(owners) if self.activation == "relu" else owners)
