"""README's "Write a pass in ten minutes" is true: its code runs as it stands, and the kit breaks it where it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text().partition("## Write a pass in ten minutes")[2].partition("\n## ")[0]
PASS, TEST = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
LINE = "            bias += mix @ first.bias.detach().double()\n"


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def pytest_in(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    (folder / "merge_pointwise.py").write_text(code)
    (folder / "test_merge_pointwise.py").write_text(TEST)
    return run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=1", "test_merge_pointwise.py")


def test_the_pass_is_held_to_be_right(tmp_path: Path) -> None:
    done = pytest_in(tmp_path, PASS)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_without_a_line_it_is_broken_on_the_smallest_network(tmp_path: Path) -> None:
    assert LINE in PASS
    done = pytest_in(tmp_path, PASS.replace(LINE, "            pass\n"))
    assert done.returncode == 1
    source = done.stdout.partition("class Network(nn.Module):")[2].partition("def fill")[0]
    assert re.findall(r"self\.(\w+) = nn\.Conv2d\((.*)\)", source) == [
        ("conv1", "1, 1, 1"),
        ("conv2", "1, 1, 1, bias=False"),
    ]


@pytest.mark.parametrize(
    ("right", "wrong", "shown"),
    [
        ("            first.padding,\n", "            first.padding[0],\n", r"nn\.Conv2d\(.*padding=(\(|'same')"),
        (
            "(first.groups, second.groups, second.stride, any(second.padding)) != (1, 1, (1, 1), False)",
            "(first.groups, second.groups, second.stride) != (1, 1, (1, 1))",
            r"conv2 = nn\.Conv2d\(1, 1, 1, [^)]*padding=",
        ),
    ],
    ids=["padding taken for square", "padding of the second forgotten"],
)
def test_a_setting_that_is_seldom_used_is_found(right: str, wrong: str, shown: str, tmp_path: Path) -> None:
    assert PASS.count(right) == 1
    done = pytest_in(tmp_path, PASS.replace(right, wrong))
    assert done.returncode == 1
    assert re.search(shown, done.stdout), done.stdout


@pytest.mark.parametrize("merged", [True, False])
def test_the_pass_merges_what_it_says(merged: bool, tmp_path: Path) -> None:
    (tmp_path / "merge_pointwise.py").write_text(PASS)
    code = f"""
import torch
from torch import nn
import fxcompile as fxc
from merge_pointwise import MergePointwise

torch.manual_seed(0)
between = [] if {merged} else [nn.ReLU()]
model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *between, nn.Conv2d(8, 5, 1)).eval()
result = fxc.PassManager([MergePointwise()]).run(fxc.trace(model, torch.randn(2, 3, 9, 9)))
x = torch.randn(4, 3, 9, 9)
assert torch.allclose(result.module(x), model(x), atol=1e-5)
print(sum(isinstance(layer, nn.Conv2d) for layer in result.module.modules()))
"""
    done = run(tmp_path, "-c", code)
    assert done.stdout == ("1\n" if merged else "2\n"), done.stderr
