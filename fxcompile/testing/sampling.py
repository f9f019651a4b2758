"""One draw of a check: a network, inputs, passes, and what is looked at on it."""

from __future__ import annotations

from dataclasses import dataclass

from fxcompile.comparing import Broken
from fxcompile.drawing import Case, Inputs
from fxcompile.errors import FitError, FxcompileError, UsageError
from fxcompile.rewriting import Pass
from fxcompile.testing.network import Network
from fxcompile.testing.strategies import Tape
from fxcompile.testing.trial import Trial, calibration_of


@dataclass(frozen=True)
class Sample:
    """One draw: a network, and what is looked at.

    Attributes:
        cases: the inputs to compare on.
        turn: which of the promises of `SOMETIMES` is looked at.
        passes: what runs.
        at_limit: whether an option of theirs stands at a limit, so that they may refuse it.
        samples: of calibration data; 0 for none.
        site: which site `only` and `skip` are tried on.
    """

    network: Network
    cases: tuple[Case, ...]
    turn: int
    passes: tuple[Pass, ...]
    at_limit: bool
    samples: int
    site: int

    def refused(self, broken: Broken) -> bool:
        """Whether passes with an option at its limit have refused that, as they may: an option that does not suit the
        network, or a layer that cannot be fitted so. A replacement that does not fit in its place is no refusal.
        """
        return self.at_limit and isinstance(broken.__cause__, (UsageError, FitError))

    def trial(self, exact: bool) -> Trial | None:
        """The draw, built and traced; None where it cannot be.

        Args:
            exact: hold approximate passes to equality; other options than those given promise none.
        """
        try:
            model, examples = self.network.build()
            trial = Trial(model, examples, self.passes, exact=exact and not self.at_limit, site=self.site)
            names = [name for name, _ in self.network.inputs]
            trial.calibration = calibration_of(examples, names, self.samples) if self.samples else None
            made = Inputs(trial.program.inputs, trial.program.examples)
        except (FxcompileError, RuntimeError, ValueError):
            return None
        trial.inputs = [made.make(case) for case in self.cases]
        return trial


def draw_case(tape: Tape) -> Case:
    """An input to compare on, the simplest first, as `drawing.cases` draws them."""
    kind = ("impulse", "constant", "normal", "large", "tiny")[tape.below(5)]
    position = (0.0, 1.0, 0.5, tape.below(256) / 255)[tape.below(4)]
    return Case(kind, 1 + tape.below(3), position, tape.below(256))
