"""The emitted file computes what the program does, under the model's own names, and is written atomically."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxscript import ir
from torch import Tensor, nn

from fxcompile import emission, onnxfile, simplifying
from fxcompile.errors import EmitError, UsageError, WriteError
from fxcompile.manager import PassManager, Result
from fxcompile.tracing import trace


class TwoHeads(nn.Module):
    """Two inputs, a nested dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, image: Tensor, mask: Tensor) -> dict[str, Any]:
        y = torch.relu(self.bn(self.conv(image))) * mask
        return {"score": self.head(y.mean((2, 3))), "maps": [y, y + 1]}


def compiled(passes: str = "fold-batchnorm", **options: Any) -> Result:
    torch.manual_seed(0)
    model = TwoHeads().eval()
    model.bn.running_mean.normal_()
    program = trace(model, (torch.randn(2, 3, 6, 8), torch.rand(2, 1, 6, 8)))
    return PassManager(passes, **options).run(program)


def run(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {item.name: x.numpy() for item, x in zip(session.get_inputs(), inputs, strict=True)})


def test_names_batch_and_values_are_the_models_own(tmp_path: Path) -> None:
    result = compiled()
    report = result.save_onnx(tmp_path / "m.onnx").file
    assert report is not None
    assert report.inputs == {"image": ["batch", 3, 6, 8], "mask": ["batch", 1, 6, 8]}
    assert list(report.outputs) == ["score", "maps_0", "maps_1"]
    assert report.outputs["maps_1"] == ["batch", 4, 6, 8]
    assert report.bytes == (tmp_path / "m.onnx").stat().st_size
    inputs = torch.randn(5, 3, 6, 8), torch.rand(5, 1, 6, 8)
    given, wanted = run(tmp_path / "m.onnx", *inputs), result.program.outputs(*inputs)
    for ours, theirs in zip(given, wanted, strict=True):
        assert np.abs(ours - theirs.numpy()).max() < 1e-6


def test_metadata_holds_the_pipeline_and_each_nodes_origin(tmp_path: Path) -> None:
    compiled(seed=7).save_onnx(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    assert {item.key: item.value for item in model.metadata_props} == {
        "fxcompile.pipeline": "fold-batchnorm(only=[], skip=[], max_error=none, min_saving=none)",
        "fxcompile.seed": "7",
    }
    origins = {node.op_type: {item.key: item.value for item in node.metadata_props} for node in model.graph.node}
    assert origins["Conv"] == {"fxcompile.origin": "conv, bn"}
    assert origins["Gemm"] == {"fxcompile.origin": "head"}
    assert all(list(origin) == ["fxcompile.origin"] for origin in origins.values())
    assert {"conv.weight", "head.weight"} <= {tensor.name for tensor in model.graph.initializer}
    assert model.producer_name == "fxcompile"
    assert "/" not in "".join(item.value for node in model.graph.node for item in node.metadata_props)


def test_the_same_inputs_give_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    code = f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path; from test_emission import compiled
        compiled("fold-batchnorm, eliminate-identity").save_onnx(Path(sys.argv[1]))
    """
    for index in range(2):
        environment = {**os.environ, "PYTHONHASHSEED": str(index)}
        subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path / f"{index}.onnx")], check=True,
                       env=environment)  # fmt: skip
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()


@pytest.mark.parametrize(
    ("dynamic", "image"),
    [("batch", ["batch", 3, 6, 8]), ("none", [2, 3, 6, 8]), ({"image": (2, 3), "mask": (2, 3)}, None)],
)
def test_dynamic_chooses_the_free_dimensions(tmp_path: Path, dynamic: Any, image: list[Any] | None) -> None:
    result = compiled()
    report = result.save_onnx(tmp_path / "m.onnx", dynamic=dynamic).file
    assert report is not None
    if image is not None:
        assert report.inputs["image"] == image
    else:
        assert [isinstance(size, str) for size in report.inputs["image"]] == [False, False, True, True]
        inputs = torch.randn(2, 3, 9, 7), torch.rand(2, 1, 9, 7)
        given, wanted = run(tmp_path / "m.onnx", *inputs), result.program.outputs(*inputs)
        assert np.abs(given[1] - wanted[1].numpy()).max() < 1e-6


@pytest.mark.parametrize("opset", [18, 20, 22])
def test_opset_is_honoured(tmp_path: Path, opset: int) -> None:
    report = compiled().save_onnx(tmp_path / "m.onnx", opset=opset).file
    assert report is not None
    assert report.opset == opset


def test_wrong_options_are_usage_errors(tmp_path: Path) -> None:
    result = compiled()
    for options, words in (
        ({"opset": 3}, "opset 3 is not supported"),
        ({"dynamic": {"imag": (0,)}}, "did you mean 'image'"),
        ({"dynamic": {"image": (9,)}}, "has 4 axes"),
        ({"dynamic": "sometimes"}, "give batch, none"),
    ):
        with pytest.raises(UsageError, match=words):
            result.save_onnx(tmp_path / "m.onnx", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_differs_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every simplification breaks the weights here, so no attempt verifies."""
    (tmp_path / "m.onnx").write_bytes(b"old")
    simplify = emission.simplify

    def breaking(*args: Any) -> onnxfile.OnnxFile:
        file = simplify(*args)
        for tensor in file.proto.graph.initializer:
            if tensor.name == "conv.weight":
                values = np.frombuffer(tensor.raw_data, np.float32).copy()
                values[0] += 0.01
                tensor.raw_data = values.tobytes()
        return file

    monkeypatch.setattr(emission, "simplify", breaking)
    with pytest.raises(EmitError, match="does not compute what the program does: 'score' differs"):
        compiled().save_onnx(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_weaker_simplification_steps_in_and_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simplify = emission.simplify

    def first_fails(model: Any, program: Any, options: Any) -> onnxfile.OnnxFile:
        if options == {}:
            raise EmitError("onnxsim cannot simplify")
        return simplify(model, program, options)

    monkeypatch.setattr(emission, "simplify", first_fails)
    record = compiled().save_onnx(tmp_path / "m.onnx")
    assert record.notes == ["a simplification by onnxsim did not verify; a weaker one was used"]


@pytest.mark.parametrize("limit", [10_000_000, 100])
def test_opaque_weights_and_external_data_give_the_same_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(simplifying, "OPAQUE_BYTES", 0)
    monkeypatch.setattr(simplifying, "SMALL_BYTES", 64)
    write = onnxfile.write_onnx
    monkeypatch.setattr(emission, "write_onnx", lambda file, path: write(file, path, limit=limit))
    path = tmp_path / "m.onnx"
    result = compiled()
    (tmp_path / "m.onnx.0123456789abcdef.data").write_bytes(b"stale")
    report = result.save_onnx(path).file
    assert report is not None
    files = sorted(item.name for item in tmp_path.iterdir())
    assert len(files) == (2 if limit == 100 else 1)
    assert "0123456789abcdef" not in "".join(files)
    assert report.bytes == sum(item.stat().st_size for item in tmp_path.iterdir())
    inputs = torch.randn(3, 3, 6, 8), torch.rand(3, 1, 6, 8)
    for ours, theirs in zip(run(path, *inputs), result.program.outputs(*inputs), strict=True):
        assert np.abs(ours - theirs.numpy()).max() < 1e-6
    assert "conv.weight" in {tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer}


def test_unwritable_outputs_are_refused_before_any_work(tmp_path: Path) -> None:
    result = compiled()
    with pytest.raises(WriteError, match="the folder does not exist; make it first"):
        result.save_onnx(tmp_path / "nowhere" / "m.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(WriteError, match="it is a folder"):
        result.save_onnx(tmp_path / "folder.onnx")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="it cannot be written: No space left on device; free space"):
        compiled().save_onnx(path)
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["m.onnx"]


def test_varints_and_appended_initializers_are_protobuf(tmp_path: Path) -> None:
    tensors = {f"w{size}": np.arange(size, dtype=np.float32) for size in (1, 31, 32, 33, 4096, 70_000)}
    model = onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(name="g"))
    file = onnxfile.OnnxFile(model, {name: ir.tensor(values, name=name) for name, values in tensors.items()})
    onnxfile.write_onnx(file, tmp_path / "m.onnx")
    loaded = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert loaded.keys() == tensors.keys()
    assert all(np.array_equal(loaded[name], values) for name, values in tensors.items())


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_a_convolution_without_bias_has_none_in_the_file(kind: Any, channels: int, tmp_path: Path) -> None:
    conv = kind(2, channels, 3, bias=False).eval()
    x = torch.randn(2, 2, *[4] * (conv.weight.dim() - 2))
    PassManager("").run(trace(conv, x)).save_onnx(tmp_path / "conv.onnx")
    (node,) = onnx.load(tmp_path / "conv.onnx").graph.node
    assert len(node.input) == 2
    (given,) = onnxruntime.InferenceSession(tmp_path / "conv.onnx").run(None, {"input": x.numpy()})
    assert (torch.from_numpy(given) - conv(x)).abs().max() <= 1e-5 * conv(x).abs().max()


def test_a_bias_of_zeros_stays_a_bias(tmp_path: Path) -> None:
    conv = nn.Conv2d(2, 4, 3).eval()
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    PassManager("").run(trace(conv, torch.randn(2, 2, 4, 4))).save_onnx(tmp_path / "conv.onnx")
    (node,) = onnx.load(tmp_path / "conv.onnx").graph.node
    assert len(node.input) == 3


def test_a_batch_that_inputs_share_is_free_in_all_of_them_or_in_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"image, mask share their batch.*; give --dynamic image=0,2 --dynamic mask=0"):
        compiled().save_onnx(tmp_path / "model.onnx", dynamic={"image": (0, 2)})
    assert not list(tmp_path.iterdir())


def test_what_onnx_runtime_refuses_is_refused_with_a_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, lean: bool = False) -> None:
        raise EmitError("ONNX Runtime does not load the emitted file: no such kernel")

    monkeypatch.setattr(emission, "open_session", refuse)
    with pytest.raises(EmitError, match="no such kernel; report it with the model, or try another --opset"):
        compiled().save_onnx(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
