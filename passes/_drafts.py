"""What each pass could put in a layer's place, how far that would be off, and how much that matters to the network."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from fxcompile.distance import distances
from fxcompile.errors import FitError
from fxcompile.fitting import row_count
from fxcompile.layer_stats import LayerStats, check_finite, grouped, mean_output
from fxcompile.layers import with_weights
from fxcompile.planning import Planning
from fxcompile.rewriting import Site

from ._chain_fitting import MOST_FEATURES, inputs_seen, mean_gram, too_large
from ._convolutions import float64
from ._ranks import Draft, RankedPass
from ._stack_refining import held, squared_norm
from .stack_kernels import StackKernels

SHARES = [count / 24 for count in range(1, 24)]
"""Shares of a layer's cost to choose from."""

DRAFTS, STEPS = (5, 2), 5
"""Drafts of a pass for a layer beside its pilot, and for one of which each takes long; joint steps of the pilot."""

LONG = 5e8
"""Multiply-accumulates of a product of weight and Gram matrix from which on a draft takes long."""

PILOT, NOTHING, CLIFF = 0.4, 1e-12, 1e4
"""The share that each pass is drafted at first. Squared errors below this part of the outputs are rounding; two that
differ by more than this factor have between them a share from which on a form is exact, and say nothing of each other.
"""

HOPELESS, WORTH, MOST = (3.0, 1.5), 2.5, (5, 4)
"""What has more than so many times the squared error of another that costs no more, or in a layer for which drafts take
long, takes no joint steps; what has after them more than so many times that, is not drafted any further. So many of the
rest are, the nearest.
"""

TINY = 1e-300
"""What stands for no error at all in logarithms and ratios."""

PROBES = 1
"""Batches on which is measured how much a layer matters."""


Style = Callable[[float], RankedPass]
"""A pass with a share of a layer's cost to spend."""


@dataclass(frozen=True)
class Option:
    """A pass for a layer.

    Attributes:
        share: of the layer's MACs that it costs at most.
        error: the squared error of its outputs, over all outputs of a row.
        layers: what was drafted; None where the error lies between those of drafts.
    """

    pass_: RankedPass
    share: float
    error: float
    layers: Sequence[nn.Module] | None = field(default=None, repr=False, compare=False)


@dataclass
class Prospect:
    """What may become of a site.

    Attributes:
        curves: for each style that serves it, options in the order of their shares.
        size: the mean over rows of the squared outputs of the layer: what errors are a share of.
        weight: by how much the squared error of the network's outputs grows with that of the layer's: as measured at
            its first call, times the number of calls, whose errors are taken to be independent.
        reason: why there are no options.
    """

    site: Site
    curves: list[list[Option]] = field(default_factory=list)
    size: float = 0.0
    weight: float = 1.0
    reason: str = ""


def prospects(planning: Planning, name: str, sites: Sequence[tuple[Site, Sequence[Style]]]) -> list[Prospect]:
    """What may become of each site, in the order of the graph, in one walk over the data.

    Args:
        name: what to call the work.
        sites: each with the styles that may serve it.
    """
    walk, found = planning.walk(), []
    probes = planning.batches[:PROBES]
    wanted, calls = planning.outputs(probes), planning.program.calls()
    for index, (site, styles) in enumerate(sites):
        planning.progress(name, index, len(sites))
        for earlier, _ in sites[max(index - 1, 0) : index]:
            earlier.memo.clear()
        xs = list(walk.values_of(site.node.all_input_nodes[0]))
        ys = list(walk.values_of(site.node))
        prospect = Prospect(site)
        found.append(prospect)
        try:
            check_finite(site.layer.weight, "weights")
            sight = Sight.of(site, xs, planning.data is not None)
            rows = sum(row_count(site.layer, y) for y in ys)
            prospect.size = sum(float(torch.linalg.vector_norm(y)) ** 2 for y in ys) / max(rows, 1)
            pilots = flown([Pilot.of(choices, sight) for style in styles if (choices := distinct(style, site))], sight)
            if not pilots:
                continue
            nothing = NOTHING * prospect.size
            worth = worthy(pilots, nothing, MOST[sight.takes_long])
            prospect.curves = [draw_curve(pilot, sight, prospect.size) for pilot in worth]
        except FitError as unfit:
            prospect.reason = f"it could not be fitted: {unfit.problem}"
            continue
        felt = [importance(math.nan, math.nan, prospect.size)]
        lossy = [pilot for pilot in pilots if pilot.error > nothing]  # what others change is rounding
        if lossy:
            best = min(lossy, key=lambda pilot: pilot.error)
            felt = []
            # A few channels leave errors that are alike all over a map: what averages small ones out keeps these.
            for error, draft in ((best.error, best.draft), sight.draft(best.choices[0][1])):
                changed = sight.outputs_of(draft.weight, xs[: len(probes)])
                change = distance_between(walk.fork(site.node, changed).outputs(), wanted)
                felt.append(importance(change, error, prospect.size))
        prospect.weight = len(calls[id(site.layer)]) * max(felt)
    for site, _ in sites[-1:]:
        site.memo.clear()
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
        level = sum(float(torch.linalg.vector_norm(x)) ** 2 for x in xs) / max(sum(x.numel() for x in xs), 1)
        check_finite(torch.tensor(level), "mean squares of the inputs")
        if not calibrated or weight[0].numel() > MOST_FEATURES:
            return cls(site, weight, None, level, None)
        stats = inputs_seen(layer, xs)
        return cls(site, weight, mean_gram(stats, layer.bias is not None), level, stats)

    @cached_property
    def norm(self) -> Tensor | None:
        """S as errors are measured in it: no direction without any weight."""
        return None if self.gram is None else held(self.gram)

    @property
    def takes_long(self) -> bool:
        """Whether a draft does."""
        return self.gram is not None and takes_long(self.weight)

    def draft(self, pass_: RankedPass, steps: int = 0) -> tuple[float, Draft]:
        """What a pass drafts, and the squared error of that over all outputs of a row."""
        draft = pass_.draft(self.site, self.weight, self.gram, steps)
        lacks = (self.weight - draft.weight).flatten(1)
        if self.norm is None:
            return squared_norm(lacks) * self.level, draft
        return squared_norm(lacks.unflatten(0, (len(self.norm), -1)), self.norm), draft

    def outputs_of(self, weight: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
        """What the layer gives with another weight, and the bias that keeps the mean."""
        bias = float64(self.site.layer)[1]
        if bias is not None and self.stats is not None:
            bias = mean_output(grouped(self.weight - weight, self.stats), bias, self.stats)
        layer = with_weights(self.site.layer, weight, bias)
        with torch.no_grad():
            return [layer(x) for x in xs]


@dataclass(frozen=True)
class Pilot:
    """A pass as it was drafted at about one share.

    Attributes:
        choices: the passes, and what each costs at most.
        index: the number of the one that was drafted.
        start: the squared error of the closed form.
        error: the same after joint steps.
        draft: what was reached by then.
    """

    choices: list[tuple[float, RankedPass]]
    index: int
    start: float
    error: float
    draft: Draft

    @classmethod
    def of(cls, choices: list[tuple[float, RankedPass]], sight: Sight) -> Pilot:
        """The draft of one of these."""
        index = min(range(len(choices)), key=lambda item: abs(choices[item][0] - PILOT))
        error, draft = sight.draft(choices[index][1])
        return cls(choices, index, error, error, draft)

    def after(self, steps: int, sight: Sight) -> Pilot:
        """The same after joint steps, if they bring it nearer; and as it is where a fit would take none."""
        pass_ = self.choices[self.index][1]
        if sight.gram is None or not pass_.takes_steps or (too_large(sight.weight) and not pass_.steps_if_large):
            return self
        error, draft = sight.draft(pass_, steps)
        return replace(self, error=error, draft=draft) if error < self.error else self

    def far_behind(self, other: Pilot, factor: float, nothing: float = 0.0) -> bool:
        """Whether it is so many times as far off as another that costs no more, and `nothing` beside."""
        cheaper = other.choices[other.index][0] <= 1.05 * self.choices[self.index][0]
        return cheaper and self.error > factor * other.error + nothing


def flown(pilots: Sequence[Pilot], sight: Sight) -> list[Pilot]:
    """Pilots after their joint steps; those that these cannot save go without, but a stack, which starts blindly."""

    def hopeless(pilot: Pilot) -> bool:
        if isinstance(pilot.choices[pilot.index][1], StackKernels):
            return False
        return any(pilot.far_behind(other, HOPELESS[sight.takes_long]) for other in pilots)

    return [pilot if hopeless(pilot) else pilot.after(STEPS, sight) for pilot in pilots]


def worthy(pilots: Sequence[Pilot], nothing: float, most: int) -> list[Pilot]:
    """Those that no other leaves far behind at no more cost, errors below `nothing` being alike, and of them the
    nearest; what has one form only takes no further drafts, and does not count.
    """
    found = [pilot for pilot in pilots if not any(pilot.far_behind(other, WORTH, nothing) for other in pilots)]
    several = sorted((pilot for pilot in found if len(pilot.choices) > 1), key=lambda pilot: pilot.error)
    return [pilot for pilot in found if len(pilot.choices) == 1 or any(pilot is item for item in several[:most])]


def draw_curve(pilot: Pilot, sight: Sight, size: float) -> list[Option]:
    """The options of a style for a layer, by a few drafts, between which the logarithm of the error is interpolated.

    What joint steps are worth to the pilot, they are taken to be worth to all, unless they make it exact.

    Args:
        size: of the outputs, squared.
    """
    choices = pilot.choices
    others = spread(len(choices) - 1, DRAFTS[sight.takes_long] - 1)
    chosen = sorted({0, pilot.index, *(1 + index for index in others)})  # below the least no line says what there is
    start, error = (max(value, NOTHING * size, TINY) for value in (pilot.start, pilot.error))
    gain = error / start if start <= CLIFF * error else 1.0
    made = {
        index: (pilot.start, pilot.draft) if index == pilot.index else sight.draft(choices[index][1])
        for index in chosen
    }
    shares, errors = [choices[index][0] for index in chosen], [made[index][0] for index in chosen]

    def option(index: int, share: float, pass_: RankedPass) -> Option:
        error = pilot.error if index == pilot.index else gain * between(share, shares, errors, size)
        return Option(pass_, share, error, made[index][1].layers if index in made else None)

    return [option(index, share, pass_) for index, (share, pass_) in enumerate(choices)]


def distinct(style: Style, site: Site) -> list[tuple[float, RankedPass]]:
    """A style with each share at which it gives something else, and what that costs at most, the cheapest first."""
    found: dict[tuple[tuple[float, ...], ...], RankedPass] = {}
    for share in SHARES:
        pass_ = style(share)
        ways = tuple(pass_.alternatives(site))
        if ways and max(way[0] for way in ways) <= share * (1 + 1e-9):
            found.setdefault(ways, pass_)
    return sorted(((max(way[0] for way in ways), pass_) for ways, pass_ in found.items()), key=lambda item: item[0])


def takes_long(weight: Tensor) -> bool:
    """Whether a draft near a weight [O, C/g, *k] takes long."""
    return weight.numel() * weight[0].numel() > LONG


def spread(count: int, most: int) -> list[int]:
    """At most so many of the first `count` numbers, in the middles of even stretches."""
    if count <= most:
        return list(range(count))
    return [(2 * index + 1) * count // (2 * most) for index in range(most)]


def between(share: float, shares: Sequence[float], errors: Sequence[float], size: float) -> float:
    """The error at a share between others, or beyond them, along straight lines of its logarithm.

    Where it falls off a cliff between two shares, it is the larger as far as the second; and all that there is, `size`,
    below a share at which it is nothing. It is never more than that, or than the largest of the others.
    """
    at = bisect_left(shares, share)
    if at < len(shares) and shares[at] == share:
        return errors[at]
    if at == 0 and errors[0] <= NOTHING * size:
        return size
    if len(shares) == 1:
        return errors[0]
    high = min(max(at, 1), len(shares) - 1)
    low = high - 1
    first, second = (max(errors[index], NOTHING * size, TINY) for index in (low, high))
    if at > 0 and max(first, second) > CLIFF * min(first, second):
        return second if at == len(shares) else max(first, second)
    part = (share - shares[low]) / (shares[high] - shares[low])
    line = math.log(first) + part * (math.log(second) - math.log(first))
    return math.exp(min(line, math.log(max(size, *errors, TINY))))


def distance_between(ours: Sequence[Sequence[Tensor]], theirs: Sequence[Sequence[Tensor]]) -> float:
    """The sum over outputs of the squared relative error; outputs that hold no fractions do not count."""
    return sum(item.value**2 for item in distances(ours, theirs) if not item.counts)


def importance(change: float, error: float, size: float) -> float:
    """The weight of a layer by what an error of it changes in the outputs: never less than a millionth of what it
    would be if errors passed through as they are, which it is where the change is not known.
    """
    if size <= 0:
        return 0.0
    found = change / error if error != 0 else 0.0
    return max(found, 1e-6 / size) if math.isfinite(found) else 1.0 / size
