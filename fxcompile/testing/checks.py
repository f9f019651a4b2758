"""Holds passes to their contracts on drawn networks; a failure shrinks, and prints a file that reproduces it."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path

import hypothesis
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase, ExampleDatabase

from fxcompile.comparing import Broken
from fxcompile.contracts import Exact
from fxcompile.drawing import search
from fxcompile.errors import UsageError
from fxcompile.rewriting import Pass
from fxcompile.testing import promises, structure
from fxcompile.testing.failing import PassFailure, Promise, failure_of
from fxcompile.testing.growing import MOST_RECIPES, MOST_STEPS, Recipe, grow
from fxcompile.testing.learning import learn, reason_of
from fxcompile.testing.limits import accepted_outside, inside
from fxcompile.testing.network import Network
from fxcompile.testing.sampling import Sample, draw_case
from fxcompile.testing.shrinking import SIMPLEST, shrink
from fxcompile.testing.strategies import STEP, Tape, tapes
from fxcompile.testing.trial import Trial

ALWAYS: tuple[Promise, ...] = (
    promises.completes,
    structure.model_untouched,
    promises.same_function,
    promises.stated_error,
    structure.nothing_copied,
    structure.rest_untouched,
    structure.graph_sound,
    structure.shapes_recorded,
    structure.origins_recorded,
    structure.layers_consistent,
    structure.savings,
    promises.same_trainable,
)
"""Looked at on every network."""

SOMETIMES: tuple[Promise, ...] = (
    structure.idempotent,
    structure.repeatable,
    promises.gradients,
    structure.selection,
    promises.same_in_float32,
    promises.verified,
)
"""Looked at on one network in so many, in turns."""


@dataclass
class Summary:
    """What a check has looked at.

    Attributes:
        networks: how many were drawn, invalid ones included.
        invalid: how many could not be built, run or traced.
        with_sites: how many had a site that was rewritten.
        sites: how many sites were rewritten in all.
        reasons: how often sites were left for each reason, names and numbers aside.
        exported: how many were exported to ONNX and run there.
        seconds: of processor time that drawing and checking took, without learning what to plant and exporting.
    """

    networks: int = 0
    invalid: int = 0
    with_sites: int = 0
    sites: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    exported: int = 0
    seconds: float = 0.0


def check_pass(
    pass_: Pass,
    *,
    examples: int | None = None,
    seed: int | None = None,
    onnx_examples: int = 2,
    networks: st.SearchStrategy[Network] | None = None,
    sites: Sequence[Recipe] = (),
    exact: bool = False,
    database: Path | str | None = None,
) -> Summary:
    """Try to break a pass: hold it to its contract on drawn networks and inputs.

    Checked on each network: the outputs, against the model's own in float64 (an approximate pass's stated error
    against the measured one; shapes and finiteness for one that is to be trained); that the model, the program that
    went in and all random generators are untouched; that nothing shared is copied, and nothing outside of the sites
    changed; shapes and origins on every node; tensors that fit their layers' options. On some, in turns: that it
    repeats itself bit for bit, is idempotent if it says so, keeps gradients, honours `only` and `skip`, holds in
    float32, satisfies the compiler's own verification; its options at each of their limits; the file in ONNX Runtime.

    Args:
        pass_: the pass, with options.
        examples: how many networks to draw; by default `max_examples` of the Hypothesis profile, 100 if none is loaded.
        seed: of the draw; None leaves it to Hypothesis, its profile and `--hypothesis-seed`.
        onnx_examples: how many networks with sites to export, which takes about a second each.
        networks: what to draw from instead of the kit's own networks; nothing is planted in these.
        sites: steps to plant because they make a site, beside what the kit learns from `pass_.sites`.
        exact: hold an approximate pass to equality, because its options promise it.
        database: a folder for what failed, which is tried first the next time; unused under a profile that draws the
            same each time, as Hypothesis's "ci" does.

    Raises:
        PassFailure: an AssertionError with the smallest network and input found, and a file that reproduces it.
        NothingChecked: an AssertionError, too: of 20 networks or more, none had a site.
        UsageError: what is given is no pass, or there is no such kind of step, or fewer than one example.
    """
    __tracebackhide__ = True
    usable([pass_], examples)
    taken = accepted_outside(pass_)
    if taken is not None:
        raise PassFailure("options", taken, None, "", f"{pass_.name} takes {taken}, which is outside of its limits")
    limits = inside(pass_)

    def passes(tape: Tape) -> tuple[tuple[Pass, ...], bool]:
        at = tape.below(3 * len(limits) + 1) if limits else 0
        return ((pass_,), False) if not 1 <= at <= len(limits) else ((limits[at - 1],), True)

    examples = hypothesis.settings().max_examples if examples is None else examples
    check = Check(passes, [pass_], exact)
    recipes = [] if networks is not None else mixed(sites, learn([pass_]))
    summary = check.run(networks, recipes, examples, seed, database)
    check.export(onnx_examples)
    return summary


def check_pipeline(
    passes: Sequence[Pass],
    *,
    examples: int | None = None,
    seed: int | None = None,
    networks: st.SearchStrategy[Network] | None = None,
    sites: Sequence[Recipe] = (),
    database: Path | str | None = None,
) -> Summary:
    """Hold random orders and subsets of passes to their contracts together, with the options that they were given.

    What concerns one pass alone is left to `check_pass`, whose arguments and errors these are: limits of options,
    `only` and `skip`, idempotence, the file in ONNX Runtime.

    Raises:
        UsageError: there are no passes, or what is given is none.
    """
    __tracebackhide__ = True
    passes = [passes] if isinstance(passes, Pass) else list(passes)
    usable(passes, examples)

    def order(tape: Tape) -> tuple[tuple[Pass, ...], bool]:
        count = 1 + tape.below(len(passes) + 1)
        return tuple(passes[tape.below(len(passes))] for _ in range(count)), False

    examples = hypothesis.settings().max_examples if examples is None else examples
    recipes = [] if networks is not None else mixed(sites, learn(passes))
    return Check(order, passes).run(networks, recipes, examples, seed, database)


def usable(passes: Sequence[object], examples: int | None) -> None:
    """Raises `UsageError` where there is nothing to check."""
    if not passes:
        raise UsageError("there are no passes to check")
    for pass_ in passes:
        if not isinstance(pass_, Pass):
            mend = f"write {pass_.__name__}()" if isinstance(pass_, type) else "give an instance, as FoldBatchNorm()"
            raise UsageError(f"{pass_!r} is no pass", mend=mend)
    if examples is not None and examples < 1:
        raise UsageError(f"examples is {examples}, and nothing would be checked", mend="give at least 1")


def mixed(given: Sequence[Recipe], learnt: Sequence[Recipe]) -> list[Recipe]:
    """Recipes of which every other one is given, where there are any: they would be rare among all that was learnt."""
    if not given or not learnt:
        return [*given, *learnt]
    return [recipe for pair in zip(cycle(given), learnt[: MOST_RECIPES // 2]) for recipe in pair]


def file_name(text: str) -> str:
    """A name for a file or folder that stands for a pipeline's text: with a hash where it would be too long."""
    name = "".join(char if char.isalnum() else "-" for char in text)
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


LONGEST = 120
"""Characters of a pipeline's text in a file's name; most systems take 255 bytes."""


class NothingChecked(AssertionError):
    """No network had a site of the passes, so that nothing was looked at."""


FEWEST = 20
"""Networks of which one at least must have a site."""

FEW, MANY = 10, 100
"""Of so many networks, fewer with sites say little: that is a warning."""


class Check:
    """One search: what is tried, what was seen, and how a failure is told.

    Args:
        passes: chooses what runs, and says whether an option of theirs stands at a limit.
        usual: the passes with the options that they were given with.
        exact: hold approximate passes to equality.
    """

    def __init__(
        self, passes: Callable[[Tape], tuple[tuple[Pass, ...], bool]], usual: Sequence[Pass], exact: bool = False
    ) -> None:
        self.passes = passes
        self.usual = tuple(usual)
        self.exact = exact
        self.fits = any(not isinstance(pass_.promise, Exact) for pass_ in usual)
        self.summary = Summary()
        self.focus: Promise | None = None
        self.rewritten: list[Sample] = []

    def run(
        self,
        networks: st.SearchStrategy[Network] | None,
        recipes: Sequence[Recipe],
        examples: int,
        seed: int | None,
        database: Path | str | None,
    ) -> Summary:
        """Draw, check, shrink.

        Raises:
            PassFailure: a promise is broken.
            NothingChecked: no network had a site.
        """
        __tracebackhide__ = True
        if networks is not None:
            drawn = st.builds(self._sample, networks, tapes(1))
        else:
            drawn = tapes(MOST_STEPS + 3).map(lambda tape: self._sample(grow(tape, recipes), tape))
        before = time.process_time()
        broken = search(self._look, drawn, examples, seed, self._database(database), shrink=networks is not None)
        self.summary.seconds = time.process_time() - before
        if broken is not None:
            sample, evidence = broken if networks is not None else self._shrunk(*broken)
            raise self._failure(sample, evidence)
        if self.summary.with_sites < FEW and examples >= MANY:
            warnings.warn(
                f"only {self.summary.with_sites} of {self.summary.networks} networks had a site, so little was "
                "checked: say what makes one with sites=[...], or draw networks that have one with networks=...",
                stacklevel=3,
            )
        if not self.summary.with_sites and examples >= FEWEST:
            names = " or ".join(pass_.name for pass_ in self.usual)
            raise NothingChecked(
                f"none of {self.summary.networks} networks had a site of {names}, so nothing was checked: say what "
                "makes a site with sites=[...], or draw networks that have one with networks=..."
            )
        return self.summary

    def _sample(self, network: Network, tape: Tape) -> Sample:
        """Everything but the network, from the last stretch of a tape."""
        tape.turn(len(tape.choices) // STEP - 1)
        turn, site = tape.below(len(SOMETIMES)), tape.below(6)
        samples = (0, 16, 48)[tape.below(3)] if self.fits else 0
        chosen = tuple(draw_case(tape) for _ in range(2))
        passes, at_limit = self.passes(tape)
        return Sample(network, chosen, turn, passes, at_limit, samples, site)

    def _database(self, folder: Path | str | None) -> ExampleDatabase | None:
        """What failed is kept for each check apart: with one key for all, each would drop what breaks another."""
        if folder is None or hypothesis.settings.default is None or hypothesis.settings.default.derandomize:
            return None
        return DirectoryBasedExampleDatabase(Path(folder) / file_name(", ".join(map(str, self.usual))))

    def _shrunk(self, sample: Sample, evidence: str) -> tuple[Sample, str]:
        """The smallest sample, and the fewest passes, that break the promise in focus."""
        last = evidence

        def breaks(changed: Sample) -> bool:
            nonlocal last
            trial = changed.trial(self.exact)
            try:
                if trial is not None and self.focus is not None:
                    self.focus(trial)
            except Broken as broken:
                if changed.refused(broken):
                    return False
                last = str(broken)
                return True
            return False

        usual = replace(sample, passes=self.usual, at_limit=False)
        if sample.at_limit and breaks(usual):
            sample = usual
        for index in reversed(range(len(sample.passes))):
            fewer = replace(sample, passes=(*sample.passes[:index], *sample.passes[index + 1 :]))
            sample = fewer if fewer.passes and breaks(fewer) else sample
        sample = replace(sample, network=shrink(sample.network, lambda made: breaks(replace(sample, network=made))))
        for case in SIMPLEST:
            if breaks(replace(sample, cases=(case, case))):
                sample = replace(sample, cases=(case, case))
                break
        breaks(sample)
        return sample, last

    def _look(self, sample: Sample) -> None:
        """Check one draw; after the first broken promise, that one alone, while the draw shrinks."""
        trial = sample.trial(self.exact)
        counts = self.focus is None
        self.summary.networks += counts
        if trial is None:
            self.summary.invalid += counts
            return
        for promise in (*ALWAYS, SOMETIMES[sample.turn]) if self.focus is None else (self.focus,):
            try:
                promise(trial)
            except Broken as broken:
                if sample.refused(broken):
                    return
                self.focus = promise
                raise
        if counts:
            self._count(trial, sample)

    def _count(self, trial: Trial, sample: Sample) -> None:
        sites = len(trial.kept)
        self.summary.sites += sites
        self.summary.with_sites += sites > 0
        for report in trial.result.record.passes:
            self.summary.reasons.update(reason_of(site.reason) for site in report.sites if site.outcome == "left")
        if sites and not sample.at_limit and len(self.rewritten) < 50:
            self.rewritten.append(sample)

    def export(self, count: int) -> None:
        """Export so many of the networks that were rewritten, the largest first.

        Raises:
            PassFailure: a file does not compute what the model does.
        """
        for sample in sorted(self.rewritten, key=lambda item: -len(item.network.steps)):
            if self.summary.exported >= count:
                return
            trial = sample.trial(self.exact)
            assert trial is not None
            self.focus = promises.same_in_onnx
            try:
                self.summary.exported += promises.same_in_onnx(trial)
            except Broken as broken:
                raise self._failure(sample, str(broken)) from None

    def _failure(self, sample: Sample, evidence: str) -> PassFailure:
        trial = sample.trial(self.exact)
        assert trial is not None
        return failure_of(self.focus, sample, trial, evidence)
