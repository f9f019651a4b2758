"""Splits the layers of a network by whichever pass comes nearest, each as far as the whole network bears it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, PrivateAttr
from torch import nn

from fxcompile.contracts import Approximate
from fxcompile.cost import nodes_cost, program_cost, samples
from fxcompile.labels import node_name
from fxcompile.planning import Planning
from fxcompile.program import Program
from fxcompile.rewriting import Pass, Replacement, Site, Skip

from ._allotment import Choice, allot
from ._drafts import SHARES, Option, Prospect, Style, prospects, takes_long
from ._ranks import RankedPass
from .bottleneck import Bottleneck
from .group_shuffle import GroupShuffle
from .split_kernels import SplitKernels
from .stack_kernels import StackKernels

Variant = Literal["bottleneck", "group-shuffle", "split-kernels", "stack-kernels"]


class Way(NamedTuple):
    """A pass with options that say which way it is, and those that a share of the cost and the rounding set."""

    kind: type[RankedPass]
    options: Mapping[str, Any] = {}
    free: tuple[str, ...] = ("rank", "round_to")


WAYS: dict[str, list[Way]] = {
    "bottleneck": [Way(Bottleneck, {"style": style}) for style in ("tucker", "inception", "cp")],
    "group-shuffle": [
        *[Way(GroupShuffle, {"style": style}) for style in ("pointwise", "depthwise", "shuffle-unit")],
        Way(GroupShuffle, {"style": "permuted"}, ("rank",)),
    ],
    "split-kernels": [
        Way(SplitKernels, {"arrangement": "sequential"}),
        *[Way(SplitKernels, {"arrangement": "parallel", "merge": merge}, ()) for merge in ("sum", "concat")],
    ],
    "stack-kernels": [Way(StackKernels)],
}
"""The ways of each pass that keep the function as near as they can: all but those with activation=relu."""

CONTENDERS, NEAR = (3, 2), 1.5
"""So many ways at most are fitted to a layer, and to one of which each takes long, and held against each other on
held-out data: those whose squared error was drafted to be within this factor of the least.
"""

TOLD = 8
"""Layers whose times are told."""

FASTER = 0.02
"""The share of a layer's time below which a gain may be chance."""


class Factorize(Pass):
    """each convolution and linear layer  =>  what `bottleneck`, `group-shuffle`, `split-kernels` or `stack-kernels`
                                         makes of it, or as it was

    For a whole network to cost `saving` less. Each style of each pass, but those that want training, drafts what it
    would put in each layer's place at one cost: a closed form and some joint steps, in the norm of the layer's inputs.
    What another leaves far behind at no more cost is dropped there; the nearest draft at rising cost. What such an
    error does to the outputs is measured by running the rest of the network with it. Then costs are shared out: from
    the layers as they are, always the step that costs the outputs the least for what it saves, taken that errors add up
    as independent ones do, also those of a layer that is called again (Shoham and Gersho 1988). At its cost, a layer
    gets the passes that came nearest in the drafts; they are fitted in full, in the order of the data, and the nearest
    on held-out data is kept.

    With `objective=latency` the drafts are run in ONNX Runtime, on the shapes of the example inputs, beside the layer
    in whose place they would stand; those that are not faster are left out, whatever MACs they save. `saving` is then a
    share of the time that all these layers take. Times differ from run to run, and so may what is chosen.

    `reduce-grid` and `activation=relu` are no variants: they change the function, and no error says by how much once it
    is trained. Side by side, `split-kernels` cannot be timed layer by layer, and is left out with `objective=latency`.
    Orders of channels that `permuted` and `merge=concat` leave are for `absorb-shuffles` to take out.

    Without calibration data all is taken from the weights, and the layers' importance from random inputs.
    """

    name: ClassVar = "factorize"
    contract: ClassVar = Approximate(exact_when="saving=0, which leaves all layers as they are")

    saving: float = Field(
        0.5, ge=0, lt=1, description="share of the network's MACs to save, or of the time that its layers take"
    )
    objective: Literal["macs", "latency"] = Field(
        "macs", description="what is saved: MACs, or time in ONNX Runtime, where what is drafted is measured"
    )
    variants: tuple[Variant, ...] = Field(
        ("bottleneck", "group-shuffle", "split-kernels", "stack-kernels"),
        min_length=1,
        description="the passes to choose from, by name",
    )
    round_to: int | None = Field(
        None, ge=1, description="round channels between layers down to a multiple of this; by default to 8"
    )
    min_saving: float | None = Field(
        0.0, le=1, description="smallest share of its MACs that a site must save; with 0 some"
    )

    _plan: Mapping[str, Sequence[RankedPass] | str] | None = PrivateAttr(None)
    """For each site the passes to try, or the reason why it stays."""

    @property
    def measures_time(self) -> bool:
        """Whether it goes by time."""
        return self.objective == "latency"

    def styles(self) -> Iterator[Style]:
        """Each way of each variant, for a share of a layer's MACs."""
        for variant in dict.fromkeys(self.variants):
            for way in WAYS[variant]:
                yield partial(style, way, self.round_to)

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """What some variant serves; once it is planned, what is to be rewritten."""
        for found, _ in self.served(program):
            plan = "" if self._plan is None else self._plan.get(found.name, "it was no site when costs were allotted")
            yield Skip(found.name, plan) if isinstance(found, Site) and isinstance(plan, str) and plan else found

    def served(self, program: Program) -> list[tuple[Site | Skip, list[Style]]]:
        """The sites in the order of the graph, each with the styles that serve it."""
        found: dict[str, Site] = {}
        styles: dict[str, list[Style]] = {}
        reasons: dict[str, list[tuple[RankedPass, str]]] = {}
        for style in self.styles():
            pass_ = style(SHARES[-1])
            for item in pass_.sites(program):
                if isinstance(item, Skip):
                    reasons.setdefault(item.name, []).append((pass_, item.reason))
                elif serves(pass_, item):
                    found[item.name] = item
                    styles.setdefault(item.name, []).append(style)
        items: list[tuple[Site | Skip, list[Style]]] = []
        for name in dict.fromkeys(map(node_name, program.graph.nodes)):
            if name in found:
                items.append((found[name], styles[name]))
            elif name in reasons:
                items.append((Skip(name, worded(reasons[name])), []))
        return items

    def plan(self, planning: Planning) -> Pass:
        """The same pass with each site's passes chosen."""
        if self._plan is not None:
            return self
        sites = [(item, styles) for item, styles in self.served(planning.program) if isinstance(item, Site)]
        sites = [(site, styles) for site, styles in sites if self.selects(site.name)]
        found = prospects(planning, f"{self.name}: drafts", sites) if self.saving else []
        planned = self.model_copy()
        planned._plan = dict.fromkeys((site.name for site, _ in sites), "saving=0 leaves all layers as they are")
        planned._plan |= self.allotted(planning, found)
        return planned

    def allotted(self, planning: Planning, found: Sequence[Prospect]) -> dict[str, Sequence[RankedPass] | str]:
        """The passes for each site, or why it stays, so that the sum of the costs is what is wanted."""
        bills = [self.bill(planning, index, prospect, len(found)) for index, prospect in enumerate(found)]
        chosen_from = [
            [Choice(bill.whole, 0.0), *(Choice(item.cost, prospect.weight * item.option.error) for item in bill.priced)]
            for prospect, bill in zip(found, bills, strict=True)
        ]
        whole = sum(bill.whole for bill in bills)
        total = program_cost(planning.program).macs if self.objective == "macs" else whole
        budget = (1 - self.saving) * total - (total - whole)
        chosen = allot(chosen_from, budget)
        spent = sum(own[index].cost for own, index in zip(chosen_from, chosen, strict=True))
        if spent > budget * (1 + 1e-9):
            what = "network's MACs" if self.objective == "macs" else "layers' time"
            planning.notes.append(
                f"{self.name}: saving={self.saving:g} is out of reach, its sites save "
                f"{(whole - spent) / total if total else 0.0:.0%} of the {what} at most; each is what costs the least"
            )
        if self.objective == "latency" and whole:
            planning.notes.append(self.times_told(bills, chosen_from, chosen))
        plan: dict[str, Sequence[RankedPass] | str] = {}
        for prospect, bill, index in zip(found, bills, chosen, strict=True):
            if index:
                plan[prospect.site.name] = bill.contenders(bill.priced[index - 1].cost)
            else:
                plan[prospect.site.name] = bill.reason
        return plan

    def times_told(self, bills: Sequence[Bill], chosen_from: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> str:
        """What the layers take, and what is planned for them, in words; the slowest by name."""
        now = [own[index].cost for own, index in zip(chosen_from, chosen, strict=True)]
        whole = sum(bill.whole for bill in bills)
        slowest = sorted(zip(bills, now, strict=True), key=lambda pair: -pair[0].whole)[:TOLD]
        named = ", ".join(f"{bill.site.name} {1e3 * bill.whole:.4g} > {1e3 * after:.4g}" for bill, after in slowest)
        return (
            f"{self.name}: in ONNX Runtime its {len(bills)} layers take {1e3 * whole:.4g} ms by themselves, and "
            f"{1e3 * sum(now):.4g} ms as planned ({1 - sum(now) / whole:.0%} less); the slowest, in ms: {named}"
        )

    def bill(self, planning: Planning, index: int, prospect: Prospect, count: int) -> Bill:
        """What the options of a site that keep to the limits cost."""
        site, program = prospect.site, planning.program
        calls = program.calls()[id(site.layer)]
        options = [
            (curve, option)
            for curve, own in enumerate(prospect.curves)
            for option in own
            if self.admits(prospect, option)
        ]
        reason = "other layers save as much at less error" if options else "no variant of it keeps to the limits"
        reason = prospect.reason or reason
        if self.objective == "macs":
            cost: float = nodes_cost(program.module, calls, samples(program)).macs
            return Bill(site, cost, [Priced(curve, item, cost * item.share) for curve, item in options], reason)
        from fxcompile.latency import times_of

        planning.progress(f"{self.name}: latency", index, count)
        drafted = [(curve, item, item.layers) for curve, item in options if item.layers is not None]
        times = times_of([[site.layer], *(layers for _, _, layers in drafted)], site.input_shape)
        whole, timed = times[0] or 0.0, sum(time is not None for time in times[1:])
        priced = [
            Priced(curve, replace(item, pass_=item.pass_.pinned(site, layers)), len(calls) * time)
            for (curve, item, layers), time in zip(drafted, times[1:], strict=True)
            if time is not None and time < (1 - FASTER) * whole
        ]
        if options and not priced:
            reason = f"none of the {timed} drafts that were timed in ONNX Runtime is faster than it there"
        if options and (times[0] is None or not timed):
            who = "it could not" if times[0] is None else "none of its drafts could"
            reason = f"{who} be timed in ONNX Runtime"
        return Bill(site, len(calls) * whole, priced, reason)

    def admits(self, prospect: Prospect, option: Option) -> bool:
        """Whether an option keeps to the limits for a site."""
        if self.min_saving is not None and 1 - option.share < self.min_saving:
            return False
        return self.max_error is None or option.error <= self.max_error**2 * prospect.size

    def rewrite(self, site: Site) -> Replacement:
        """What the pass makes of it that came nearest in the drafts.

        A run compares all candidates, on held-out data or, without calibration, on one random batch.
        """
        return self.chosen(site)[0].rewrite(site)

    def candidates(self, site: Site) -> Iterator[Replacement]:
        """What each pass makes of it that is planned for the site."""
        for pass_ in self.chosen(site):
            if takes_long(site.layer.weight):
                yield pass_.rewrite(site)
            else:
                yield from pass_.brief(site)

    def chosen(self, site: Site) -> Sequence[RankedPass]:
        """The passes that are planned for a site."""
        plan = "" if self._plan is None else self._plan.get(site.name, "")
        assert not isinstance(plan, str), "costs are allotted first, and to this site"
        return plan


def style(way: Way, round_to: int | None, share: float) -> RankedPass:
    """A pass with a share of a layer's MACs to spend."""
    values: dict[str, Any] = {"rank": share, "round_to": round_to}
    return way.kind(**way.options, **{option: values[option] for option in way.free}, min_saving=None)


def serves(pass_: RankedPass, site: Site) -> bool:
    """Whether a way is worth trying on a site: over single pixels all styles of a bottleneck are the same pair."""
    single = isinstance(site.layer, nn.Linear) or max(site.layer.kernel_size) == 1
    return not (single and isinstance(pass_, Bottleneck) and pass_.style != "tucker")


class Priced(NamedTuple):
    """An option of a site, the number of the curve that it is on, and what it costs."""

    curve: int
    option: Option
    cost: float


@dataclass(frozen=True)
class Bill:
    """What a site costs, in MACs or seconds.

    Attributes:
        whole: as it is.
        priced: the options that may be taken.
        reason: why it stays, if it does.
    """

    site: Site
    whole: float
    priced: list[Priced]
    reason: str

    def contenders(self, cost: float) -> list[RankedPass]:
        """The passes that come near enough at no more than this cost, the nearest first, one of each curve."""
        best: dict[int, Option] = {}
        for item in sorted(self.priced, key=lambda item: item.option.error):
            if item.cost <= cost * (1 + 1e-9):
                best.setdefault(item.curve, item.option)
        nearest = list(best.values())
        most = CONTENDERS[takes_long(self.site.layer.weight)]
        return [option.pass_ for option in nearest if option.error <= NEAR * nearest[0].error][:most]


def worded(reasons: Sequence[tuple[RankedPass, str]]) -> str:
    """Why no pass serves a layer: one reason, or each with those that give it, which say their style if others of the
    same pass give another.
    """
    found = dict.fromkeys(reason for _, reason in reasons)
    if len(found) == 1:
        return next(iter(found))
    parts = []
    for reason in found:
        who = []
        for pass_, _ in (item for item in reasons if item[1] == reason):
            alike = all(other == reason for item, other in reasons if item.name == pass_.name)
            who.append(pass_.name if alike else label(pass_))
        parts.append(f"{', '.join(dict.fromkeys(who))}: {reason}")
    return "; ".join(parts)


def label(pass_: RankedPass) -> str:
    """A pass with the options that say which way it is, as in a pipeline's text."""
    (way,) = (
        way for way in WAYS[pass_.name] if all(getattr(pass_, option) == value for option, value in way.options.items())
    )
    return f"{pass_.name}({', '.join(f'{option}={value}' for option, value in way.options.items())})"
