"""Learns what to plant for a pass: looks at plain networks for its sites, and for near misses of each reason to skip.

Random networks alone rarely hold a site. So the steps behind each site found, with what stands around it, are kept as
recipes, and so are those behind a `Skip`, one group for each reason. A planted recipe is chosen like any step, and each
of its choices is now and then another one: one kernel size, one group, one padding off is the nearest miss of all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import zip_longest

import torch
from torch import fx

from fxcompile.errors import FxcompileError
from fxcompile.program import Program
from fxcompile.raw_nodes import PLACE
from fxcompile.rewriting import Pass, Site
from fxcompile.testing.growing import ANY, RandomPicker, Recipe, grow
from fxcompile.testing.network import FILENAME, Network, Step
from fxcompile.tracing import trace

PLAIN = 80
"""Plain networks to look at; more, up to `MOST`, while nothing was found."""

MOST = 120

PLANTED = 30
"""Networks with what was found in plain ones to look at; more, up to `MOST_PLANTED`, while that was no site."""

MOST_PLANTED = 120

FAMILIES = (
    ("convolution", "transposed convolution"),
    ("activation", "prelu"),
    ("batch norm", "instance norm", "group norm"),
    ("pool", "adaptive pool", "global pool"),
)
"""Steps that a pass may treat alike, and be wrong for one: where one of them makes a site, the others are tried."""

LONG = 24
"""Steps of a plain network: what is around a site is all that is kept of it."""

LEARNING = 6
"""Their habit: mostly chains as people write them."""

EACH = 4
"""Recipes to keep for each pattern of a site, and for each reason to skip."""


def learn(passes: Sequence[Pass]) -> list[Recipe]:
    """Recipes for the sites of passes and, as often, for what they skip; each pattern and each reason as any other.

    What was found in plain networks is planted in others and looked at again, as one thing leads to another; so is the
    same with one step of another kind.
    """
    sites: dict[str, list[Recipe]] = {}
    skips: dict[str, list[Recipe]] = {}

    def note(found: tuple[Network, Program] | None) -> None:
        for is_site, key, made in examine(passes, *found) if found is not None else ():
            group = (sites if is_site else skips).setdefault(key, [])
            if made not in group and len(group) < EACH:
                group.append(made)

    for index in range(MOST):
        if index >= PLAIN and (sites or skips):
            break
        note(plain(index))
    for index in range(MOST_PLANTED if skips else PLANTED):
        if index >= PLANTED and sites:
            break
        note(planted(index, sites, skips))
    relatives = [made for group in sites.values() for made in kin(group[0])]
    for index in range(PLANTED if relatives else 0):
        note(traced(grow(RandomPicker(MOST + MOST_PLANTED + index), relatives, LONG, LEARNING)))
    return mixed(sites, skips)


def kin(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with one step of another kind of the same family."""
    for index, step in enumerate(recipe.steps):
        for family in FAMILIES:
            for kind in family if step.kind in family else ():
                if kind != step.kind:
                    changed = Step(kind, (), step.sources)
                    yield Recipe((*recipe.steps[:index], changed, *recipe.steps[index + 1 :]))


def mixed(sites: Mapping[str, Sequence[Recipe]], skips: Mapping[str, Sequence[Recipe]]) -> list[Recipe]:
    """One list in which sites and skips have the same share, and all groups of either: short ones are repeated."""
    made: list[list[Recipe]] = []
    longest = max((EACH * len(groups) for groups in (sites, skips)), default=0)
    for groups in (sites, skips):
        turns = [group[turn % len(group)] for turn in range(EACH) for group in groups.values()]
        made.append([turns[index % len(turns)] for index in range(longest)] if turns else [])
    return [recipe for pair in zip_longest(*made) for recipe in pair if recipe is not None]


@lru_cache(MOST)
def plain(index: int) -> tuple[Network, Program] | None:
    """The plain network of a number, traced; None where it cannot be."""
    return traced(grow(RandomPicker(index), (), LONG, LEARNING))


def planted(
    index: int, sites: Mapping[str, Sequence[Recipe]], skips: Mapping[str, Sequence[Recipe]]
) -> tuple[Network, Program] | None:
    """A network in which is planted what was found so far, traced."""
    return traced(grow(RandomPicker(MOST + index), mixed(sites, skips), LONG, LEARNING))


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
