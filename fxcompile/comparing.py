"""Two computations of one thing, held against each other by their largest difference."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Broken(Exception):
    """An input broke a contract; `where` names the output, `evidence` has the figures."""


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
