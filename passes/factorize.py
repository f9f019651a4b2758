"""Splits the layers of a network by whichever pass comes nearest, each as far as the whole network bears it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from fxcompile.contracts import Approximate
from fxcompile.cost import nodes_cost, program_cost, samples
from fxcompile.labels import node_name
from fxcompile.planning import Planning
from fxcompile.program import Program
from fxcompile.rewriting import Pass, Replacement, Site, Skip

from ._allotment import Choice, allot
from ._drafts import SHARES, Option, Prospect, Style, prospects
from ._ranks import RankedPass
from .bottleneck import Bottleneck
from .group_shuffle import GroupShuffle
from .split_kernels import SplitKernels
from .stack_kernels import StackKernels

Variant = Literal["bottleneck", "group-shuffle", "split-kernels", "stack-kernels"]

STYLES: dict[str, list[tuple[type[RankedPass], dict[str, Any]]]] = {
    "bottleneck": [(Bottleneck, {}), (Bottleneck, {"style": "inception"})],
    "group-shuffle": [
        (GroupShuffle, {"style": style}) for style in ("pointwise", "depthwise", "shuffle-unit")
    ],
    "split-kernels": [(SplitKernels, {})],
    "stack-kernels": [(StackKernels, {})],
}  # fmt: skip
"""The ways of each pass that change the function the least at their cost."""

CONTENDERS, NEAR = 3, 1.5
"""So many ways at most are fitted to a layer, and held against each other on held-out data: those whose squared error
was drafted to be within this factor of the least."""


class Factorize(Pass):
    """each convolution and linear layer  =>  what `bottleneck`, `group-shuffle`, `split-kernels` or `stack-kernels`
                                         makes of it, or as it was

    For a whole network to cost `saving` less. Each pass drafts what it would put in each layer's place at rising cost:
    a closed form and, for one of the costs, some joint steps, in the norm of the layer's inputs. What such an error
    does to the network's outputs is measured by running the rest of the network with it. Then costs are shared out:
    from the layers as they are, always the step that costs the outputs the least for what it saves, taken that errors
    add up as independent ones do (Shoham and Gersho 1988). At its cost, a layer gets the passes that came nearest in
    the drafts; they are fitted in full, in the order of the data, and the nearest on held-out data is kept.

    Without calibration data all is taken from the weights, and the layers' importance from random inputs.
    """

    name: ClassVar = "factorize"
    contract: ClassVar = Approximate(exact_when="saving=0, which leaves all layers as they are")

    saving: float = Field(0.5, ge=0, lt=1, description="share of the network's MACs to save")
    variants: tuple[Variant, ...] = Field(
        ("bottleneck", "group-shuffle", "split-kernels", "stack-kernels"),
        min_length=1,
        description="the passes to choose from, by name",
    )
    round_to: int | None = Field(
        None, ge=1, description="round channels between layers down to a multiple of this; by default to 8"
    )
    min_saving: float | None = Field(0.0, le=1, description="smallest share of its MACs that a site must save")

    _plan: Mapping[str, Sequence[RankedPass] | str] | None = PrivateAttr(None)
    """For each site the passes to try, or the reason why it stays."""

    def styles(self) -> Iterator[Style]:
        """Each way of each variant, for a share of a layer's MACs."""
        for variant in dict.fromkeys(self.variants):
            for kind, options in STYLES[variant]:
                yield partial(style, kind, {**options, "round_to": self.round_to, "min_saving": None})

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """What some variant serves; once it is planned, what is to be rewritten."""
        for found, _ in self.served(program):
            plan = "" if self._plan is None else self._plan.get(found.name, "it was no site when costs were allotted")
            yield Skip(found.name, plan) if isinstance(found, Site) and isinstance(plan, str) and plan else found

    def served(self, program: Program) -> list[tuple[Site | Skip, list[Style]]]:
        """The sites in the order of the graph, each with the styles that serve it."""
        found: dict[str, Site] = {}
        styles: dict[str, list[Style]] = {}
        reasons: dict[str, dict[str, str]] = {}
        for style in self.styles():
            pass_ = style(SHARES[-1])
            for item in pass_.sites(program):
                if isinstance(item, Skip):
                    reasons.setdefault(item.name, {}).setdefault(item.reason, pass_.name)
                else:
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
        program = planning.program
        total, calls = program_cost(program).macs, program.calls()
        costs = [
            nodes_cost(program.module, calls[id(prospect.site.layer)], samples(program)).macs for prospect in found
        ]
        options = [list(filter(partial(self.admits, prospect), prospect.options)) for prospect in found]
        choices = [
            [Choice(cost, 0.0), *(Choice(cost * item.share, prospect.weight * item.error) for item in own)]
            for prospect, cost, own in zip(found, costs, options, strict=True)
        ]
        budget = (1 - self.saving) * total - (total - sum(costs))
        chosen = allot(choices, budget)
        spent = sum(own[index].cost for own, index in zip(choices, chosen, strict=True))
        if spent > budget * (1 + 1e-9):
            most = (sum(costs) - spent) / total if total else 0.0
            planning.notes.append(
                f"{self.name}: saving={self.saving:g} is out of reach, its sites save {most:.0%} of the network's MACs "
                "at most"
            )
        plan: dict[str, Sequence[RankedPass] | str] = {}
        for prospect, own, index in zip(found, options, chosen, strict=True):
            name = prospect.site.name
            if index:
                plan[name] = contenders(prospect.curves, own, own[index - 1].share)
            elif own:
                plan[name] = "other layers save as much at less error"
            else:
                plan[name] = prospect.reason or "no variant of it keeps to the limits"
        return plan

    def admits(self, prospect: Prospect, option: Option) -> bool:
        """Whether an option keeps to the limits for a site."""
        if self.min_saving is not None and 1 - option.share < self.min_saving:
            return False
        return self.max_error is None or option.error <= self.max_error**2 * prospect.size

    def rewrite(self, site: Site) -> Replacement:
        """The best that is known without held-out data: what the pass makes of it that came nearest in the drafts."""
        return self.chosen(site)[0].rewrite(site)

    def candidates(self, site: Site) -> Iterator[Replacement]:
        """What each pass makes of it that is planned for the site."""
        for pass_ in self.chosen(site):
            yield from pass_.candidates(site)

    def chosen(self, site: Site) -> Sequence[RankedPass]:
        """The passes that are planned for a site."""
        plan = "" if self._plan is None else self._plan.get(site.name, "")
        assert not isinstance(plan, str), "costs are allotted first, and to this site"
        return plan


def style(kind: type[RankedPass], options: Mapping[str, Any], share: float) -> RankedPass:
    """A pass with a share of a layer's MACs to spend."""
    return kind(rank=share, **options)


def contenders(curves: Sequence[Sequence[Option]], own: Sequence[Option], share: float) -> list[RankedPass]:
    """The passes that come near enough with so much of a layer's cost, the nearest first."""
    best = []
    for curve in curves:
        fit = [option for option in curve if option in own and option.share <= share * (1 + 1e-9)]
        if fit:
            best.append(min(fit, key=lambda option: option.error))
    best.sort(key=lambda option: option.error)
    return [option.pass_ for option in best if option.error <= NEAR * best[0].error][:CONTENDERS]


def worded(reasons: Mapping[str, str]) -> str:
    """Why no pass serves a layer: one reason, or that of each pass."""
    if len(reasons) == 1:
        return next(iter(reasons))
    return "; ".join(f"{name}: {reason}" for reason, name in reasons.items())
