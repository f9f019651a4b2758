"""The command line as a user meets it: in a shell, on files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from fxcompile.cli import main

COMMAND = [sys.executable, "-c", "from fxcompile.cli import main; main()"]


class Small(nn.Module):
    """A 5x5 convolution with batch norm, a residual and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 8, 5, padding=2)
        self.head = nn.Linear(8, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        y = self.stem(image)
        y = torch.relu(self.conv(y) + y)
        return self.head(y.mean((2, 3)))


def make_small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = make_small()
    batch = torch.export.Dim("batch", min=1, max=1024)
    exported = torch.export.export(model, (torch.randn(2, 1, 12, 12),), dynamic_shapes={"image": {0: batch}})
    torch.export.save(exported, tmp_path / "small.pt2")
    torch.save(model.state_dict(), tmp_path / "small.pt")
    np.savez(tmp_path / "calibration.npz", image=np.random.default_rng(0).normal(size=(64, 1, 12, 12)).astype("f4"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*args: str) -> int:
    """Run the command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    assert isinstance(caught.value.code, int)
    return caught.value.code


PIPELINE = "fold-batchnorm, eliminate-identity, stack-kernels(rank=0.5)"


def test_a_pt2_becomes_a_smaller_verified_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("small.pt2", "--passes", PIPELINE, "--calibration", "calibration.npz", "-o", "small.onnx") == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    (folded,) = (index for index, line in enumerate(lines) if line.startswith("fold-batchnorm "))
    assert lines[folded + 1].startswith("  kept: exact, 1 of 1 sites rewritten, verified on 20 inputs")
    (stacked,) = (index for index, line in enumerate(lines) if line.startswith("  conv "))
    assert lines[stacked + 1].startswith("    Conv2d 8->8 5x5 -> Conv2d 8->4 3x3, Conv2d 4->8 3x3")
    assert lines[-1].startswith("small.onnx: ")
    assert printed.err == ""
    session = onnxruntime.InferenceSession("small.onnx", providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_inputs()] == ["image"]
    x = torch.randn(7, 1, 12, 12)
    given, wanted = session.run(None, {"image": x.numpy()})[0], make_small()(x).detach().numpy()
    assert np.linalg.norm(given - wanted) < 0.1 * np.linalg.norm(wanted)


def test_json_and_report_hold_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("small.pt2", "--passes", "fold-batchnorm", "-o", "small.onnx", "--json", "--report", "report.json")
    assert call(*args) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((folder / "report.json").read_text())
    assert printed["schema"] == 1
    assert printed["pipeline"] == "fold-batchnorm"
    assert printed["after"]["parameters"] == printed["before"]["parameters"] - 16
    assert printed["passes"][0]["sites"][0]["name"] == "stem.0"
    assert printed["file"]["bytes"] == (folder / "small.onnx").stat().st_size
    assert printed["file"]["inputs"] == {"image": ["batch", 1, 12, 12]}


def test_a_state_dict_takes_its_architecture_and_shape(folder: Path) -> None:
    (folder / "architecture.py").write_text(Path(__file__).read_text())
    for factory in ("architecture:make_small", "architecture.py:Small"):
        args = ("small.pt", "--model", factory, "--input-shape", "2x1x12x12", "-o", "other.onnx", "--quiet")
        assert call(*args) == 0
    model = onnx.load("other.onnx")
    assert [value.name for value in model.graph.input] == ["image"]


def test_pipelines_come_from_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "pipeline.txt").write_text("# what we ship\nfold-batchnorm,\neliminate-identity\n")
    assert call("small.pt2", "--passes", "@pipeline.txt", "-o", "small.onnx", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pipeline"] == "fold-batchnorm, eliminate-identity"


def test_show_prints_layers_and_costs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("show", "small.pt2", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    layers = {layer["name"]: layer for layer in shown["layers"]}
    assert layers["conv"]["cost"]["macs"] == 8 * 8 * 25 * 12 * 12
    assert layers["conv"]["cost"]["parameters"] == 8 * 8 * 25 + 8
    assert layers["conv"]["shape"][1:] == [8, 12, 12]
    assert call("show", "small.pt2") == 0
    assert "Conv2d 8->8 5x5" in capsys.readouterr().out


def test_passes_lists_and_describes(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("passes") == 0
    listed = capsys.readouterr().out
    for name in ("fold-batchnorm", "eliminate-identity", "stack-kernels"):
        assert name in listed
    assert call("passes", "stack-kernels") == 0
    described = capsys.readouterr().out
    for word in ("rank=0.5", "approximate", "Simonyan", "stack_kernels.py"):
        assert word in described


def test_threads_that_wait_do_not_spin_unless_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    call("passes")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    call("passes")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_help_does_not_import_torch() -> None:
    code = "import sys; from fxcompile.cli import cli;"
    code += " cli(['--help'], standalone_mode=False); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_help_answers_in_half_a_second() -> None:
    def once() -> float:
        started = time.perf_counter()
        subprocess.run([*COMMAND, "--help"], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started

    assert min(once() for _ in range(5)) < 0.5


def test_quiet_prints_nothing_and_a_pipe_gets_no_bar(folder: Path) -> None:
    done = subprocess.run([*COMMAND, "small.pt2", "-o", "small.onnx", "--quiet"], capture_output=True, check=True)
    assert done.stdout == b""
    assert done.stderr == b""


def test_the_output_may_not_be_an_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "small.pt2").read_bytes()
    assert call("small.pt2", "-o", "small.onnx", "--report", "small.pt2") == 2
    assert "is an input too" in capsys.readouterr().err
    assert (folder / "small.pt2").read_bytes() == before
