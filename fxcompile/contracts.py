"""What a pass promises: Exact, Approximate or Trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 0.1, torch.bfloat16: 0.8}


def tolerance(dtype: torch.dtype) -> float:
    """Largest `max|d| / max|y|` by which an exact rewrite may differ: rounding, with a margin of about 6 in float32."""
    return _TOLERANCE.get(dtype, _TOLERANCE[torch.float32])


@dataclass(frozen=True)
class Contract:
    """Base of the three contracts."""

    @property
    def name(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class Exact(Contract):
    """Equal up to rounding on every input: `max|d| <= tolerance * max|y|`, checked in float64."""


@dataclass(frozen=True)
class Approximate(Contract):
    """Each site reports its relative output error on calibration data and is held to `max_error`.

    Attributes:
        exact_when: the options at which no error but rounding is left, as text for the user; "" where there are none.
    """

    exact_when: str = ""


@dataclass(frozen=True)
class Trained(Contract):
    """Changes the function: needs fine-tuning. Shapes, finiteness and gradients to every parameter are checked."""
