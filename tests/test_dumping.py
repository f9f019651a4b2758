"""`--dump-dir`: numbered files of this run only, whole ones, and nobody else's files touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fxcompile.passes import EliminateIdentity, FoldBatchNorm
from torch import nn

from fxcompile.dumping import Dumps
from fxcompile.errors import WriteError
from fxcompile.manager import PassManager
from fxcompile.program import Program
from fxcompile.tracing import trace


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout()).eval(), torch.randn(2, 1, 8, 8))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_each_file_holds_the_graph_with_shapes_and_origins(program: Program, tmp_path: Path) -> None:
    PassManager("fold-batchnorm", dump_dir=tmp_path / "made" / "here").run(program)
    assert names(tmp_path / "made" / "here") == ["00-traced.py", "01-fold-batchnorm.py"]
    before, after = (path.read_text() for path in sorted((tmp_path / "made" / "here").iterdir()))
    assert before.startswith("# fxcompile: traced\n# input: [2, 1, 8, 8] torch.float32\n")
    assert "# _1 = 1: BatchNorm2d (_0) [2, 2, 6, 6] from [1]\n" in before
    assert "BatchNorm2d" not in after
    assert ": Conv2d 1->2 3x3 (input_1) [2, 2, 6, 6] from [0, 1]\n" in after
    compile(after, "dump", "exec")


def test_files_of_a_longer_run_before_go_and_others_stay(program: Program, tmp_path: Path) -> None:
    (tmp_path / "01-mine.py").write_text("print('mine')\n")
    (tmp_path / "02-notes.txt").write_text("# fxcompile: notes\n")
    (tmp_path / "03-folder.py").mkdir()
    PassManager([FoldBatchNorm(), EliminateIdentity(), FoldBatchNorm()], dump_dir=tmp_path).run(program)
    assert "03-fold-batchnorm.py" in names(tmp_path)
    PassManager("eliminate-identity", dump_dir=tmp_path).run(program)
    assert names(tmp_path) == [
        "00-traced.py", "01-eliminate-identity.py", "01-mine.py", "02-notes.txt", "03-folder.py"
    ]  # fmt: skip
    assert (tmp_path / "01-mine.py").read_text() == "print('mine')\n"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file/below: it cannot be written: Not a directory; choose another folder"):
        Dumps(tmp_path / "file" / "below")


def test_no_folder_means_no_files(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Dumps(None).write("traced", program)
    assert names(tmp_path) == []
