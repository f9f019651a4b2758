"""What a program is measured by: inputs, what the original gives on them, and how far rounding alone puts that off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fxcompile.calibration import Calibration
from fxcompile.cost import samples as count_samples
from fxcompile.distance import Distance, distances
from fxcompile.errors import CalibrationError
from fxcompile.program import Program, output_node
from fxcompile.rounding import NOISE, run_double, run_noisy
from fxcompile.sitedata import full_batches, limited, synthetic_batch
from fxcompile.walking import MEMORY, live_bytes, node_bytes

FLIPS = 1e-4
"""Share of an integer output's elements that may differ before anything is called off: too close to call."""

RANDOM_BATCHES = 4
"""Batches drawn like the examples where there is nothing else to measure on."""

Errors = dict[str, float]
"""Relative error of each output, by its name."""

Outputs = list[tuple[Tensor, ...]]
"""The outputs of a program, batch by batch."""


def worst(errors: Errors) -> float:
    """The largest error of any output."""
    return max(errors.values(), default=0.0)


def off(errors: Errors, rounding: Errors) -> bool:
    """Whether any output is further off than rounding explains."""
    return any(not error <= rounding[name] for name, error in errors.items())


@dataclass
class Yardstick:
    """The original's outputs on some inputs, and how far rounding alone puts them off.

    Attributes:
        batches: flat inputs.
        what: these inputs in words.
        outputs: what the original gives, batch by batch.
        rounding: for each output, the error up to which nothing is off: `NOISE` times how far the original is from
            its own float64 on the first batch, or from that with every layer a machine epsilon off.
    """

    program: Program
    batches: Sequence[tuple[Tensor, ...]]
    what: str
    outputs: Outputs = field(init=False, repr=False)
    rounding: Errors = field(init=False)

    def __post_init__(self) -> None:
        self.outputs = self.run(self.program)
        epsilon = torch.finfo(self.program.dtype).eps
        exact = run_double(self.program, self.batches[0])
        noisy = run_noisy(self.program, self.batches[0], epsilon)
        self.rounding = {}
        for name, own, wide, off_by in zip(self.program.output_names, self.outputs[0], exact, noisy, strict=True):
            spread = max(_finite_error(own, wide), _finite_error(off_by, wide))
            self.rounding[name] = max(NOISE * spread, epsilon if own.is_floating_point() else FLIPS)

    def run(self, program: Program) -> Outputs:
        """A program's outputs on all batches."""
        return [program.outputs(*batch) for batch in self.batches]

    def between(self, ours: Outputs, theirs: Outputs) -> Errors:
        """The error of each output of one computation against another's."""
        found = distances(ours, theirs)
        return {name: item.value for name, item in zip(self.program.output_names, found, strict=True)}

    def errors(self, program: Program) -> Errors:
        """The error of each output of a program against the original's."""
        return self.between(self.run(program), self.outputs)

    def is_off(self, errors: Errors) -> bool:
        """Whether any output is further off than rounding explains."""
        return off(errors, self.rounding)

    @property
    def infinite(self) -> int:
        """How many values of the original's outputs are not finite."""
        return sum(int((~tensor.isfinite()).sum()) for outputs in self.outputs for tensor in outputs)


def _finite_error(ours: Tensor, theirs: Tensor) -> float:
    """The relative error of values that are finite in both."""
    distance = Distance()
    distance.add(ours, theirs)
    return replace(distance, torn=False).value


def held_out(data: Calibration, program: Program, samples: int, seed: int) -> Yardstick:
    """The held-out part of calibration data, which nothing is fitted to; fewer samples where the outputs are large."""
    _, held = data.split(seed=seed)
    of_batch = sum(map(node_bytes, output_node(program.graph).all_input_nodes))
    most = MEMORY * count_samples(program) // max(4 * of_batch, 1)
    batches = batches_of(limited(held, max(min(samples, most), 1), program), program)
    return Yardstick(program, batches, data.held_out_text(_count(batches)))


def batches_of(data: Calibration, program: Program) -> list[tuple[Tensor, ...]]:
    """Batches of at most 32 samples, so small that two programs side by side stay within `MEMORY`."""
    per_sample = live_bytes(program) // count_samples(program)
    return full_batches(data, program, max(1, min(32, MEMORY // max(3 * per_sample, 1))))


def case_yard(case: Calibration, program: Program) -> Yardstick:
    """Inputs that the user gives.

    Raises:
        CalibrationError: the network takes more samples at once.
    """
    try:
        batches = batches_of(case, program)
    except CalibrationError:
        size = program.inputs[0].shape[0]
        raise CalibrationError(
            f"the case has {len(case)} samples and the network takes {size} at once", mend=f"give {size} of them"
        ) from None
    count = _count(batches)
    return Yardstick(program, batches, f"the case of {count} sample{'s' if count != 1 else ''}")


def random_yard(program: Program, seed: int) -> Yardstick:
    """Inputs drawn like the examples."""
    batches = [synthetic_batch(program, seed + index) for index in range(RANDOM_BATCHES)]
    return Yardstick(program, batches, f"{RANDOM_BATCHES} random batches (no calibration data)")


def _count(batches: Sequence[tuple[torch.Tensor, ...]]) -> int:
    return sum(batch[0].shape[0] if batch[0].dim() else 1 for batch in batches)
