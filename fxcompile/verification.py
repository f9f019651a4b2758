"""Searches for an input that breaks a contract. Hypothesis draws inputs and shrinks what fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.database import ExampleDatabase
from hypothesis.errors import Flaky
from torch import Tensor, fx, nn

from fxcompile.calibration import Calibration
from fxcompile.contracts import tolerance
from fxcompile.layers import as_double, converted
from fxcompile.program import InputSpec, Program, flatten_tensors
from fxcompile.summing import function_in_order, layer_in_order

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


class Broken(Exception):
    """An input broke a contract; `where` names the output, `evidence` has the figures."""


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

    @hypothesis.settings(
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
        (run if seed is None else hypothesis.seed(seed)(run))()
    except (Broken, Flaky):  # flaky: what is checked is itself random, and the last case found is as good as any
        return found[-1]
    return None


def draw(strategy: st.SearchStrategy[Drawn], examples: int, seed: int) -> list[Drawn]:
    """Some different values, the same for one seed, as `search` would draw them."""
    drawn: list[Drawn] = []
    search(drawn.append, strategy, examples, seed)
    return list(dict.fromkeys(drawn))


def compare(ours: Tensor, theirs: Tensor, allowed: float, name: str = "output") -> None:
    """Raise `Broken` unless `max|ours - theirs| <= allowed * max|theirs|`, non-finite values at the same places."""
    if ours.shape != theirs.shape:
        raise Broken(f"'{name}' has shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}")
    if not theirs.is_floating_point():
        if not torch.equal(ours, theirs.to(ours.dtype)):
            raise Broken(f"'{name}' differs in {int((ours != theirs).sum())} of {theirs.numel()} elements")
        return
    error = relative_maximum(ours, theirs)
    if error > allowed:
        raise Broken(f"'{name}' differs by {error:.2e} of its largest value, {allowed:.0e} is allowed")


def relative_maximum(ours: Tensor, theirs: Tensor) -> float:
    """`max|ours - theirs| / max|theirs|`; infinite where one is finite and the other is not."""
    if not theirs.numel():
        return 0.0 if ours.shape == theirs.shape else float("inf")
    wide = torch.complex128 if ours.is_complex() or theirs.is_complex() else torch.float64
    a, b = ours.to(wide), theirs.to(wide)
    difference, scale = float((a - b).abs().max()), float(b.abs().max())
    if not math.isfinite(difference) or not math.isfinite(scale):
        finite = theirs.isfinite()
        if not torch.equal(ours.isfinite(), finite):
            return float("inf")
        if not finite.any():
            return 0.0
        difference, scale = float((a - b)[finite].abs().max()), float(b[finite].abs().max())
    return difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))


class DoubleInterpreter(fx.Interpreter):
    """Runs a program in float64, casting one layer at a time: the whole network is never held twice."""

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype) -> None:
        super().__init__(module)
        self.dtype = dtype

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            value = super().run_node(n)
            return as_double(value) if isinstance(value, Tensor) else value
        return super().run_node(n)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.wide_layer(target)(*args, **kwargs)

    def wide_layer(self, target: Any) -> Any:
        """A layer over its tensors in float64."""
        layer = self.fetch_attr(target)
        holds = any(True for _ in (*layer.parameters(), *layer.buffers()))
        return converted(layer, as_double) if holds else layer

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        def widen(item: Any) -> Any:
            return torch.float64 if item is self.dtype else item

        return super().call_function(target, fx.node.map_aggregate(args, widen), fx.node.map_aggregate(kwargs, widen))


_TO_A_SHARE_OF_ONE = (nn.Sigmoid, nn.ELU, nn.CELU, nn.SELU)
_TO_A_SHARE_OF_THE_INPUT = (nn.SiLU, nn.GELU)
"""Activations whose kernels are right to a few units in the last place of 1, or of the input, however small the output.

Measured over [-100, 100] against float64, in machine epsilons: ONNX Runtime's sigmoid is off by up to 1.4, and 0 below
-18 or so; its exp(x) - 1 by up to 0.6, all of it near 0; torch's GELU by up to 8 of an input of 100 in its tail.
Softmax, tanh, softplus, mish and erf are right relative to their output.
"""


class NoisyInterpreter(DoubleInterpreter):
    """The same, each layer's output off by as much as rounding may put it, drawn from a seed.

    That is `amplitude * max|y|`, and a machine epsilon of the program's dtype where a kernel is no better than that.
    Means, sums and norms are those of kernels that add up in float32 (`fxcompile.summing`).
    """

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype, amplitude: float) -> None:
        super().__init__(module, dtype)
        self.amplitude = amplitude
        self.generator = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op in ("call_module", "call_function") and isinstance(value, Tensor) and value.dtype == torch.float64:
            noise = torch.rand(value.shape, generator=self.generator, dtype=torch.float64) * 2 - 1
            largest = float(value.abs().max()) if value.numel() else 0.0
            value = value + noise * (self.amplitude * largest + self._floor(n))
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        given = layer_in_order(self.wide_layer(target), args[0]) if self._is_widened(*args) else None
        return super().call_module(target, args, kwargs) if given is None else given

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        given = function_in_order(target, *args) if not kwargs and self._is_widened(*args) else None
        return super().call_function(target, args, kwargs) if given is None else given

    def _is_widened(self, *args: Any) -> bool:
        """Whether the first argument holds numbers that the program has in fewer bits."""
        x = args[0] if args else None
        return self.dtype != torch.float64 and isinstance(x, Tensor) and x.dtype == torch.float64 and x.numel() > 0

    def _floor(self, n: fx.Node) -> float:
        """By how much a kernel may be off though all of its outputs are tiny."""
        layer = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        epsilon = torch.finfo(self.dtype).eps
        if isinstance(layer, _TO_A_SHARE_OF_ONE):
            return epsilon
        if isinstance(layer, _TO_A_SHARE_OF_THE_INPUT):
            inputs: Any = self.map_nodes_to_values(n.args, n)
            return epsilon * float(inputs[0].abs().max())
        return 0.0


def rounding_reach(program: Program, inputs: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """How far rounding inside the network can put each output, relative to its maximum, on these inputs.

    Every layer's output is perturbed by a tenth of the tolerance for one layer (about what other kernels for the same
    layer differ by), and the network run on in float64.
    """
    return [
        relative_maximum(noisy, clean) if clean.is_floating_point() else 0.0
        for noisy, clean in zip(run_noisy(program, inputs, tolerance(program.dtype) / 10), exact, strict=True)
    ]


def run_double(program: Program, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of a program computed in float64 from its own weights."""
    return _run_wide(DoubleInterpreter(program.module, program.dtype), inputs)


def run_noisy(program: Program, inputs: Sequence[Tensor], amplitude: float) -> tuple[Tensor, ...]:
    """The same, each layer's output off by up to `amplitude` of its largest value, drawn from a seed."""
    return _run_wide(NoisyInterpreter(program.module, program.dtype, amplitude), inputs)


def _run_wide(interpreter: DoubleInterpreter, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    wide = [as_double(tensor) for tensor in inputs]
    with torch.no_grad():
        return flatten_tensors(interpreter.run(*wide, enable_io_processing=False))


@dataclass
class Seen:
    """The largest differences seen between two computations of one function, relative to an output's largest value.

    Attributes:
        error: of those within the tolerance.
        amplified: of those beyond it that rounding inside the network explains; 0 where there were none.
    """

    error: float = 0.0
    amplified: float = 0.0

    def add(self, other: Seen) -> None:
        """The larger of both."""
        self.error, self.amplified = max(self.error, other.error), max(self.amplified, other.amplified)


NOISE = 4.0
"""How many times the reach of rounding another computation of the same function may be off."""


def compare_noisy(given: Sequence[Tensor], own: Sequence[Tensor], program: Program, inputs: Sequence[Tensor]) -> Seen:
    """Hold another computation of a program's outputs against its own; returns the largest errors seen.

    An error within the tolerance passes. A deep, saturating or normalising network amplifies harmless rounding past
    it: a larger error passes only if rounding inside the network, amplified in the same way, explains it.

    Raises:
        Broken: an output differs by more than that.
    """
    if len(given) != len(own):
        raise Broken(f"there are {len(given)} outputs instead of {len(own)}")
    exact: tuple[Tensor, ...] = ()
    reach: list[float] = []
    seen = Seen()
    for index, (name, theirs, ours) in enumerate(zip(program.output_names, given, own, strict=True)):
        if theirs.shape != ours.shape:
            raise Broken(f"'{name}' has shape {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
        error = relative_maximum(theirs, ours) if ours.is_floating_point() else float(not torch.equal(theirs, ours))
        if error <= tolerance(ours.dtype):
            seen.add(Seen(error))
            continue
        if not exact:
            exact = run_double(program, inputs)
            reach = rounding_reach(program, inputs, exact)
        if not ours.is_floating_point():
            if torch.equal(ours, exact[index]):
                raise Broken(f"'{name}' differs in {int((theirs != ours).sum())} of {ours.numel()} elements")
            continue  # a comparison so close that float64 decides it otherwise, too
        off = relative_maximum(theirs, exact[index])
        if not off <= NOISE * reach[index]:
            raise Broken(f"'{name}' differs by {off:.2e} of its largest value, rounding reaches {reach[index]:.0e}")
        seen.add(Seen(amplified=error))
    return seen
