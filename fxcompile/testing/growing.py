"""Grows whole networks: inputs, steps that are drawn or planted, and what is returned."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fxcompile.errors import UsageError, did_you_mean
from fxcompile.testing import composites, elementwise, norms, rearranging, resampling
from fxcompile.testing.blocks import BLOCKS
from fxcompile.testing.drafting import CHOICES, Draft, Picker, Value
from fxcompile.testing.network import Network, Step

__all__ = ["RandomPicker", "Recipe", "grow"]

_TABLES = (norms, elementwise, resampling, rearranging, composites)  # they enter their blocks


@dataclass(frozen=True)
class Recipe:
    """Steps to plant together, each as a `Step` whose sources count steps of the recipe; others are free.

    Attributes:
        dims: how many axes the maps must have, 1 to 3, or None where any do.

    Raises:
        UsageError: there is no such kind of step.
    """

    steps: tuple[Step, ...]
    dims: int | None = None

    def __post_init__(self) -> None:
        for step in self.steps:
            if step.kind not in BLOCKS:
                raise UsageError(
                    f"there is no step '{step.kind}' in the networks of the kit", mend=did_you_mean(step.kind, BLOCKS)
                )

    def with_step(self, index: int, step: Step) -> Recipe:
        """The recipe with another step in the place of one."""
        return replace(self, steps=(*self.steps[:index], step, *self.steps[index + 1 :]))

    def __repr__(self) -> str:
        return f"Recipe({' > '.join(step.kind for step in self.steps)})"


class RandomPicker:
    """Choices from a random generator, without Hypothesis."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def turn(self, step: int) -> None:
        """Nothing to do: all choices come from one generator."""

    def below(self, count: int) -> int:
        return self._random.randrange(count)


FREE = [block.kind for turn in range(20) for block in BLOCKS.values() if block.weight > turn]
"""Every kind once, and then those of more weight again: an index means the same kind whatever is planted."""

USUAL = {
    "convolution": ("batch norm", "activation", "activation", "convolution", "prelu"),
    "transposed convolution": ("batch norm", "activation", "convolution"),
    "linear": ("activation", "linear"),
    "batch norm": ("activation", "activation", "convolution"),
    "instance norm": ("activation", "convolution"),
    "group norm": ("activation", "convolution"),
    "activation": ("convolution", "convolution", "pool", "linear", "batch norm"),
    "prelu": ("convolution",),
    "pool": ("convolution", "activation"),
    "pad": ("convolution", "pool"),
    "concat": ("convolution", "batch norm"),
    "add": ("activation", "convolution"),
    "flatten": ("linear", "activation"),
    "global pool": ("flatten", "linear", "convolution"),
    "channel shuffle": ("convolution",),
}
"""What follows a step in networks as people write them, where a step is not drawn from all kinds."""

COMPANIONS = ("again", "tied", "add", "concat", "activation", "identity")
"""What turns a site into a near miss: another use of its layers or of its inner values, or something between."""

COMPANY = 90
"""Out of `CHOICES`: how often a companion follows what was planted."""

ANYTHING = 110
"""Out of `CHOICES`: how often a step is any, while nothing is under way; otherwise a recipe starts."""

BETWEEN = len(BLOCKS) // 2
"""Out of `CHOICES`: how often a step of any kind stands between those of a recipe."""

HABIT = 2
"""One step out of so many is of any kind, not of one that usually follows."""

MOST_RECIPES = CHOICES - ANYTHING
"""So many can be told apart by a choice."""

EMPTY = 5
"""Two of so many steps are left out."""

MOST_STEPS = 9


INDIFFERENT = ("filters", "features", "channels", "weights")
"""Choices that a planted step does not repeat: they hardly make a site, and leave less to combine."""

ANY = -2
"""In the sources of a recipe's step: a value from outside of the recipe, whichever."""


def grow(picker: Picker, recipes: Sequence[Recipe] = (), most: int = MOST_STEPS, habit: int = HABIT) -> Network:
    """A network from choices: at each step, a kind of block or the start of a recipe.

    Args:
        most: steps at most.
        habit: one step out of so many follows whatever came before, the others what usually follows.
    """
    draft = Draft(picker)
    picker.turn(0)
    leads = recipes[:CHOICES]
    dims = leads[picker.below(len(leads))].dims if leads else None
    begin(draft, Step("inputs", () if dims is None else (("dims", dims),)))
    planted = Planted(recipes, habit)
    for number in range(1, most + 1):
        picker.turn(number)
        if picker.below(EMPTY) >= 2 or planted.pending:
            planted.step(draft)
    picker.turn(most + 1)
    return finish(draft, Step("output"))


class SimplestPicker:
    """Always the simplest choice."""

    def turn(self, step: int) -> None:
        """Nothing to do: there are no choices."""

    def below(self, count: int) -> int:
        return 0


def regrow(steps: Sequence[Step], picker: Picker | None = None) -> tuple[Network, Draft]:
    """The network of these steps, as far as they fit; what they leave open is picked. And its draft.

    Args:
        picker: by default the simplest choice.
    """
    draft = Draft(picker or SimplestPicker(), strict=True)
    begin(draft, steps[0])
    made = {0: 0}
    for index, step in enumerate(steps[1:-1], 1):
        if write(draft, step, [(made.get(number, ANY), which) for number, which in step.sources]):
            made[index] = len(draft.steps) - 1
    return finish(draft, steps[-1]), draft


def begin(d: Draft, step: Step) -> None:
    """The inputs: one most of the time, maps most of the time."""
    d.begin(dict(step.choices))
    dims = d.pick("dims", [2, 2, 2, 2, 2, 1, 3])
    sizes = {1: [1, 2, 4, 6, 8, 9, 12], 2: [1, 2, 4, 5, 6, 7, 8], 3: [1, 2, 3, 4, 5]}[dims]
    batch = d.pick("batch", [1, 2, 2, 3])
    channels = d.pick("channels", [1, 2, 3, 4, 6])
    shape = (channels, *[d.pick(f"size {axis}", sizes) for axis in range(dims)])
    d.add_input("x", batch, shape)
    for name in ("image", "mask")[: d.pick("more inputs", [0] * 8 + [1, 1, 2])]:
        form = d.pick(f"form of {name}", ["same", "other channels", "mask", "vector"])
        other = {"same": shape, "other channels": (2, *shape[1:]), "mask": (1, *shape[1:]), "vector": (3,)}[form]
        d.add_input(name, batch, other)
    d.end("inputs")


def write(d: Draft, step: Step, sources: Sequence[tuple[int, int]] = ()) -> bool:
    """Write a step with its choices forced; whether it could be written."""
    d.begin(dict(step.choices), sources)
    BLOCKS[step.kind].grow(d)
    written = d.wrote()
    if written:
        d.end(step.kind)
    return written


class Planted:
    """What is planted in a network: the recipe that is under way, and what of it is done.

    Half of the time it is copied with its choices, of which some then differ; or all but one are, so that each setting
    that matters is missed by itself; or it is planted plainly, most choices being the simplest, as what misses a site
    by one option becomes one.
    """

    def __init__(self, recipes: Sequence[Recipe], habit: int = HABIT) -> None:
        self.recipes = recipes
        self.habit = habit
        self.pending: list[tuple[int, Step]] = []
        self.made: dict[int, int] = {}
        self.fresh = False
        self.plain = False
        self.missed: tuple[int, str] | None = None

    def step(self, d: Draft) -> None:
        """One more step: of the recipe that is under way, or any."""
        at = d.picker.below(CHOICES)
        after, self.fresh = self.fresh, False
        if self.pending:
            if at >= BETWEEN:
                self.follow(d)
                return
        elif after and at >= CHOICES - COMPANY:
            write(d, Step(COMPANIONS[at % len(COMPANIONS)]))
            return
        elif self.recipes and at >= ANYTHING:
            self.start(self.recipes[(at - ANYTHING) * len(self.recipes) // MOST_RECIPES], d.picker)
            self.follow(d)
            return
        usual = USUAL.get(d.steps[-1].kind, ()) if d.picker.below(self.habit) else ()
        if usual:
            write(d, Step(usual[at % len(usual)]), [(len(d.steps) - 1, 0)])
        else:
            write(d, Step(FREE[at % len(FREE)]))

    def start(self, recipe: Recipe, picker: Picker) -> None:
        """Make a recipe the one that is under way."""
        self.pending, self.made = list(enumerate(recipe.steps)), {}
        manner = ("copied", "copied", "missed", "plain")[picker.below(4)]
        choices = [(index, name) for index, step in self.pending for name, _ in step.choices if name not in INDIFFERENT]
        at = picker.below(CHOICES)
        self.plain = manner == "plain"
        self.missed = choices[at % len(choices)] if manner == "missed" and choices else None

    def follow(self, d: Draft) -> None:
        """The next step of the recipe."""
        index, step = self.pending.pop(0)
        self.fresh = not self.pending
        choices = [
            choice for choice in step.choices if choice[0] not in INDIFFERENT and (index, choice[0]) != self.missed
        ]
        planted = Step(step.kind, () if self.plain else tuple(choices))
        d.plain = self.plain
        if write(d, planted, [(self.made.get(number, ANY), which) for number, which in step.sources]):
            self.made[index] = len(d.steps) - 1
        d.plain = False


def finish(d: Draft, step: Step) -> Network:
    """What is returned: the last value, or all that no other line uses, or those by name."""
    d.begin(dict(step.choices))
    last = d.values[-1]
    form = d.pick("output", ["last"] * 6 + ["all", "all", "dict", "pair", "nested"])
    ends = [value for value in d.unused() if value.step[0] > 0]
    if last not in ends:
        ends.append(last)
    if form == "pair":
        ends = [d.values[-1 - d.pick("other output", range(len(d.values)))], last]
    output = {"last": last.name, "dict": _mapping(ends), "nested": f"[{ends[0].name}, ({_names(ends)},)]"}.get(
        form, ends[0].name if len(ends) == 1 else f"({_names(ends)})"
    )
    seed, sequential = d.pick("seed", range(20)), d.pick("sequential", [False, False, True])
    if d.pick("frozen", [False] * 11 + [True]):
        d.extras.append("self.requires_grad_(False)")
    return d.finish(output, seed=seed, sequential=sequential)


def _names(values: Sequence[Value]) -> str:
    return ", ".join(value.name for value in values)


def _mapping(values: Sequence[Value]) -> str:
    return (
        "{" + ", ".join(f'"{name}": {value.name}' for name, value in zip("abcdefghijklm", values, strict=False)) + "}"
    )
