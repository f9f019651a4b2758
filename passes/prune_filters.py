"""Takes whole filters out of a network, with all that depends on them, and lets the layers behind make up for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, Self

import networkx as nx
import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, fx, nn

from fxcompile.channel_graph import ChannelGraph, Group, Member
from fxcompile.contracts import Approximate
from fxcompile.errors import BudgetError
from fxcompile.layer_stats import LayerStats, grouped
from fxcompile.layers import CONVOLUTIONS
from fxcompile.planning import Planning
from fxcompile.program import Program
from fxcompile.rewriting import ChannelPass, GroupSite, Pass, Removal, Site, Skip

from . import _importance as importance
from ._budget import Budget, Objective
from ._chain_fitting import MOST_FEATURES, inputs_seen, mean_gram
from ._effect import Effect
from ._elimination import Taker, eliminate
from ._ranks import ROUND_TO

Importance = Literal[
    "least-squares", "l1", "l2", "geometric-median", "batch-norm", "activation", "taylor", "lamp", "random"
]

WIDE = 64
"""Filters from which on a group is rounded by default."""


class Curve(NamedTuple):
    """In which order the units of a group go, and at what price of error for what each saves, which does not fall."""

    order: Tensor
    rates: Tensor


class PruneFilters(ChannelPass):
    """conv[O, C, ...] -> norm, activation -> conv[P, O, ...]  =>  conv[o, C, ...] -> the same -> conv[P, o, ...]

    Filters go wherever they are in the network, with all that must go with them: what is added to them in a residual
    network, the same channels of depthwise and grouped convolutions, of norms and of what takes them in a
    concatenation; `fxcompile.channel_graph` says what. What layers behind make of the channels left is solved for by
    least squares on calibration data, in the order of the data, towards the original's features (He et al. 2017): the
    sum that a layer is added to, and what a ReLU leaves of it. That is worth far more than the choice of the filters.

    With `importance=least-squares`, always those filters go next that the layers behind can best make up for
    (backward elimination); it needs calibration data. Without any, `l2` takes its place, and nothing is made up for.
    """

    name: ClassVar = "prune-filters"
    contract: ClassVar = Approximate(exact_when="ratio=0, which leaves all filters")

    ratio: float = Field(0.5, ge=0, lt=1, description="share of the filters to remove")
    scope: Literal["layer", "network"] = Field(
        "layer", description="whether that is a share of each layer's filters or of the whole network's"
    )
    saving: float | None = Field(
        None, ge=0, lt=1, description="instead of ratio: share of the network's cost to save, as `objective` counts it"
    )
    objective: Objective = Field(
        "macs", description="what `saving` counts: MACs, parameters, bytes, or the layers' time in ONNX Runtime"
    )
    importance: Importance | None = Field(
        None,
        description="what tells which filters go first; by default least-squares with calibration data, l2 without",
    )
    round_to: int | None = Field(
        None, ge=1, description=f"leave a multiple of this many; by default of 8 where there are {WIDE} and more"
    )
    repair: bool = Field(True, description="fit the layers behind to make up for what is gone")
    iterations: int = Field(1, ge=1, description="remove and repair in so many steps")

    _plan: Mapping[str, tuple[int, ...]] | None = PrivateAttr(None)
    """By group, the units that go."""

    _sizes: dict[str, int] | None = PrivateAttr(None)
    """By group, its channels before the first of several rounds, of which `ratio` is a share."""

    @model_validator(mode="after")
    def _ratio_or_saving(self) -> Self:
        given = self.model_fields_set
        if self.saving is not None and {"ratio", "scope"} & given:
            other = "ratio" if "ratio" in given else "scope, which says what ratio is a share of,"
            raise ValueError(f"give {other} or saving, not both")
        if self.saving is None and "objective" in given:
            raise ValueError("objective says what saving counts: give saving, too")
        return self

    @property
    def amount(self) -> float:
        """The share that is to go, of filters or of cost."""
        return self.ratio if self.saving is None else self.saving

    @property
    def by_layer(self) -> bool:
        """Whether it is settled how many filters each layer loses."""
        return self.saving is None and self.scope == "layer"

    @property
    def repairs(self) -> bool:
        """Whether the layers behind are fitted."""
        return self.repair

    @property
    def measures_time(self) -> bool:
        """Whether it goes by time."""
        return self.saving is not None and self.objective == "latency"

    def rounds(self) -> list[ChannelPass]:
        """The pass at rising shares, each a share of what the one before has left."""
        whole = self.amount
        if self.iterations == 1:
            return [self]
        left = [1 - whole * step / self.iterations for step in range(self.iterations + 1)]
        sizes: dict[str, int] = {}
        rounds: list[ChannelPass] = []
        for before, now in pairwise(left):
            share = {"ratio": 1 - now} if self.saving is None else {"saving": 1 - now / before}
            step = self.model_copy(update={**share, "iterations": 1})
            step._sizes = sizes
            rounds.append(step)
        return rounds

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Each group of two filters and more; with reasons, those that cannot go."""
        for item in super().sites(program):
            if isinstance(item, GroupSite):
                if len(item.group) < 2:
                    together = "all its filters go together" if item.group.channels > 1 else "it has one filter"
                    item = Skip(item.name, together)
                elif self._plan is not None and not self._plan.get(item.name):
                    item = Skip(item.name, "none of its filters is to go")
            yield item

    def plan(self, planning: Planning) -> Pass:
        """The same pass with the filters chosen."""
        if self._plan is not None or self.iterations > 1:
            return self
        program = planning.program
        found = ChannelGraph.of(program).groups
        groups = [group for group in found if not group.reason and len(group) > 1 and self.selects_group(group)]
        planned = self.model_copy()
        planned._plan = self.chosen(planning, groups) if groups and self.amount else {}
        return planned

    def chosen(self, planning: Planning, groups: Sequence[Group]) -> dict[str, tuple[int, ...]]:
        """By group, the units that go."""
        budget = Budget.of(planning.program, groups, self.objective) if self.saving is not None else None
        prices = dict.fromkeys((group.name for group in groups), 1.0) if budget is None else budget.prices(groups)
        sizes = {} if self._sizes is None else self._sizes
        whole = {group.name: sizes.setdefault(group.name, len(group) * group.channels) for group in groups}
        wanted = {  # of this round: of what there was before the first, without what is gone since
            group.name: (self.ratio - 1) * whole[group.name] / group.channels + len(group) for group in groups
        }
        fixed = {group.name: self.rounded(group, wanted[group.name]) for group in groups}
        most = {group.name: fixed[group.name] if self.by_layer else self.most(group) for group in groups}
        curves = self.curves(planning, groups, most, prices)
        counts = fixed
        if budget is not None:
            counts = self.within(budget, groups, curves)
            if self.objective == "latency":
                before, after = 1e3 * budget.left({}), 1e3 * budget.left(counts)
                planning.notes.append(
                    f"{self.name}: in ONNX Runtime its layers take {before:.4g} ms by themselves, and {after:.4g} ms "
                    "without the filters that go, if their time falls with their channels"
                )
        elif not self.by_layer:
            count = sum(wanted.values()) - 0.5
            counts = self.cheapest(groups, curves, lambda gone: sum(gone.values()) >= count)
        return {name: tuple(sorted(curves[name].order[:count].tolist())) for name, count in counts.items() if count}

    def removal(self, site: GroupSite) -> Removal:
        """The filters that go."""
        units = () if self._plan is None else self._plan.get(site.name, ())
        return Removal(units)

    # which filters go first

    def curves(
        self, planning: Planning, groups: Sequence[Group], most: Mapping[str, int], prices: Mapping[str, float]
    ) -> dict[str, Curve]:
        """For each group the order in which its units go, as many as may.

        Args:
            most: by group, how many may go.
            prices: by group, what a unit saves.
        """
        kind = self.importance or ("l2" if planning.data is None else "least-squares")
        if planning.data is None and kind in ("least-squares", "activation", "taylor"):
            planning.notes.append(f"{self.name}: importance={kind} went by random inputs: there is no calibration data")
        if kind == "least-squares":
            return self.eliminated(planning, groups, most, prices)
        scores = self.scores(kind, planning, groups)
        return {name: curve_of(own, prices[name]) for name, own in scores.items()}

    def scores(self, kind: str, planning: Planning, groups: Sequence[Group]) -> dict[str, Tensor]:
        """How much each unit matters, the more the larger."""
        generator = torch.Generator().manual_seed(planning.seed)
        by_group: dict[str, Callable[[Group], Tensor | None]] = {
            "l1": lambda group: importance.norm(group, 1),
            "l2": lambda group: importance.norm(group, 2),
            "geometric-median": importance.geometric_median,
            "batch-norm": lambda group: importance.norm_scale(planning.program, group),
            "lamp": importance.layer_adaptive,
            "random": lambda group: torch.rand(len(group), generator=generator, dtype=torch.float64),
        }
        if kind in by_group:
            found = {group.name: by_group[kind](group) for group in groups}
        else:
            measure = importance.activity if kind == "activation" else importance.taylor
            found = dict(measure(planning, groups))
        missing = [group for group in groups if found.get(group.name) is None]
        if missing:
            planning.notes.append(
                f"{self.name}: importance={kind} says nothing of {len(missing)} of {len(groups)} groups of filters, "
                f"'{missing[0].name}' first; their l2 norm does instead"
            )
        own = {name: scores for name, scores in found.items() if scores is not None}
        return own | {group.name: importance.norm(group, 2) for group in missing}

    def eliminated(
        self, planning: Planning, groups: Sequence[Group], most: Mapping[str, int], prices: Mapping[str, float]
    ) -> dict[str, Curve]:
        """By backward elimination in the layers that take a group's channels; by their l2 norm where there is none.

        Groups that a layer takes side by side are looked at together: one may stand in for the other. Where several
        layers take the same channels, an error of each counts as much as it does to the outputs of the network.
        """
        program, walk = planning.program, planning.walk()
        number_of = {id(group): number for number, group in enumerate(groups)}
        takes: dict[fx.Node, dict[int, Member]] = {}
        for item in importance.taken(program, groups):
            takes.setdefault(item.node, {})[number_of[id(item.group)]] = item.member
        together: nx.Graph[int] = nx.Graph()
        together.add_nodes_from(range(len(groups)))
        for numbers in takes.values():
            nx.add_path(together, numbers)
        pool_of = {number: index for index, pool in enumerate(nx.connected_components(together)) for number in pool}
        effect = Effect(planning)
        takers_of: dict[int, list[fx.Node]] = {}
        for node, numbers in takes.items():
            takers_of.setdefault(pool_of[min(numbers)], []).append(node)
        waiting: dict[int, list[Taker]] = {}
        curves: dict[str, Curve] = {}
        for index, (node, members) in enumerate(takes.items()):
            planning.progress(f"{self.name}: filters", index, len(takes))
            layer: Any = program.layer(node)
            pool = pool_of[min(members)]
            gram = self.seen(layer, walk.values_of(node.all_input_nodes[0]))
            if gram is not None:
                weight = grouped(layer.weight.detach().double(), LayerStats.of(layer))
                places = {number: features_of(member, layer) for number, member in members.items()}
                matters = effect.matters(node) if len(takers_of[pool]) > 1 or not self.by_layer else 1.0
                waiting.setdefault(pool, []).append(Taker.of(weight, gram, places, matters))
            if node is takers_of[pool][-1] and pool in waiting:
                own = sorted(number for number, its in pool_of.items() if its == pool)
                curves |= eliminated(waiting.pop(pool), {number: groups[number] for number in own}, most, prices)
        rest = [group for group in groups if group.name not in curves]
        return curves | {group.name: curve_of(importance.norm(group, 2), prices[group.name]) for group in rest}

    def seen(self, layer: Any, xs: Sequence[Tensor]) -> Tensor | None:
        """S [g, F, F] of what a layer takes, about the mean if it has a bias; None where that would be too large."""
        if not isinstance(layer, (*CONVOLUTIONS, nn.Linear)) or layer.weight[0].numel() > MOST_FEATURES:
            return None
        return mean_gram(inputs_seen(layer, xs), layer.bias is not None)

    # how many go

    def within(self, budget: Budget, groups: Sequence[Group], curves: Mapping[str, Curve]) -> dict[str, int]:
        """How many units of each group go, so that the share that is wanted is saved.

        Raises:
            BudgetError: that much cannot be saved.
        """
        assert self.saving is not None
        whole = budget.left({})
        limit = (1 - self.saving) * whole
        counts = self.cheapest(groups, curves, lambda gone: budget.left(gone) <= limit)
        if budget.left(counts) > limit * (1 + 1e-9):
            raise BudgetError(
                f"saving={self.saving:g} is out of reach: without all filters that can go, at least one of each layer "
                f"aside, {1 - budget.left(counts) / whole:.1%} of the {what(self.objective)} are saved",
                place=self.name,
                mend="choose less, or let it have more layers",
            )
        return counts

    def cheapest(
        self, groups: Sequence[Group], curves: Mapping[str, Curve], enough: Callable[[Mapping[str, int]], bool]
    ) -> dict[str, int]:
        """The fewest units that are enough: all groups lose what costs less than one price of error for what it saves,
        the condition of an optimum under a budget; the price is found by bisection.
        """

        def at(price: float) -> dict[str, int]:
            return {
                group.name: self.rounded(group, float((curves[group.name].rates <= price).sum())) for group in groups
            }

        found = sorted({rate for group in groups for rate in curves[group.name].rates.tolist()})
        low, high = -1, len(found) - 1
        if high < 0 or not enough(at(found[high])):
            return {group.name: self.most(group) for group in groups}
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(at(found[middle])) else (middle, high)
        return at(found[high])

    def multiple(self, group: Group) -> int:
        """What the units left are to be a multiple of."""
        channels = self.round_to or (ROUND_TO if len(group) * group.channels >= WIDE else 1)
        return channels // math.gcd(channels, group.channels)

    def most(self, group: Group) -> int:
        """How many units may go: one stays."""
        return self.rounded(group, len(group) - 1)

    def rounded(self, group: Group, gone: float) -> int:
        """So many units that go that what is left is the nearest multiple: one at least, and no more than there are."""
        multiple = self.multiple(group)
        left = max(round((len(group) - gone) / multiple), 1) * multiple
        return max(len(group) - left, 0)


def eliminated(
    takers: Sequence[Taker], groups: Mapping[int, Group], most: Mapping[str, int], prices: Mapping[str, float]
) -> dict[str, Curve]:
    """The order in which units of groups go that the same layers take.

    Args:
        takers: the layers, which know groups by their numbers.
    """
    local = {number: place for place, number in enumerate(groups)}
    for taker in takers:
        taker.places = {local[number]: places for number, places in taker.places.items()}
    names = [group.name for group in groups.values()]
    steps = eliminate(
        takers, list(map(len, groups.values())), [most[name] for name in names], [prices[name] for name in names]
    )
    found = {}
    for place, name in enumerate(names):
        own = [step for step in steps if step.group == place]
        rates = torch.tensor([step.rate for step in own], dtype=torch.float64)
        found[name] = Curve(torch.tensor([step.unit for step in own], dtype=torch.long), rates)
    return found


def curve_of(scores: Tensor, price: float) -> Curve:
    """Units with the lowest score first, but the last."""
    values, order = scores.sort(stable=True)
    return Curve(order[:-1], values[:-1] / max(price, 1e-300))


def features_of(member: Member, layer: Any) -> Tensor:
    """[units, n]: the features of each unit in a patch (c, *k) of a layer that takes it, alike in all groups."""
    taps = math.prod(getattr(layer, "kernel_size", (1,)))
    places = torch.from_numpy(member.places)
    return (places.unsqueeze(2) * taps + torch.arange(taps)).flatten(1)


def what(objective: Objective) -> str:
    """What is counted, in words."""
    return {"macs": "network's MACs", "latency": "layers' time"}.get(objective, f"network's {objective}")
