"""The command line as a user meets it: in a shell, on files."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from test_report import documented
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


def test_threads_that_wait_spin_shortly_unless_the_user_says_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    call("passes")
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    call("passes")
    assert os.environ["GOMP_SPINCOUNT"] == "3000"


WITHOUT_TORCH = {
    0: ("--help", "-h", "--version", "compile --help", "show --help", "passes --help", ""),
    1: ("x.pt2 -o no/x.onnx", "x.pt2 --calibration no.npz -o x.onnx", "x.pt2 -o x.onnx --report /dev/null"),
    2: ("show", "shwo x", "x.pt2 --pases a", "x.pt2", "x.pt2 -o x.pb", "x.pt2 --seed one -o x.onnx",
        "x.pt2 --passes @no -o x.onnx", "x.pt2 --verify off --verify-examples 3 -o x.onnx",
        "x.pt2 --dynamic a -o x.onnx", "x.pt2 --image-std 0 -o x.onnx"),
}  # fmt: skip


def test_help_and_wrong_calls_do_not_import_torch(tmp_path: Path) -> None:
    code = f"""
        import sys
        from fxcompile.cli import main
        for code, lines in {WITHOUT_TORCH!r}.items():
            for line in lines:
                try:
                    main(line.split())
                except SystemExit as left:
                    assert left.code == code, (line, left.code)
                assert not {{"torch", "numpy", "onnx", "rich", "hypothesis"}} & set(sys.modules), line
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(WITHOUT_TORCH[1] + WITHOUT_TORCH[2])


def test_help_answers_in_half_a_second() -> None:
    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*COMMAND, "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(3)) < 0.5  # processor time: other work on the machine does not count


def test_help_shows_every_option_and_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    shown = capsys.readouterr().out
    assert call() == 0
    assert capsys.readouterr().out == shown
    options = "--model --input-shape --calibration --image-mean --image-std --verify --verify-examples --seed --dynamic"
    options += " --opset --allow-pickle --json --report --quiet --passes --output --dump-dir --version --help"
    for option in options.split():
        assert re.search(rf"^  (-\w, )?{option}\b", shown, re.MULTILINE), option
    assert re.search(r"^  passes +The passes there are", shown, re.MULTILINE)
    assert re.search(r"^  show +A model's layers", shown, re.MULTILINE)
    assert max(map(len, shown.splitlines())) <= 80


def test_quiet_prints_nothing_and_a_pipe_gets_no_bar(folder: Path) -> None:
    done = subprocess.run([*COMMAND, "small.pt2", "-o", "small.onnx", "--quiet"], capture_output=True, check=True)
    assert done.stdout == b""
    assert done.stderr == b""


def test_what_the_models_code_prints_is_no_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = """
        import os
        from architecture import Small
        class Loud(Small):
            def forward(self, image):
                print("called")
                return super().forward(image)
        def prints():
            print("made")
            os.chdir("/")
            return Loud()
    """
    (folder / "architecture.py").write_text(Path(__file__).read_text())
    (folder / "loud.py").write_text(textwrap.dedent(code))
    call_it = ("small.pt", "--model", "loud:prints", "--input-shape", "2x1x12x12")
    assert call(*call_it, "-o", "loud.onnx", "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["file"]["path"] == "loud.onnx"
    assert {"made", "called"} <= set(printed.err.split())
    assert (folder / "loud.onnx").exists()
    assert call("show", *call_it, "--json") == 0
    assert json.loads(capsys.readouterr().out)["total"]["parameters"] == 1731


def test_every_option_of_the_report_is_honoured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--seed 5 --verify rollback --verify-examples 3 --dynamic none --opset 21 --quiet --json --dump-dir dumps"
    assert call("small.pt2", "--passes", "fold-batchnorm", "-o", "small.onnx", *options.split()) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["seed"] == 5
    assert report["passes"][0]["examples"] == 3
    assert report["file"]["examples"] == 3
    assert report["file"]["inputs"] == {"image": [2, 1, 12, 12]}
    assert report["file"]["opset"] == 21
    assert sorted(path.name for path in (folder / "dumps").iterdir()) == ["00-traced.py", "01-fold-batchnorm.py"]
    stages = documented()["seconds"]
    assert set(report["seconds"]) - {"fold-batchnorm"} <= stages
    assert call("small.pt2", "-o", "small.onnx", "--dynamic", "image=0,2,3", "--verify", "off", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["file"]["inputs"] == {"image": ["batch", 1, "image_2", "image_3"]}
    assert report["file"]["examples"] == 0


def test_images_calibrate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "images").mkdir()
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 30)).astype("u1")
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    args = ("small.pt2", "--passes", "stack-kernels", "--calibration", "images", "--image-mean", "0.5")
    assert call(*args, "--image-std", "0.25", "-o", "small.onnx", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passes"][0]["measured_on"] == "2 held-out calibration samples"
    assert 0 < report["passes"][0]["error"] < 1


def test_pickled_modules_need_leave(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(make_small(), folder / "whole.pt")
    args = ("whole.pt", "--input-shape", "2x1x12x12", "-o", "whole.onnx")
    assert call(*args) == 1
    assert "--allow-pickle" in capsys.readouterr().err
    assert call(*args, "--allow-pickle", "--quiet") == 0
    assert (folder / "whole.onnx").exists()


@pytest.mark.parametrize(
    ("redirection", "code", "words"),
    [
        (">/dev/full", 1, "fxcompile: stdout: it cannot be written: No space left on device; free space\n"),
        ("| true", 1, ""),
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
    ],
)
def test_results_that_nobody_takes(redirection: str, code: int, words: str) -> None:
    command = f"{shlex.join([*COMMAND, 'passes'])} {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == ""
    assert done.stderr == words
    assert done.returncode == code or (redirection == "| true" and done.returncode == 0)


def test_control_c_is_one_word(folder: Path) -> None:
    """The factory says that it runs, and then takes long."""
    (folder / "slow.py").write_text("import time\ndef net():\n    print('running', flush=True)\n    time.sleep(60)\n")
    args = ["small.pt", "--model", "slow:net", "--input-shape", "2x1x12x12", "-o", "small.onnx"]
    child = subprocess.Popen(
        [*COMMAND, *args],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    assert child.stderr is not None
    assert child.stderr.readline() == "running\n"
    child.send_signal(signal.SIGINT)
    printed, said = child.communicate()
    assert printed == ""
    assert said.lstrip("\n") == "fxcompile: interrupted\n"  # on a line of its own, after the terminal's ^C
    assert child.returncode == 130


def test_names_in_any_language(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In paths and in the names of layers, and where stdout is said to know ASCII only."""
    (folder / "netz.py").write_text(
        "from torch import nn\ndef net():\n    net = nn.Sequential()\n"
        "    net.add_module('größe', nn.Conv2d(1, 2, 3))\n    return net\n"
    )
    torch.save({"größe.weight": torch.ones(2, 1, 3, 3), "größe.bias": torch.ones(2)}, folder / "gewichte_ß.pt")
    args = ["gewichte_ß.pt", "--model", "netz:net", "--input-shape", "2x1x12x12"]
    assert call("show", *args) == 0
    assert "größe  Conv2d 1->2 3x3" in capsys.readouterr().out
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, *args, "-o", "größe.onnx"], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.splitlines()[-1].partition(b":")[0].decode() in ("größe.onnx", "gr\\xf6\\xdfe.onnx")
    assert (folder / "größe.onnx").exists()


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"rmdir {shlex.quote(str(gone))}; {shlex.join([*COMMAND, 'passes'])}"
    done = subprocess.run(["bash", "-c", command], cwd=gone, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fxcompile: the current folder does not exist any more; go to another\n"


@pytest.mark.parametrize(("columns", "widest"), [(80, 80), (100, 100), (20, 60)])
def test_tables_are_as_wide_as_the_terminal(folder: Path, columns: int, widest: int) -> None:
    code = "import sys; sys.stdout.isatty = lambda: True; from fxcompile.cli import main; main()"
    command = [sys.executable, "-c", code, "passes", "stack-kernels"]
    environment = {**os.environ, "COLUMNS": str(columns)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    lines = done.stdout.split("\noptions:", 1)[1].split("\nsource", 1)[0].splitlines()
    assert widest - 25 < max(map(len, lines)) <= widest
