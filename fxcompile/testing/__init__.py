"""Try to break a pass: networks and inputs that Hypothesis draws, and a check of all that a pass promises.

from fxcompile.testing import check_pass

def test_my_pass():
    check_pass(MyPass(), examples=200)
"""

from __future__ import annotations

from fxcompile.testing.checks import NothingChecked, Summary, check_pass, check_pipeline
from fxcompile.testing.failing import PassFailure
from fxcompile.testing.growing import Recipe
from fxcompile.testing.network import Network, Step
from fxcompile.testing.strategies import inputs, networks

__all__ = [
    "Network",
    "NothingChecked",
    "PassFailure",
    "Recipe",
    "Step",
    "Summary",
    "check_pass",
    "check_pipeline",
    "inputs",
    "networks",
]
