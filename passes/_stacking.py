"""The mathematics of `stack-kernels`, as functions that take and return tensors."""

from ._stack_algebra import (
    amplification,
    compose,
    corner_stack,
    exact_width,
    relu_shift,
    stack_macs,
    stage_kernels,
    stage_maps,
    widths_for,
)
from ._stack_fitting import stack
from ._stack_refining import refine

__all__ = [
    "amplification",
    "compose",
    "corner_stack",
    "exact_width",
    "refine",
    "relu_shift",
    "stack",
    "stack_macs",
    "stage_kernels",
    "stage_maps",
    "widths_for",
]
