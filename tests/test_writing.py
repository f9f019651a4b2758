"""What is written is there whole or not at all, whatever happens and whenever; what killed runs leave is removed."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from everymoment import state
from torch import nn

from fxcompile import writing
from fxcompile.errors import WriteError
from fxcompile.onnxfile import OnnxFile, write_onnx
from fxcompile.writing import SCRATCH, check_folder, check_writable, publish, scratch_beside, write_atomically

# every moment of a real run


class Net(nn.Module):
    """Two layers whose weights do not stay in the graph where weights go to a file beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 5, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 16, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(image))))  # type: ignore[no-any-return]


def old_files(folder: Path, limit: int | None) -> dict[str, str]:
    """An output and a report as an earlier run left them."""
    folder.mkdir()
    weight = onnx.numpy_helper.from_array(np.arange(1000, dtype="f4"), "w")
    file = OnnxFile(onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(name="old", initializer=[weight])), {})
    with scratch_beside(folder / "m.onnx") as scratch:
        write_onnx(file, scratch / "m.onnx", limit=limit or 10**9)
        publish(scratch / "m.onnx", folder / "m.onnx")
    (folder / "r.json").write_text('{"pipeline": "old"}')
    return state(folder)


def interrupted(how: str, folder: Path, limit: int | None) -> tuple[list[dict[str, Any]], list[str]]:
    """What each interruption of a run left, and the lines that the runs printed to stderr."""
    torch.manual_seed(0)
    torch.export.save(torch.export.export(Net().eval(), (torch.randn(2, 3, 9, 9),)), folder / "net.pt2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if limit is not None:
        environment["FXCOMPILE_TEST_LIMIT"] = str(limit)
    out = folder / "out"
    command = [sys.executable, str(Path(__file__).with_name("everymoment.py")), how, str(out), str(folder / "net.pt2")]
    command += ["-o", str(out / "m.onnx"), "--report", str(out / "r.json"), "--verify", "off", "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr.splitlines()


def with_name(item: dict[str, str], start: str) -> dict[str, str]:
    return {name: content for name, content in item.items() if name.startswith(start)}


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 100], ids=["one file", "weights beside the model"])
def test_a_kill_at_any_moment_leaves_the_old_files_or_the_new_ones(tmp_path: Path, limit: int | None) -> None:
    before = old_files(tmp_path / "out", limit)
    left, _ = interrupted("kill", tmp_path, limit)
    after = state(tmp_path / "out")
    assert {item["code"] for item in left} == {-9}
    assert len(left) > 30
    assert len(after) == len(before) == (2 if limit is None else 3)
    for name in ("m.onnx", "r.json"):
        seen = [item["state"][name] for item in left]
        change = seen.index(after[name])
        assert set(seen[:change]) == {before[name]}
        assert set(seen[change:]) == {after[name]}
    for item in left:
        assert not set(item["state"]) - set(before) - set(after) - set(with_name(item["state"], SCRATCH))
        assert len(with_name(item["state"], SCRATCH)) <= 1, "each run removes what the last one left"


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_moment_leaves_the_old_files_or_the_new_ones(tmp_path: Path) -> None:
    before = old_files(tmp_path / "out", 100)
    left, sentences = interrupted("full", tmp_path, 100)
    after = state(tmp_path / "out")
    failed = [item["state"] for item in left if item["code"] != 0]
    assert {item["code"] for item in left} == {0, 1}
    assert len(sentences) == len(failed) > 40
    for sentence in sentences:
        assert sentence.startswith("fxcompile: ")
        assert sentence.endswith("it cannot be written: No space left on device; free space or choose another disk")
    models = [with_name(item, "m.onnx") for item in failed]
    reports = [item["r.json"] for item in failed]
    assert models[0] == with_name(before, "m.onnx")
    for item in models:
        is_old = item["m.onnx"] == before["m.onnx"]
        assert is_old or item["m.onnx"] == after["m.onnx"]
        assert is_old == (item == with_name(before, "m.onnx")), "a new data file stays with a new model only"
    assert set(reports) == {before["r.json"], after["r.json"]}
    with_scratch = [item["state"] for item in left if with_name(item["state"], SCRATCH)]
    assert len(with_scratch) <= 4, "the scratch folder stays only where it is its removal that fails"


@pytest.mark.parametrize("size", [0, 1, 4096, 200_000, 399_999])
def test_a_file_that_may_not_grow_leaves_the_old_one(tmp_path: Path, size: int) -> None:
    """The system's own refusal, in the middle of a write."""
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(WriteError, match=r"m\.onnx: it cannot be written: File too large; free space"):
            write_atomically(path, bytes(400_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [item.name for item in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"old"


# scratch folders


def test_scratch_folders_of_dead_runs_are_removed_and_those_of_live_ones_are_not(tmp_path: Path) -> None:
    dead, live, other = tmp_path / f"{SCRATCH}dead", tmp_path / f"{SCRATCH}live", tmp_path / ".other"
    for folder in (dead, live, other):
        folder.mkdir()
        (folder / "m.onnx").write_bytes(b"half")
    (tmp_path / f"{SCRATCH}link").symlink_to(other)
    (tmp_path / f"{SCRATCH}file").write_bytes(b"mine")
    lock = os.open(live, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with scratch_beside(tmp_path / "m.onnx") as own:
        held = {path.name for path in tmp_path.iterdir()}
        assert held == {live.name, other.name, own.name, f"{SCRATCH}link", f"{SCRATCH}file"}
        with scratch_beside(tmp_path / "m.onnx") as second:  # another run of the same output
            assert own.exists()
            assert second != own
    os.close(lock)
    assert (other / "m.onnx").exists()
    assert not own.exists()
    assert not second.exists()
    write_atomically(tmp_path / "r.json", b"{}")
    assert not live.exists()


def test_a_scratch_folder_that_vanishes_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = fcntl.flock, []

    def racing(descriptor: int, kind: int) -> None:
        calls.append(kind)
        if len(calls) == 1:
            (scratch,) = tmp_path.iterdir()
            scratch.rmdir()
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", racing)
    with scratch_beside(tmp_path / "m.onnx") as folder:
        assert folder.is_dir()


def test_a_system_without_locks_still_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / f"{SCRATCH}somebodys").mkdir()
    write_atomically(tmp_path / "r.json", b"{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{SCRATCH}somebodys", "r.json"]


# external data


def written(folder: Path, values: dict[str, np.ndarray]) -> Path:
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]
    proto = onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(name="g", initializer=tensors))
    write_onnx(OnnxFile(proto, {}), folder / "m[1]*.onnx", limit=0)
    return folder / "m[1]*.onnx"


def published(path: Path, values: dict[str, np.ndarray]) -> int:
    with scratch_beside(path) as folder:
        return publish(written(folder, values), path)


def test_old_data_files_go_and_those_of_other_models_stay(tmp_path: Path) -> None:
    path = tmp_path / "m[1]*.onnx"
    others = [f"m1x.onnx.{'0' * 16}.data", f"m[1]*.onnx.{'0' * 15}.data", f"m[1]*.onnx.{'0' * 16}.data.bak"]
    for name in others:
        (tmp_path / name).write_bytes(b"other")
    published(path, {"w": np.arange(1000, dtype="f4")})
    first = {item.name for item in tmp_path.iterdir()}
    size = published(path, {"w": np.arange(1000, 2000, dtype="f4")})
    second = {item.name for item in tmp_path.iterdir()}
    assert len(first) == len(second) == len(others) + 2
    assert len(first & second) == len(others) + 1
    assert size == sum((tmp_path / name).stat().st_size for name in second - set(others))
    (weight,) = onnx.load(path).graph.initializer
    assert np.array_equal(onnx.numpy_helper.to_array(weight), np.arange(1000, 2000, dtype="f4"))


def test_data_of_other_boundaries_has_another_name(tmp_path: Path) -> None:
    """Two tensors and their concatenation are the same bytes apart from the padding between them."""
    one = np.arange(1000, dtype="f4")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    written(tmp_path / "a", {"w": one})
    written(tmp_path / "b", {"v": one[:500], "w": one[500:]})
    names = [path.name for folder in "ab" for path in (tmp_path / folder).glob("*.data")]
    assert len(set(names)) == 2


def test_a_model_that_cannot_take_its_name_takes_its_data_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m[1]*.onnx"
    published(path, {"w": np.arange(1000, dtype="f4")})
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
    replace = os.replace

    def refusing(source: Path, place: Path) -> None:
        if place == path:
            raise PermissionError(1, "Operation not permitted")
        replace(source, place)

    monkeypatch.setattr(writing.os, "replace", refusing)
    with pytest.raises(WriteError, match="Operation not permitted; choose another folder"):
        published(path, {"w": np.arange(1000, 2000, dtype="f4")})
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before


def test_files_get_the_mode_that_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "r.json", b"{}")
    finally:
        os.umask(before)
    assert (tmp_path / "r.json").stat().st_mode & 0o777 == 0o640


# looks before the work


def test_what_can_be_written_passes(tmp_path: Path) -> None:
    (tmp_path / "old.onnx").write_bytes(b"")
    (tmp_path / "dangling.onnx").symlink_to("nowhere")
    for name in ("new.onnx", "old.onnx", "dangling.onnx"):
        check_writable(tmp_path / name)
    for name in ("", "new", "new/below/that"):
        check_folder(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling.onnx", "old.onnx"]


def test_what_permissions_forbid_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so the system's answer is played."""
    (tmp_path / "old.onnx").write_bytes(b"old")
    forbidden = {tmp_path}
    monkeypatch.setattr(writing.os, "access", lambda path, _: Path(path) not in forbidden)
    with pytest.raises(WriteError, match="the folder cannot be written to; choose another or change its mode"):
        check_writable(tmp_path / "old.onnx")
    for name in ("", "new/below/that"):
        with pytest.raises(WriteError, match="the folder cannot be written to"):
            check_folder(tmp_path / name)
    forbidden = {tmp_path / "old.onnx"}
    with pytest.raises(WriteError, match=r"old\.onnx: the file is read-only; choose another name or change its mode"):
        check_writable(tmp_path / "old.onnx")
