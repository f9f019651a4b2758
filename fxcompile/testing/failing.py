"""How a broken promise is told: the figures, the smallest network, and a file that reproduces it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fxcompile.comparing import Broken
from fxcompile.contracts import Exact, tolerance
from fxcompile.drawing import Case
from fxcompile.errors import ContractError
from fxcompile.rounding import NOISE, rounding_reach
from fxcompile.testing import promises
from fxcompile.testing.network import Network
from fxcompile.testing.reproducing import reproducer
from fxcompile.testing.sampling import Sample
from fxcompile.testing.trial import Trial

Promise = Callable[[Trial], object]
"""Raises `Broken` where a trial breaks it."""


class PassFailure(AssertionError):
    """A pass broke a promise.

    Attributes:
        promise: the name of the promise, as in `fxcompile.testing.promises` and `structure`.
        evidence: the figures.
        network: the smallest network found; None where the options alone break it.
        reproducer: the text of a Python file that shows it, without Hypothesis.
    """

    def __init__(self, promise: str, evidence: str, network: Network | None, reproducer: str, message: str) -> None:
        super().__init__(message)
        self.promise = promise
        self.evidence = evidence
        self.network = network
        self.reproducer = reproducer


def failure_of(promise: Any, sample: Sample, trial: Trial, evidence: str) -> PassFailure:
    """What is raised where a sample breaks a promise, with a file that shows it.

    Args:
        promise: a function of `promises` or `structure`.
        trial: the sample, built.
        evidence: the figures.
    """
    names = ", ".join(map(str, sample.passes))
    sentence = (promise.__doc__ or "").strip().partition("\n")[0].rstrip(".")
    title = f"{names} breaks a promise: {sentence}"
    if promise is promises.same_function and trace_is_wrong(trial):
        title = f"the traced network is not the model, whatever {names} does; this is a bug of fxcompile"
        promise = promises.faithful_trace
    comparisons = breaking_first(promise, trial, sample)
    text = reproducer(
        title,
        evidence,
        sample.network,
        sample.passes,
        comparisons,
        promise=promise.__name__,
        home=promise.__module__,
        seed=trial.seed,
        plain=promise is promises.same_function and is_plain(trial),
        exact=trial.exact,
        samples=sample.samples,
        site=trial.site,
    )
    on = f" on {comparisons[0][0]}" if comparisons and promise is promises.same_function else ""
    message = f"{title}\n{evidence}{on}\n{second_opinion(promise, trial)}\n{text}"
    return PassFailure(promise.__name__, evidence, sample.network, text, message)


def is_plain(trial: Trial) -> bool:
    """Whether equality is all that is promised of the outputs, without calibration data and without more rounding than
    a dtype's tolerance: then the file can say how they are compared by itself.
    """
    if not trial.is_exact or trial.calibration is not None:
        return False
    for inputs in trial.inputs:
        wanted = trial.wanted(inputs)
        if wanted is None:
            continue
        reaches = zip(rounding_reach(trial.program, inputs, wanted), wanted, strict=True)
        if any(NOISE * reach > tolerance(tensor.dtype) for reach, tensor in reaches):
            return False
    return True


def trace_is_wrong(trial: Trial) -> bool:
    """Whether the program differs from the model before any pass."""
    try:
        promises.faithful_trace(trial)
    except Broken:
        return True
    return False


def breaking_first(promise: Promise, trial: Trial, sample: Sample) -> list[tuple[Case, tuple[Tensor, ...]]]:
    """The inputs of a draw, one that breaks the promise by itself first."""
    pairs = list(zip(sample.cases, trial.inputs, strict=True))
    for pair in pairs:
        trial.inputs = [pair[1]]
        try:
            promise(trial)
        except Broken:
            return [pair, *(other for other in pairs if other is not pair)]
    trial.inputs = [inputs for _, inputs in pairs]
    return pairs


def second_opinion(promise: Promise, trial: Trial) -> str:
    """Whether the compiler's own verification sees what was found here, as it must for a wrong function."""
    if promise is not promises.same_function or not isinstance(trial.contract, Exact):
        return ""
    try:
        trial.run(verify="raise", verify_examples=20)
    except Broken as broken:
        seen = isinstance(broken.__cause__, ContractError)
        return "The pass manager's own verification finds it, too." if seen else ""
    return "The pass manager's own verification does NOT find it: please report that, too."
