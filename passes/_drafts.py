"""What each pass could put in a layer's place, how far that would be off, and how much that matters to the network."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxcompile.distance import Distance
from fxcompile.errors import FitError
from fxcompile.fitting import enough_rows, row_count
from fxcompile.layer_stats import LayerStats, check_finite, grouped, mean_output
from fxcompile.layers import with_weights
from fxcompile.planning import Planning
from fxcompile.rewriting import Site

from ._chain_fitting import MOST_FEATURES
from ._convolutions import float64
from ._grouping import held
from ._ranks import RankedPass
from ._stack_refining import squared_norm

SHARES = [count / 24 for count in range(1, 24)]
"""Shares of a layer's cost to choose from."""

DRAFTS, STEPS = (6, 3), 12
"""Drafts of a pass for a layer, and for one of which each takes long; joint steps of one of them."""

LONG = 2e9
"""Multiply-accumulates of a product of weight and Gram matrix from which on a draft takes long."""

PROBES = 2
"""Batches on which is measured how much a layer matters."""


Style = Callable[[float], RankedPass]
"""A pass with a share of a layer's cost to spend."""


@dataclass(frozen=True)
class Option:
    """A pass for a layer: the share of the layer's MACs that it costs at most, and the squared error of its outputs."""

    pass_: RankedPass
    share: float
    error: float


@dataclass
class Prospect:
    """What may become of a site.

    Attributes:
        curves: for each style that serves it, options in the order of their shares.
        size: the mean over rows of the squared outputs of the layer: what errors are a share of.
        weight: by how much the squared error of the network's outputs grows with that of the layer's.
        reason: why there are no options.
    """

    site: Site
    curves: list[list[Option]] = field(default_factory=list)
    size: float = 0.0
    weight: float = 1.0
    reason: str = ""

    @property
    def options(self) -> list[Option]:
        """Those of all curves."""
        return [option for curve in self.curves for option in curve]


def prospects(planning: Planning, name: str, sites: Sequence[tuple[Site, Sequence[Style]]]) -> list[Prospect]:
    """What may become of each site, in the order of the graph, in one walk over the data.

    Args:
        name: what to call the work.
        sites: each with the styles that may serve it.
    """
    walk, found = planning.walk(), []
    probes = planning.batches[:PROBES]
    wanted = planning.outputs(probes)
    for index, (site, styles) in enumerate(sites):
        planning.progress(name, index, len(sites))
        xs = list(walk.values_of(site.node.all_input_nodes[0]))
        ys = list(walk.values_of(site.node))
        prospect = Prospect(site)
        found.append(prospect)
        try:
            check_finite(site.layer.weight, "weights")
            sight = Sight.of(site, xs, planning.data is not None)
            prospect.size = sum(float(y.double().square().sum()) for y in ys) / max(
                sum(row_count(site.layer, y) for y in ys), 1
            )
            drawn = [draw_curve(style, sight) for style in styles]
        except FitError as unfit:
            prospect.reason = f"it could not be fitted: {unfit.problem}"
            continue
        prospect.curves = [options for options, _ in drawn if options]
        tried = [trial for _, trial in drawn if trial is not None]
        if tried:
            error, weight = min(tried, key=lambda trial: trial[0])
            changed = sight.outputs_of(weight, xs[: len(probes)])
            change = distance_between(walk.fork(site.node, changed).outputs(), wanted)
            prospect.weight = importance(change, error, prospect.size)
    return found


@dataclass(frozen=True)
class Sight:
    """A site's layer, and the moments of what it sees.

    Attributes:
        weight: of the layer, float64.
        gram: S [g, F, F], about the mean where the layer has a bias; None where there are no data, or it would be too
            large.
        level: mean square of the inputs, which stands for S where that is None.
        stats: what S comes from.
    """

    site: Site
    weight: Tensor
    gram: Tensor | None
    level: float
    stats: LayerStats | None

    @classmethod
    def of(cls, site: Site, xs: Sequence[Tensor], calibrated: bool) -> Sight:
        """What a layer sees of these inputs; nothing but their size without calibration data."""
        layer, weight = site.layer, float64(site.layer)[0]
        for x in xs:
            check_finite(x, "inputs")
        level = sum(float(x.double().square().sum()) for x in xs) / max(sum(x.numel() for x in xs), 1)
        if not calibrated or weight[0].numel() > MOST_FEATURES:
            return cls(site, weight, None, level, None)
        stats = LayerStats.of(layer)
        rows = math.ceil(enough_rows(stats.features) / (3 * len(xs)))
        for x in xs:
            stats.update_inputs(x, max_rows=rows)
        moments = stats.raw() if layer.bias is None else stats.centred()
        return cls(site, weight, moments.gram / max(stats.rows, 1), level, stats)

    @property
    def norm(self) -> Tensor | None:
        """S as errors are measured in it: no direction without any weight."""
        return None if self.gram is None else held(self.gram)

    def lost(self, weight: Tensor, norm: Tensor | None) -> float:
        """Squared error of the outputs of a row, over all outputs, with another weight."""
        lacks = (self.weight - weight).flatten(1)
        if norm is None:
            return squared_norm(lacks) * self.level
        return squared_norm(lacks.unflatten(0, (len(norm), -1)), norm)

    def outputs_of(self, weight: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
        """What the layer gives with another weight, and the bias that keeps the mean."""
        bias = float64(self.site.layer)[1]
        if bias is not None and self.stats is not None:
            bias = mean_output(grouped(self.weight - weight, self.stats), bias, self.stats)
        layer = with_weights(self.site.layer, weight, bias)
        with torch.no_grad():
            return [layer(x) for x in xs]


def draw_curve(style: Style, sight: Sight) -> tuple[list[Option], tuple[float, Tensor] | None]:
    """The options of a style for a layer; and the error and the weight of one of them, about in the middle.

    A few of them are drafted, between which the logarithm of the error is interpolated. Of that in the middle joint
    steps tell what they are worth to all.
    """
    site, norm = sight.site, sight.norm
    passes = distinct(style, site)
    if not passes:
        return [], None
    long = norm is not None and sight.weight.numel() * norm.shape[1] > LONG
    chosen = spread(len(passes), DRAFTS[long])
    middle = chosen[len(chosen) // 2]
    errors: list[float] = []
    gain, trial = 1.0, (math.inf, sight.weight)
    for index in chosen:
        errors.append(sight.lost(passes[index][1].draft(site, sight.weight, sight.gram).weight, norm))
        if index == middle:
            weight = passes[index][1].draft(site, sight.weight, sight.gram, STEPS).weight
            trial = sight.lost(weight, norm), weight
            gain = min(trial[0] / errors[-1], 1.0) if errors[-1] > 0 else 1.0
    known = [passes[index][0] for index in chosen]
    return [Option(pass_, share, gain * between(share, known, errors)) for share, pass_ in passes], trial


def distinct(style: Style, site: Site) -> list[tuple[float, RankedPass]]:
    """A style with each share at which it gives something else, and what that costs at most, the cheapest first."""
    found: dict[tuple[tuple[float, ...], ...], RankedPass] = {}
    for share in SHARES:
        pass_ = style(share)
        ways = tuple(pass_.alternatives(site))
        if max(way[0] for way in ways) <= share * (1 + 1e-9):
            found.setdefault(ways, pass_)
    return sorted(((max(way[0] for way in ways), pass_) for ways, pass_ in found.items()), key=lambda item: item[0])


def spread(count: int, most: int) -> list[int]:
    """At most so many of the first `count` numbers, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def between(share: float, shares: Sequence[float], errors: Sequence[float]) -> float:
    """The error at a share between others, along straight lines of its logarithm."""
    at = bisect_left(shares, share)
    if at < len(shares) and shares[at] == share:
        return errors[at]
    low, high = max(at - 1, 0), min(at, len(shares) - 1)
    first, second = (math.log(max(errors[index], 1e-300)) for index in (low, high))
    part = (share - shares[low]) / (shares[high] - shares[low])
    return math.exp(first + part * (second - first))


def distance_between(ours: Sequence[Sequence[Tensor]], theirs: Sequence[Sequence[Tensor]]) -> float:
    """The sum over outputs of the squared relative error; outputs that hold no fractions do not count."""
    distances = [Distance() for _ in theirs[0]]
    for given, wanted in zip(ours, theirs, strict=True):
        for distance, a, b in zip(distances, given, wanted, strict=True):
            if b.is_floating_point():
                distance.add(a, b)
    return sum(distance.value**2 for distance in distances)


def importance(change: float, error: float, size: float) -> float:
    """The weight of a layer by what an error of it changes in the outputs: never less than a millionth of what it
    would be if errors passed through as they are.
    """
    least = 1e-6 / size if size > 0 else 0.0
    found = change / error if error > 0 else 0.0
    return max(found, least) if math.isfinite(found) else 1.0 / size
