"""tools/fuzz tries passes until it is done, keeps what broke, tells where, and leaves right ones alone."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import explicit_padding
import pytest
from explicit_padding import ExplicitPadding, OneSide
from rich.console import Console

from fxcompile.program import Program
from fxcompile.rewriting import Site, Skip

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import fuzz


def run(passes: list[fuzz.Pass], keep: Path, rounds: int = 1, pipelines: bool = False) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=200)
    found = fuzz.targets(passes, pipelines, keep)
    held = fuzz.fuzz(found, lambda target: target.networks >= rounds * fuzz.ROUND, 1, keep, console)
    return held, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "ROUND", 40)


def test_a_right_pass_is_held_for_as_many_rounds_as_wanted(tmp_path: Path) -> None:
    held, printed = run([ExplicitPadding()], tmp_path, rounds=2)
    assert held
    assert "held         80 networks" in printed
    assert "explicit-padding" in printed
    assert not list(tmp_path.glob("*.py"))


@pytest.mark.usefixtures("random_draws")
def test_a_wrong_pass_is_told_with_the_file_that_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, printed = run([OneSide(), ExplicitPadding()], tmp_path)
    assert not held
    assert "one-side breaks 'same_function' (seed " in printed
    assert "BROKEN" in printed
    assert "held         40 networks" in printed
    shown = subprocess.run([sys.executable, tmp_path / "one-side.py"], capture_output=True, text=True)
    assert shown.returncode == 1
    assert "allowed is 1e-12" in shown.stdout
    monkeypatch.setattr(fuzz, "ROUND", 1)
    again, printed = run([OneSide()], tmp_path)
    assert not again
    assert printed.endswith("BROKEN  one-side\n")


@pytest.mark.parametrize(("kind", "code"), [("ExplicitPadding", 0), ("OneSide", 1)])
def test_the_exit_code_says_whether_all_held(kind: str, code: int, tmp_path: Path) -> None:
    """As a process, with a pass that another package has installed."""
    package = tmp_path / "other-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (package / "entry_points.txt").write_text(f"[fxcompile.passes]\n{name_of(kind)} = explicit_padding:{kind}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])}
    keep = tmp_path / "keep"
    options = ["--examples", "40", "--seed", "1", "--keep", keep, "--passes", name_of(kind)]
    command = [sys.executable, fuzz.__file__, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    assert ("held" if code == 0 else "BROKEN") in done.stdout
    assert (keep / f"{name_of(kind)}.py").exists() == bool(code)


def name_of(kind: str) -> str:
    """As a pipeline text has it."""
    return str(getattr(explicit_padding, kind)())


class NeverThere(ExplicitPadding):
    name: ClassVar[str] = "never-there"

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """None."""
        return iter(())


def test_a_pass_without_sites_is_told_apart_from_a_broken_one(tmp_path: Path) -> None:
    held, printed = run([NeverThere()], tmp_path)
    assert held
    assert "none of 40 networks had a site of never-there" in printed
    assert "rare          0 networks" in printed


def test_statistics_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "DRAWS", 20)
    fuzz.main(["--statistics"])
    printed = capsys.readouterr().out
    assert printed.startswith("20 networks: 100.0% valid")
    assert "convolution" in printed


def test_a_pass_of_no_such_name_is_refused() -> None:
    with pytest.raises(SystemExit, match="did you mean 'fold-batchnorm'"):
        fuzz.main(["--passes", "fold-batchnrm"])
