"""Learns what to plant for a pass: looks at plain networks for its sites, and for near misses of each reason to skip.

Random networks alone rarely hold a site. So the steps behind each site found, with what stands around it, are kept as
recipes, and so are those behind a `Skip`, one group for each reason. A planted recipe is chosen like any step, and each
of its choices is now and then another one: one kernel size, one group, one padding off is the nearest miss of all.
Beside each group stands a recipe in which all choices that do not matter are open (see `loosening`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import zip_longest

import torch
from torch import fx

from fxcompile.errors import FxcompileError
from fxcompile.program import Program
from fxcompile.raw_nodes import PLACE
from fxcompile.rewriting import Pass, Site
from fxcompile.testing.elementwise import ACTIVATIONS
from fxcompile.testing.growing import ANY, HABIT, MOST_RECIPES, RandomPicker, Recipe, grow
from fxcompile.testing.loosening import alone, loosened
from fxcompile.testing.network import FILENAME, Network, Step
from fxcompile.testing.shrinking import COMPOSITES
from fxcompile.tracing import trace

PLAIN = 80
"""Plain networks to look at; more, up to `MOST` and with more that is unusual, while nothing was found."""

MOST = 240

PLANTED = 30
"""Networks with what was found in plain ones to look at; more, up to `MOST_PLANTED`, while that was no site."""

MOST_PLANTED = 120

FAMILIES = (
    ("convolution", "transposed convolution", "separable", "residual"),
    ("activation", "prelu"),
    ("batch norm", "instance norm", "group norm"),
    ("pool", "adaptive pool", "global pool"),
)
"""Steps that a pass may treat alike, and be wrong for one: where one of them makes a site, the others are tried."""

MOST_LOOSENED = 300
"""Networks to look at for what matters in what was found; what is under way then is still finished."""

MOST_RELATIVES = 30
"""Relatives of sites to look at."""

KIN = 3
"""Networks for each of them."""

LONG = 24
"""Steps of a plain network: what is around a site is all that is kept of it."""

LEARNING = 6
"""Their habit: mostly chains as people write them."""

EACH = 4
"""Recipes to keep for each pattern of a site, and for each reason to skip."""


def learn(passes: Sequence[Pass]) -> list[Recipe]:
    """Recipes for the sites of passes and for what they skip; each pattern and each reason as often as any other.

    The same passes are looked at once.

    What was found in plain networks is planted in others and looked at again, as one thing leads to another; so is the
    same with one step of another kind. Half of what is planted in the end leaves open whatever does not matter.
    """
    return list(_learnt(tuple(passes)))


@lru_cache(maxsize=16)
def _learnt(passes: tuple[Pass, ...]) -> tuple[Recipe, ...]:
    lessons = Lessons(passes)
    for index in range(MOST):
        if index >= PLAIN and (lessons.sites or lessons.skips):
            break
        lessons.note(plain(index, LEARNING if index < PLAIN else HABIT))
    lessons.loosen()
    left = PLANTED
    for index in range(MOST_PLANTED if lessons.skips else PLANTED):
        lessons.note(traced(grow(RandomPicker(MOST + index), lessons.recipes(), LONG, LEARNING)))
        left -= bool(lessons.sites)
        if not left:
            break
    lessons.loosen()
    for relative, inputs in lessons.relatives():
        for seed in range(KIN):
            lessons.note(traced(alone(relative, inputs, seed)))
    lessons.loosen()
    return tuple(lessons.recipes())


Group = list[tuple[Recipe, Step]]
"""Recipes, and the first step of a network in which each was found."""


class Lessons:
    """What was found so far: sites by their patterns, and skips by their reasons."""

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes = passes
        self.sites: dict[str, Group] = {}
        self.skips: dict[str, Group] = {}
        self.loose: dict[str, Recipe | None] = {}
        self.looked = 0

    def note(self, found: tuple[Network, Program] | None) -> None:
        """Keep what a network has, unless there is enough of the kind."""
        if found is None:
            return
        for is_site, key, made in examine(self.passes, *found):
            group = (self.sites if is_site else self.skips).setdefault(key, [])
            if len(group) < EACH and all(made != other for other, _ in group):
                group.append((made, found[0].steps[0]))

    def loosen(self) -> None:
        """Find what matters in each group in which that was not yet looked for, sites first."""
        for groups in (self.sites, self.skips):
            for key, group in groups.items():
                if key in self.loose:
                    continue

                def holds(network: Network, wanted: tuple[bool, str] = (groups is self.sites, key)) -> bool:
                    self.looked += 1
                    found = traced(network)
                    return found is not None and any(item[:2] == wanted for item in examine(self.passes, *found))

                small = sorted(group, key=lambda item: len(item[0].steps))
                tries = (loosened(*item, holds) for item in small if self.looked < MOST_LOOSENED)
                self.loose[key] = next((made for made in tries if made is not None), None)

    def recipes(self) -> list[Recipe]:
        """One list, two sites for one skip, in which all groups of either have the same share: short ones are repeated.

        Every other recipe of a group is the loosened one.
        """
        sites, skips = self.turns(self.sites), self.turns(self.skips)
        rounds = min(max(-(-len(sites) // 2), len(skips)), MOST_RECIPES // 3)
        made: list[Recipe] = []
        for index in range(rounds):
            made += [sites[(2 * index + turn) % len(sites)] for turn in (0, 1) if sites]
            made += [skips[index % len(skips)]] if skips else []
        return made

    def turns(self, groups: Mapping[str, Group]) -> list[Recipe]:
        """The recipes of groups, the first of each group before the second of any.

        Groups of single layers come twice: with these, more settings can be had than within a residual block.
        """
        made: list[Recipe] = []
        for turn in range(EACH):
            for key, group in groups.items():
                free, (exact, _) = self.loose.get(key), group[turn % len(group)]
                pair = [exact, exact] if free is None else [replace(exact, dims=free.dims), free]
                composite = any(step.kind in COMPOSITES for step in group[0][0].steps)
                made += pair if composite else pair * 2
        return made

    def relatives(self) -> list[tuple[Recipe, Step]]:
        """What is like a site but for the kind of one step: of each group in turn, as many as are looked at; and the
        smallest with an activation with each of the other activations, as a pass may take one for another.
        """
        found = [list(kin(*group[0])) for group in self.sites.values()]
        turns = [item for some in zip_longest(*found) for item in some if item is not None]
        small = sorted((group[0] for group in self.sites.values()), key=lambda item: len(item[0].steps))
        activated = next((made for item in small if (made := reactivated(*item))), [])
        return turns[:MOST_RELATIVES] + activated


def kin(recipe: Recipe, inputs: Step) -> Iterator[tuple[Recipe, Step]]:
    """The recipe with one step of another kind of the same family."""
    for index, step in enumerate(recipe.steps):
        for family in FAMILIES:
            for kind in family if step.kind in family else ():
                if kind != step.kind:
                    yield recipe.with_step(index, replace(step, kind=kind)), inputs


def reactivated(recipe: Recipe, inputs: Step) -> list[tuple[Recipe, Step]]:
    """The recipe with each activation that there is in the place of its first one; none where it has none."""
    at = next((index for index, step in enumerate(recipe.steps) if step.kind == "activation"), None)
    if at is None:
        return []
    others = [replace(recipe.steps[at], choices=(("function", name),)) for name in ACTIVATIONS]
    return [(recipe.with_step(at, other), inputs) for other in others]


@lru_cache(MOST)
def plain(index: int, habit: int) -> tuple[Network, Program] | None:
    """The plain network of a number and habit, traced; None where it cannot be."""
    return traced(grow(RandomPicker(index), (), LONG, habit))


def traced(network: Network) -> tuple[Network, Program] | None:
    """A network and its program."""
    try:
        return network, trace(*network.build(torch.float32))
    except (FxcompileError, RuntimeError, ValueError):
        return None


def examine(passes: Iterable[Pass], network: Network, program: Program) -> Iterator[tuple[bool, str, Recipe]]:
    """Each site of a network, alone and with what is around it, and each skip: whether a site, its group, its recipe.

    Sites are grouped by the kinds of their steps and layers, skips by their reasons.
    """
    where = dict(network.names)
    nodes = {node.name: node for node in program.graph.nodes}
    called = {str(node.target): node for node in reversed(program.graph.nodes)}
    for pass_ in passes:
        try:
            found = list(pass_.sites(program.snapshot()))
        except Exception:  # a wrong pass: the check itself will say so
            continue
        for item in found:
            is_site = isinstance(item, Site)
            names = [node.name for node in item.nodes] if isinstance(item, Site) else [item.name]
            held = [node for name in names if (node := nodes.get(name) or called.get(name)) is not None]
            core = {step for node in held if (step := step_of(node, network, where)) is not None}
            if not core:
                continue
            kinds = " > ".join(network.steps[step].kind for step in sorted(core))
            key = pattern_of(kinds, item) if isinstance(item, Site) else reason_of(item.reason)
            if is_site:
                yield is_site, key, recipe(network, core)
            yield is_site, key, recipe(network, core | around(network, core))


def pattern_of(kinds: str, site: Site) -> str:
    """The steps of a site and the kinds of its layers: a pass may be wrong for one activation alone."""
    return f"{kinds}: {' '.join(type(layer).__name__ for layer in site.layers)}"


def reason_of(reason: str) -> str:
    """A reason without the names and numbers in it."""
    return re.sub(r"'[^']*'|\d+", "_", reason)


def step_of(node: fx.Node, network: Network, where: dict[str, int]) -> int | None:
    """The step of the network that a node of its program comes from."""
    if node.op == "call_module" and str(node.target) in where:
        return where[str(node.target)]
    place, _, number = str(node.meta.get(PLACE, "")).rpartition(":")
    return network.step_of_line(int(number)) if place == FILENAME else None


def around(network: Network, core: set[int]) -> set[int]:
    """The steps that a core takes values from, and those that take its values."""
    before = {number for index in core for number, _ in network.steps[index].sources if number > 0}
    after = {index for index, step in enumerate(network.steps) if any(number in core for number, _ in step.sources)}
    return before | after


def recipe(network: Network, chosen: set[int]) -> Recipe:
    """Some steps of a network, their sources counted among themselves, `ANY` for those outside."""
    order = sorted(chosen)
    place = {index: number for number, index in enumerate(order)}
    steps = [network.steps[index] for index in order]
    return Recipe(
        tuple(
            Step(step.kind, step.choices, tuple((place.get(number, ANY), which) for number, which in step.sources))
            for step in steps
        )
    )
