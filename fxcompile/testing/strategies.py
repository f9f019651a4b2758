"""Hypothesis strategies: networks to try passes on, and inputs for a program."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st
from torch import Tensor

from fxcompile.drawing import Inputs, cases
from fxcompile.program import Program
from fxcompile.testing.growing import MOST_STEPS, Recipe, grow
from fxcompile.testing.network import Network

STEP = 24
"""Bytes for the choices of one step; those beyond are the simplest."""


class Tape:
    """Choices from bytes that Hypothesis draws, and makes smaller when it shrinks.

    Each step has its own stretch: it keeps its meaning whatever happens to the steps before, and a 0 at its start
    leaves it out. All bytes are one draw, because Hypothesis likes to copy short ones over each other: of networks
    whose choices are drawn one by one, most would be copies of each other, and small.
    """

    def __init__(self, choices: bytes) -> None:
        self.choices = choices
        self.at = self.end = 0

    def turn(self, step: int) -> None:
        """Go on with the choices of a step."""
        self.at, self.end = STEP * step, STEP * (step + 1)

    def below(self, count: int) -> int:
        """The next choice."""
        if count == 1 or self.at >= min(self.end, len(self.choices)):
            return 0
        self.at += 1
        return self.choices[self.at - 1] % count


def tapes(steps: int) -> st.SearchStrategy[Tape]:
    """Draws choices for so many steps."""
    return st.binary(min_size=STEP * steps, max_size=STEP * steps).map(Tape)


def networks(recipes: Sequence[Recipe] = (), most: int = MOST_STEPS) -> st.SearchStrategy[Network]:
    """Draws small networks that build, run and can be traced, as real `nn.Module` code.

    They shrink towards one layer with one channel, a kernel of one, no bias, on a map of one pixel.

    Args:
        recipes: what to plant, see `fxcompile.testing.learning.learn`.
        most: the largest number of steps.
    """
    return tapes(most + 2).map(lambda tape: grow(tape, recipes, most))


def inputs(program: Program, most_samples: int = 3) -> st.SearchStrategy[tuple[Tensor, ...]]:
    """Draws inputs for a program, a tensor for each: impulses, constants, and random numbers, large and tiny ones too.

    They shrink towards one sample with one number that is not 0, and take other batch sizes where the batch is free.
    """
    made = Inputs(program.inputs, program.examples)
    return cases(made.kinds(), most_samples if program.batch_is_free else 1).map(made.make)
