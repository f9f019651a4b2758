"""Inputs that Hypothesis draws, and the search for one that breaks a contract, shrunk to the smallest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.database import ExampleDatabase
from hypothesis.errors import Flaky
from torch import Tensor

from fxcompile.calibration import Calibration
from fxcompile.comparing import Broken
from fxcompile.program import InputSpec, Program

Drawn = TypeVar("Drawn")

KINDS = ("impulse", "constant", "calibration", "normal", "large", "tiny")
"""What an input can be, simplest first: Hypothesis shrinks towards one image with one non-zero pixel."""

SCALES = {"normal": 1.0, "large": 1e3, "tiny": 1e-6}
"""What the random kinds are multiplied by."""


FEWEST = 2
"""Inputs drawn for a check of a whole network, however much a run of it costs."""


@dataclass(frozen=True)
class Case:
    """One drawn input, small enough to print: what it is, how many samples, and the seed of its random numbers.

    `position`, in [0, 1], says where an impulse lies or which calibration sample is taken; 0 is the first corner.
    """

    kind: str
    samples: int
    position: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        count = f"{self.samples} sample{'s' if self.samples > 1 else ''}"
        detail = {
            "impulse": f" at {self.position:.0%} of the map",
            "calibration": f" at {self.position:.0%} of the data",
        }
        return f"{self.kind}{detail.get(self.kind, '')}, {count}, seed {self.seed}"


def cases(kinds: Sequence[str] = KINDS, most_samples: int = 3) -> st.SearchStrategy[Case]:
    """Draws inputs; with one sample only where the batch is fixed."""
    border = st.sampled_from([0.0, 1.0, 0.5])
    return st.builds(
        Case,
        kind=st.sampled_from(list(kinds)),
        samples=st.integers(1, max(most_samples, 1)),
        position=st.one_of(border, st.floats(0, 1, width=16)),
        seed=st.integers(0, 2**16),
    )


def most_samples(program: Program, examples: int) -> int:
    """How many samples a drawn batch may hold: 3, or 2 where so few examples are drawn that each must be costly."""
    return (3 if examples > FEWEST else 2) if program.batch_is_free else 1


class Inputs:
    """Turns cases into tensors for a program's inputs."""

    def __init__(
        self, specs: Sequence[InputSpec], examples: Sequence[Tensor], calibration: Calibration | None = None
    ) -> None:
        self.specs = tuple(specs)
        self.examples = tuple(examples)
        self.calibration = calibration

    def kinds(self) -> tuple[str, ...]:
        """The kinds that make sense: values that the model was not made for tell little about integer inputs."""
        floating = any(spec.dtype.is_floating_point for spec in self.specs)
        kinds = KINDS if floating else ("calibration", "normal")
        return tuple(kind for kind in kinds if kind != "calibration" or self.calibration is not None)

    def make(self, case: Case) -> tuple[Tensor, ...]:
        """The tensors of a case, one for each input."""
        if case.kind == "calibration" and self.calibration is not None:
            return self._from_calibration(case)
        generator = torch.Generator().manual_seed(case.seed)
        return tuple(self._one(spec, example, case, generator) for spec, example in zip(self.specs, self.examples))  # noqa: B905

    def _shape(self, spec: InputSpec, case: Case) -> list[int]:
        shape = list(spec.shape)
        if spec.batch_axis is not None:
            shape[spec.batch_axis] = case.samples
        return shape

    def _from_calibration(self, case: Case) -> tuple[Tensor, ...]:
        assert self.calibration is not None
        first = round(case.position * (len(self.calibration) - 1))
        made = []
        for spec in self.specs:
            rows = self.calibration.tensors[spec.name]
            count = self._shape(spec, case)[0] if spec.batch_axis is None else case.samples
            index = [(first + offset) % len(self.calibration) for offset in range(count)]
            made.append(torch.as_tensor(rows[index]).to(spec.dtype))
        return tuple(made)

    def _one(self, spec: InputSpec, example: Tensor, case: Case, generator: torch.Generator) -> Tensor:
        shape = self._shape(spec, case)
        if not spec.dtype.is_floating_point:
            return random_like(example, shape, generator)
        if case.kind == "impulse":
            value = torch.zeros(shape, dtype=spec.dtype)
            if value.numel():
                per_sample = value[0].numel() if value.dim() and spec.batch_axis == 0 else value.numel()
                value.view(-1)[round(case.position * (per_sample - 1))] = 1.0
            return value
        if case.kind == "constant":
            return torch.full(shape, 2.0 * case.position - 1.0, dtype=spec.dtype)
        return (random_like(example.double(), shape, generator) * SCALES.get(case.kind, 1.0)).to(spec.dtype)


def random_like(example: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random values of an example's dtype and range: normal with its mean and deviation, or integers it spans."""
    if example.dtype == torch.bool:
        return torch.rand(list(shape), generator=generator) < 0.5
    if not example.is_floating_point() and not example.is_complex():
        low, high = (int(example.min()), int(example.max())) if example.numel() else (0, 1)
        return torch.randint(low, high + 1, list(shape), generator=generator).to(example.dtype)
    mean, deviation = moments(example)
    noise = torch.randn(list(shape), generator=generator, dtype=torch.float64)
    return (noise * deviation + mean).to(example.dtype)


def moments(example: Tensor) -> tuple[float, float]:
    """Mean and deviation of an example's finite values; 1 for a deviation of 0."""
    values = example.double() if example.is_floating_point() else example.real.double()
    finite = values[values.isfinite()]
    mean, deviation = (float(finite.mean()), float(finite.std())) if finite.numel() > 1 else (0.0, 1.0)
    return mean, deviation if deviation > 0 else 1.0


def search(
    check: Callable[[Drawn], None],
    strategy: st.SearchStrategy[Drawn],
    examples: int,
    seed: int | None,
    database: ExampleDatabase | None = None,
    shrink: bool = True,
) -> tuple[Drawn, str] | None:
    """Draw values until one makes `check` raise `Broken`, then shrink it.

    Args:
        examples: how many to draw.
        seed: of the draw; None leaves it to Hypothesis, its profile and `--hypothesis-seed`.
        database: keeps what failed, to be tried first the next time.
        shrink: look for a smaller value than the first one found.

    Returns:
        The smallest value found and the evidence, or None where none of the examples broke anything.
    """
    found: list[tuple[Drawn, str]] = []
    phases = {Phase.generate: True, Phase.shrink: shrink, Phase.reuse: database is not None}

    settings = hypothesis.settings(
        max_examples=max(examples, 1),
        database=database,
        deadline=None,
        phases=[phase for phase, wanted in phases.items() if wanted],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
        verbosity=hypothesis.Verbosity.quiet,
    )

    @hypothesis.given(strategy)
    def run(drawn: Drawn) -> None:
        try:
            check(drawn)
        except Broken as broken:
            found.append((drawn, str(broken)))
            raise

    try:
        # The settings come last: a seed by itself takes the database away.
        settings(run if seed is None else hypothesis.seed(seed)(run))()
    except (Broken, Flaky):  # flaky: what is checked is itself random, and the last case found is as good as any
        return found[-1]
    return None


def draw(strategy: st.SearchStrategy[Drawn], examples: int, seed: int) -> list[Drawn]:
    """Some different values, the same for one seed, as `search` would draw them."""
    drawn: list[Drawn] = []
    search(drawn.append, strategy, examples, seed)
    return list(dict.fromkeys(drawn))
