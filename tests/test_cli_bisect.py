"""`fxcompile bisect` as a user meets it: files in, tables or JSON out, one sentence where something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from culprits import Chain

import fxcompile as fxc
from fxcompile import registry
from fxcompile.cli import main
from fxcompile.manager import PassManager

LOSSY = "fold-batchnorm, stack-kernels(rank=2)"


def folder_of(path: Path) -> Path:
    """Files of a user: the network, calibration data, an input that went wrong, and a package with wrong passes."""
    model = Chain()
    model.bn2.running_var.fill_(2e-3)
    model.bn2.weight.data.mul_(0.05)
    batch = torch.export.Dim("batch", min=1, max=1024)
    exported = torch.export.export(model, (torch.randn(2, 4, 9, 9),), dynamic_shapes={"image": {0: batch}})
    torch.export.save(exported, path / "chain.pt2")
    torch.save(model.state_dict(), path / "chain.pt")
    images = np.random.default_rng(0).normal(size=(48, 4, 9, 9)).astype("f4")
    np.savez(path / "calibration.npz", image=0.1 * images)
    np.save(path / "case.npy", 1000 * images[:2])
    plugin = path / "wrong_passes-1.0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: wrong-passes\nVersion: 1.0\n")
    names = "forgetful-fold = culprits:Forgetful\nunclamp = culprits:Unclamped\n"
    (plugin / "entry_points.txt").write_text(f"[fxcompile.passes]\n{names}")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("bisect"))


@pytest.fixture
def folder(files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(files)
    monkeypatch.syspath_prepend(str(files))
    registry._entries.cache_clear()
    yield files
    registry._entries.cache_clear()


def call(*args: str) -> int:
    """Run the command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(["bisect", *args])
    assert isinstance(caught.value.code, int)
    return caught.value.code


STATE_DICT = ("chain.pt", "--model", "culprits:Chain", "--input-shape", "2x4x9x9")
CALIBRATION = ("--calibration", "calibration.npz")


def test_a_hard_layer_is_named_in_a_shell(folder: Path) -> None:
    command = [sys.executable, "-c", "from fxcompile.cli import main; main()", "bisect", "chain.pt2", "--passes", LOSSY]
    done = subprocess.run([*command, *CALIBRATION], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Error of the outputs after each pass, on 12 held-out calibration samples; ")
    assert [line.split()[0] for line in lines if line.startswith(("fold-", "stack-", "ONNX "))] == [
        "fold-batchnorm", "stack-kernels(rank=2)", "ONNX"
    ]  # fmt: skip
    assert lines[-1] == "to leave it out: " + " or ".join(
        [f"stack-kernels({option}, rank=2)" for option in ("skip=[conv2]", lines[-1].split("(")[-1].split(",")[0])]
    )
    assert any(line.startswith("the site that costs the most is 'conv2' of stack-kernels(rank=2)") for line in lines)


def test_what_it_says_to_leave_out_mends_the_compilation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("chain.pt2", "--passes", LOSSY, *CALIBRATION, "--json", "--no-file") == 0
    found = json.loads(capsys.readouterr().out)
    site = found["sites"][found["worst_site"]]
    assert (site["name"], found["passes"][site["pass"]]["text"]) == ("conv2", "stack-kernels(rank=2)")
    program = fxc.trace(torch.export.load("chain.pt2"), torch.randn(2, 4, 9, 9))
    images = torch.from_numpy(np.load("calibration.npz")["image"])
    for mend in site["mends"]:
        report = PassManager(f"fold-batchnorm, {mend}", calibration=images).run(program).record.passes[1]
        assert {item.name for item in report.sites if item.outcome == "kept"} == {"conv1", "conv3"}
        assert report.error == pytest.approx(site["without"], rel=1e-3, abs=1e-7)


def test_a_wrong_pass_of_another_package_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("chain.pt2", "--passes", "forgetful-fold, eliminate-identity", *CALIBRATION, "--no-file") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "layer 'conv2': pass 'forgetful-fold' breaks its contract (exact) there: " in printed
    assert "the pass that costs the most is forgetful-fold: " in printed
    assert "the site that costs the most is 'conv2' of forgetful-fold: " in printed
    assert printed.endswith("to leave it out: forgetful-fold(skip=[conv2])")


def test_a_case_shows_what_calibration_data_does_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = (*STATE_DICT, "--passes", "unclamp(only=act1)", *CALIBRATION, "--verify", "off", "--no-file")
    assert call(*args) == 0
    printed = capsys.readouterr().out
    assert "on 12 held-out calibration samples nothing is off: " in " ".join(printed.split())
    assert call(*args, "--case", "case.npy", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    x = torch.from_numpy(np.load("case.npy"))
    net = torch.export.load("chain.pt2").module()
    wrong = Chain()
    wrong.load_state_dict(torch.load("chain.pt"))
    wrong.act1 = torch.nn.ReLU()
    with torch.no_grad():
        difference, size = (wrong(x) - net(x)).norm(), net(x).norm()
    assert found["errors"]["output"] == pytest.approx(float(difference / size), rel=1e-4)
    assert found["measured_on"] == "the case of 2 samples"
    assert found["sites"][found["worst_site"]]["name"] == "act1"
    assert found["passes"][0]["held_out"] == {"output": 0.0}


def test_json_holds_every_documented_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = (*STATE_DICT, "--passes", LOSSY, *CALIBRATION)
    assert call(*args, "--again", "1", "--json", "--report", "report.json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((folder / "report.json").read_text())
    assert set(found) == {
        "schema", "model", "pipeline", "seed", "measured_on", "errors", "rounding", "is_off", "verdict", "worst_pass",
        "worst_site", "passes", "layers", "sites", "file", "notes", "seconds",
    }  # fmt: skip
    assert set(found["passes"][0]) == {
        "text", "contract", "outcome", "rewritten", "found", "errors", "change", "without", "held_out", "broken"
    }  # fmt: skip
    assert set(found["layers"][0]) == {"name", "kind", "error", "inherited", "own", "alone", "mended", "by"}
    assert set(found["sites"][0]) == {
        "pass", "name", "change", "fit", "without", "only", "alone", "mended", "mends"
    }  # fmt: skip
    assert set(found["file"]) == {"program", "original", "unsimplified", "refused"}
    assert (found["schema"], found["model"], found["pipeline"]) == (1, "chain.pt", LOSSY)
    assert [item["without"] is not None for item in found["sites"]] == [True, False, False]
    readme = (Path(__file__).parents[1] / "README.md").read_text().split("### Of `fxcompile bisect`")[1]
    for keys in (found, found["passes"][0], found["layers"][0], found["sites"][0], found["file"]):
        assert all(f"`{key}`" in readme for key in keys)


def test_quiet_prints_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("chain.pt2", "--quiet", "--no-file") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (("chain.pt2", "--case", "none.npz"), 1, "none.npz: "),
        (("chain.pt2", "--case", "chain.pt2"), 1, "'.pt2' is no kind of calibration file"),
        (("chain.pt2", "--case", "small.npy"), 1, "is 1x4x8x9 and Nx4x9x9 is wanted"),
        (("chain.pt2", "--passes", "folds"), 2, "there is no pass 'folds'; "),
        (("chain.pt2", "--image-mean", "0.5"), 2, "--image-mean and --image-std are for a folder of images"),
        (("chain.pt2", "--report", "case.npy", "--case", "case.npy"), 2, "'case.npy' is an input too"),
        (("chain.pt2", "--again", "-1"), 2, "-1 is not in the range x>=0"),
        (("chain.pt2", "-o", "chain.onnx"), 2, "there is no option -o"),
    ],
)
def test_what_is_wrong_with_the_call_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], code: int, sentence: str
) -> None:
    np.save("small.npy", np.zeros((1, 4, 8, 9), "f4"))
    before = (folder / "case.npy").read_bytes()
    assert call(*args) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fxcompile: ")
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert (folder / "case.npy").read_bytes() == before


def test_help_of_the_command_does_not_import_torch() -> None:
    code = "import sys; from fxcompile.cli import cli;"
    code += " cli(['bisect', '--help'], standalone_mode=False); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=dict(os.environ))
