"""Makes a network that breaks a promise as small as it gets, step by step and choice by choice.

Hypothesis would shrink the numbers behind the choices. The steps themselves say more: which of them can go, and which
choice is the simplest. So a few dozen tries do, where Hypothesis needs a thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from fxcompile.drawing import Case
from fxcompile.testing.growing import regrow
from fxcompile.testing.network import Network, Step

SIMPLEST = (Case("impulse", 1), Case("impulse", 1, 1.0), Case("impulse", 1, 0.5), Case("constant", 1, 1.0),
            Case("constant", 1, 0.0), Case("normal", 1))  # fmt: skip

COMPOSITES = ("residual", "separable", "squeeze and excitation", "attention", "tied", "again")
"""Steps that one layer may do for."""

TRIES = 400
"""Most networks to look at."""


def shrink(network: Network, breaks: Callable[[Network], bool]) -> Network:
    """The smallest network found that still breaks what this one breaks."""
    tries = 0
    smaller = True
    while smaller and tries < TRIES:
        smaller = False
        for steps in candidates(network):
            made, _ = regrow(steps)
            if weight(made) >= weight(network):
                continue
            tries += 1
            if breaks(made):
                network, smaller = made, True
                break
            if tries >= TRIES:
                break
    return network


def weight(network: Network) -> tuple[int, int]:
    """How complicated a network is: its steps, and how far its choices are from the simplest ones."""
    _, draft = regrow(network.steps)
    far = sum(
        offered[name].index(value)
        for step, offered in zip(draft.steps, draft.options, strict=True)
        for name, value in step.choices
    )
    return len(draft.steps), far


def candidates(network: Network) -> Iterator[Sequence[Step]]:
    """Smaller ones: without some steps, then with a simpler choice, the largest leaps first."""
    steps = network.steps
    count = len(steps)
    for length in sorted({max((count - 2) // 2, 1), 2, 1}, reverse=True):
        for start in range(count - 1 - length, 0, -1):
            yield without(steps, start, length)
    for index, step in enumerate(steps[1:-1], 1):
        if step.kind in COMPOSITES:
            for kind in ("convolution", "linear"):
                values = tuple(source for source in step.sources if source[1] >= 0)  # not the layers that it takes
                yield [*steps[:index], Step(kind, (), values), *steps[index + 1 :]]
    _, draft = regrow(steps)
    for index in (0, count - 1, *range(1, count - 1)):
        if index < len(draft.steps):
            yield [*steps[:index], replace(steps[index], choices=()), *steps[index + 1 :]]
    for index, (step, offered) in enumerate(zip(draft.steps, draft.options, strict=True)):
        for name, value in step.choices:
            for option in dict.fromkeys(offered[name][: offered[name].index(value)]):
                choices = tuple((key, option if key == name else held) for key, held in step.choices)
                yield [*steps[:index], replace(step, choices=choices), *steps[index + 1 :]]


def without(steps: Sequence[Step], start: int, length: int) -> list[Step]:
    """The steps without some; who took a value of theirs takes what they took."""
    gone = range(start, start + length)

    def moved(source: tuple[int, int]) -> tuple[int, int]:
        while source[0] in gone:
            found = [other for other in steps[source[0]].sources if other[1] >= 0]
            source = found[0] if found else (0, 0)
        return (source[0] - length if source[0] >= gone.stop else source[0]), source[1]

    kept = [step for index, step in enumerate(steps) if index not in gone]
    return [replace(step, sources=tuple(map(moved, step.sources))) for step in kept]
