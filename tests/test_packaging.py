"""What pip installs: every package and its types, the command, and each pass under its name."""

from __future__ import annotations

import importlib
import inspect
import re
import tomllib
from pathlib import Path

from fxcompile.contracts import Approximate
from fxcompile.rewriting import Pass

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUP = PROJECT["tool"]["setuptools"]


def test_every_package_is_installed_with_its_types() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts): path.parent for path in ROOT.glob("fxcompile/**/__init__.py")
    }
    found["fxcompile.passes"] = ROOT / "passes"
    assert set(SETUP["packages"]) == set(found)
    for name, folder in found.items():
        assert SETUP["package-data"][name] == ["py.typed"]
        assert (folder / "py.typed").read_bytes() == b""
        assert Path(str(importlib.import_module(name).__file__)).parent.name == folder.name


def test_every_name_that_a_module_of_passes_offers_is_there() -> None:
    for name in ("fxcompile.passes", "fxcompile.passes._stacking"):
        module = importlib.import_module(name)
        assert module.__all__ == sorted(module.__all__)
        assert all(hasattr(module, offered) for offered in module.__all__)


def passes_in_the_folder() -> list[type[Pass]]:
    found = []
    for path in sorted((ROOT / "passes").glob("[a-z]*.py")):
        module = importlib.import_module(f"fxcompile.passes.{path.stem}")
        for _, item in inspect.getmembers(module, inspect.isclass):
            if issubclass(item, Pass) and item is not Pass and item.__module__ == module.__name__:
                found.append(item)
    return found


def test_an_approximate_pass_says_by_which_of_its_options_it_is_exact() -> None:
    for item in passes_in_the_folder():
        if isinstance(item.contract, Approximate):
            assert set(re.findall(r"\w+", item.contract.exact_when)) & item.model_fields.keys(), item.name


def test_every_pass_in_the_folder_is_an_entry_point() -> None:
    entries = PROJECT["project"]["entry-points"]["fxcompile.passes"]
    assert entries == {item.name: f"{item.__module__}:{item.__name__}" for item in passes_in_the_folder()}
    assert PROJECT["project"]["scripts"] == {"fxcompile": "fxcompile.cli:main"}


def test_the_licence_that_the_project_names_is_there() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith(f"{PROJECT['project']['license']} License\n\nCopyright (c) ")
    assert "fxcompile contributors" in text
