"""The mathematics of `stack-kernels`, as functions that take and return tensors."""

from ._stack_algebra import (
    amplification,
    compose,
    corner_stack,
    exact_width,
    stack_macs,
    stage_kernels,
    stage_maps,
    widths_for,
)
from ._stack_fitting import energy_widths, stack
from ._stack_refining import refine

__all__ = [
    "amplification",
    "compose",
    "corner_stack",
    "energy_widths",
    "exact_width",
    "refine",
    "stack",
    "stack_macs",
    "stage_kernels",
    "stage_maps",
    "widths_for",
]
