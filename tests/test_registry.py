"""Passes are found through entry points, and what an entry point gets wrong is said in one sentence."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest
from fxcompile.passes import EliminateIdentity, FoldBatchNorm

import fxcompile.registry
from fxcompile.contracts import Exact
from fxcompile.errors import PipelineError
from fxcompile.registry import GROUP, find_pass, pass_names
from fxcompile.rewriting import Pass


class Other(Pass):
    """A pass of another package."""

    name: ClassVar = "other"
    contract: ClassVar = Exact()


class Nameless(Pass):
    """Declares nothing."""


class Bare(Pass):
    """Declares no contract."""

    name: ClassVar = "bare"


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"other": f"{__name__}:Other", "renamed": f"{__name__}:Other", "nameless": f"{__name__}:Nameless",
              "bare": f"{__name__}:Bare", "class": "builtins:dict", "function": "builtins:len",
              "missing": "no_such_package:Pass", "gone": f"{__name__}:Gone"}  # fmt: skip
    made = {name: EntryPoint(name, value, GROUP) for name, value in places.items()}
    monkeypatch.setattr(fxcompile.registry, "_entries", lambda: made)


def test_the_passes_that_ship_are_installed_under_their_names() -> None:
    assert {"eliminate-identity", "fold-batchnorm", "stack-kernels"} <= set(pass_names())
    assert find_pass("fold-batchnorm") is FoldBatchNorm
    assert find_pass("eliminate-identity") is EliminateIdentity
    assert pass_names() == sorted(pass_names())
    assert all(find_pass(name).name == name for name in pass_names())


def test_another_packages_pass_is_found_as_our_own_are(entries: Any) -> None:
    assert find_pass("other") is Other


REFUSED = {
    "othr": "there is no pass 'othr'; did you mean 'other'?",
    "class": "entry point 'class' is no subclass of fxcompile.Pass; correct builtins:dict",
    "function": "entry point 'function' is no subclass of fxcompile.Pass; correct builtins:len",
    "missing": "pass 'missing' cannot be loaded from no_such_package:Pass: No module named 'no_such_package'; "
    "reinstall the package that brings it",
    "gone": f"pass 'gone' cannot be loaded from {__name__}:Gone: module '{__name__}' has no attribute 'Gone'; "
    "reinstall the package that brings it",
    "renamed": f"entry point 'renamed' leads to a pass that calls itself 'other'; give {__name__}:Other one name",
    "nameless": f"entry point 'nameless' leads to a pass that calls itself None; give {__name__}:Nameless one name",
    "bare": f"pass 'bare' declares no contract; add one to {__name__}:Bare",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_to_mend(entries: Any, name: str) -> None:
    with pytest.raises(PipelineError) as caught:
        find_pass(name)
    assert str(caught.value) == REFUSED[name]


def test_without_any_installed_pass_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxcompile.registry, "_entries", dict)
    with pytest.raises(PipelineError, match=r"there is no pass 'fold-batchnorm'; there are none to choose from"):
        find_pass("fold-batchnorm")
