"""Passes that are right, and passes with one plausible bug each: what the property-test kit must tell apart."""

from fxcompile.rewriting import Pass

from . import channels, conduct, folding, pools, splitting, stacking

_HALLS = (folding, splitting, stacking, channels, pools, conduct)

RIGHT: list[type[Pass]] = [kind for hall in _HALLS for kind in hall.RIGHT]
WRONG: list[type[Pass]] = [kind for hall in _HALLS for kind in hall.WRONG]

__all__ = ["RIGHT", "WRONG"]
