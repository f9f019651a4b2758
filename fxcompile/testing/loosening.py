"""Finds which choices of a recipe make it what it is, and leaves the others open.

A recipe comes from one network, and with it come choices that do not matter: the stride, the dilation, the padding of
a layer. Planted as it stands, it would show a pass the same few settings again and again. So choices are drawn anew:
where the site, or the reason to skip, is still there each time, they are not planted. What a pass forgot to ask for is
open, too, and drawn as often as anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fxcompile.testing.growing import ANY, RandomPicker, Recipe, regrow
from fxcompile.testing.network import Network, Step

DRAWS = 6
"""How often choices are drawn anew before they are held to be of no matter."""

LAST = Step("output", (("output", "last"), ("sequential", False)))


def loosened(recipe: Recipe, inputs: Step, holds: Callable[[Network], bool]) -> Recipe | None:
    """The recipe with only those choices and dimensions that it needs; None where it does not hold by itself.

    Args:
        inputs: the first step of a network in which it holds.
        holds: whether a network has what the recipe is for.
    """
    if not holds(alone(recipe, inputs, 0)):
        return None
    varied = Step("inputs", tuple(choice for choice in inputs.choices if choice[0].startswith(("dims", "size"))))
    if all(holds(alone(recipe, varied, seed)) for seed in range(DRAWS)):
        inputs = varied
    for index, step in enumerate(recipe.steps):
        parts = [step.choices]
        while parts:
            part = parts.pop()
            freer = without(recipe, index, part)
            if all(holds(alone(freer, inputs, seed)) for seed in range(DRAWS)):
                recipe = freer
            elif len(part) > 1:
                parts += [part[: len(part) // 2], part[len(part) // 2 :]]
    dims = dict(inputs.choices)["dims"]
    others = [Step("inputs", (("dims", other),)) for other in (1, 2, 3) if other != dims]
    anywhere = any(holds(alone(recipe, other, seed)) for other in others for seed in range(DRAWS))
    return recipe if anywhere else replace(recipe, dims=dims)


def without(recipe: Recipe, index: int, choices: Sequence[tuple[str, object]]) -> Recipe:
    """The recipe with some choices of a step left open."""
    step = recipe.steps[index]
    kept = tuple(choice for choice in step.choices if choice not in choices)
    return recipe.with_step(index, replace(step, choices=kept))


def alone(recipe: Recipe, inputs: Step, seed: int) -> Network:
    """A network of nothing but a recipe; what it leaves open is drawn."""

    def moved(source: tuple[int, int]) -> tuple[int, int]:
        return (source[0] + 1 if source[0] != ANY else ANY, source[1])

    steps = [replace(step, sources=tuple(map(moved, step.sources))) for step in recipe.steps]
    return regrow([inputs, *steps, LAST], RandomPicker(seed))[0]
