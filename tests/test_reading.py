"""Model files that are read, and those that are refused: one sentence each, and no code of theirs runs."""

import contextlib
import json
import os
import pickle
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import (
    CODE,
    CONSTANTS,
    MARKER,
    MODEL,
    SAMPLES,
    WEIGHTS,
    Records,
    Touch,
    altered,
    both,
    edit,
    record,
    saved,
    truncated,
    zipped,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from fxcompile.errors import FxcompileError, ReadError, UsageError
from fxcompile.program_json import Refused, check_expression, check_operator
from fxcompile.reading import read_model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.k: Tensor
        self.register_buffer("k", torch.ones(2, 1, 1), persistent=False)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        return {"out": torch.relu(self.norm(self.conv(x))) * self.k * scale}


FACTORIES = """
import torch
from torch import nn
from collections import OrderedDict
class Small(nn.Sequential):
    def __init__(self):
        super().__init__(OrderedDict(conv=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2)))
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False); self.b = nn.Linear(3, 3, bias=False); self.b.weight = self.a.weight
def needs(width): return nn.Conv2d(1, width, 3)
def raises(): raise RuntimeError("no\\nsuch\\nwidth")
def leaves(): raise SystemExit(3)
def nothing(): return None
number = 3
"""


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported program with a free batch, a keyword input, a constant and a nested output."""
    path = tmp_path_factory.mktemp("good") / "net.pt2"
    free = {"x": {0: torch.export.Dim("b", min=2, max=9)}, "scale": None}
    example = (torch.randn(2, 1, 8, 8),), {"scale": torch.ones(1)}
    torch.export.save(torch.export.export(Net().eval(), *example, dynamic_shapes=free), str(path))
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test runs in a folder of its own, with modules for --model, and ends without a marker file in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("nets.py").write_text(FACTORIES)
    Path("broken.py").write_text("import torch\n1 / 0\n")
    Path("lacking.py").write_text("import surely_not_installed\n")
    Path("evil_module.py").write_text(CODE)
    yield tmp_path
    for name in ("nets", "broken", "lacking", "evil_module"):
        sys.modules.pop(name, None)


def refused(
    path: Path | str, kind: type[FxcompileError], words: str, factory: str | None = None, allow_pickle: bool = False
) -> str:
    """Reads, and checks that it is refused in one sentence with these words, and that no code ran."""
    with pytest.raises(FxcompileError) as caught:
        read_model(Path(path), factory=factory, allow_pickle=allow_pickle)
    sentence = str(caught.value)
    assert type(caught.value) is kind, sentence
    assert "\n" not in sentence
    assert len(sentence) < 600
    for word in words.split("|"):
        assert word in sentence
    assert not Path(MARKER).exists(), "the file's code ran"
    return sentence


def small() -> nn.Sequential:
    from collections import OrderedDict

    return nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2)))


# what is read


def test_exported_program_is_read_with_its_examples(good: Path) -> None:
    file = read_model(good)
    assert file.kind == "exported"
    assert file.exported is not None
    assert file.example_inputs is not None
    args, kwargs = file.example_inputs
    expected = torch.export.load(str(good)).module()(*args, **kwargs)
    assert torch.equal(file.exported.module()(*args, **kwargs)["out"], expected["out"])
    other = torch.randn(5, 1, 8, 8)
    assert file.exported.module()(other, **kwargs)["out"].shape == (5, 2, 6, 6)


def test_kind_is_found_by_content_not_by_extension(good: Path) -> None:
    Path("net.bin").write_bytes(good.read_bytes())
    assert read_model(Path("net.bin")).kind == "exported"


def test_where_layers_come_from_is_kept(good: Path) -> None:
    exported = read_model(good).exported
    assert exported is not None
    traces = [node.meta.get("stack_trace", "") for node in exported.graph.nodes if node.op == "call_function"]
    stacks = [node.meta.get("nn_module_stack", {}) for node in exported.graph.nodes if node.op == "call_function"]
    assert any("test_reading.py" in trace for trace in traces)
    assert any("conv" in str(stack) for stack in stacks)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model", "net", "ema", "odd_name"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_checkpoints_are_unwrapped(wrapper: str | None, prefix: str) -> None:
    model = small()
    state: Any = {prefix + key: value for key, value in model.state_dict().items()}
    Path("w.pt").write_bytes(
        saved(state if wrapper is None else {wrapper: state, "epoch": 3, "optimizer": {"lr": 1.0}})
    )
    module = read_model(Path("w.pt"), factory="nets:Small").module
    assert module is not None
    for key, value in model.state_dict().items():
        assert torch.equal(module.state_dict()[key], value)


def test_legacy_and_safetensors_files_are_read() -> None:
    model = small()
    Path("old.pth").write_bytes(saved(model.state_dict(), _use_new_zipfile_serialization=False))
    save_file(model.state_dict(), "w.safetensors")
    for name in ("old.pth", "w.safetensors"):
        module = read_model(Path(name), factory="nets:Small").module
        assert module is not None
        assert torch.equal(module.state_dict()["conv.weight"], model.state_dict()["conv.weight"])


def test_tied_weights_that_safetensors_keeps_once_are_read() -> None:
    save_file({"a.weight": torch.eye(3)}, "tied.safetensors")
    module = read_model(Path("tied.safetensors"), factory="nets:Tied").module
    assert module is not None
    assert torch.equal(module.b.weight, torch.eye(3))  # type: ignore[union-attr, arg-type]


def test_factories_in_files_and_packages_are_found(tmp_path: Path) -> None:
    Path("w.pt").write_bytes(saved(small().state_dict()))
    inner = tmp_path / "some folder"
    inner.mkdir()
    (inner / "helper.py").write_text("width = 2")
    (inner / "torch.py").write_text("from helper import width\nfrom torch import nn\n" + FACTORIES)
    module = read_model(Path("w.pt"), factory="some folder/torch.py:Small").module
    assert type(module).__name__ == "Small"
    assert sys.modules["torch"] is torch
    sys.modules.pop("helper")


def test_pickled_modules_are_read_where_they_are_allowed() -> None:
    Path("whole.pt").write_bytes(saved(small()))
    refused("whole.pt", ReadError, "--allow-pickle|any code")
    assert isinstance(read_model(Path("whole.pt"), allow_pickle=True).module, nn.Sequential)


# what is no model


WRONG_FILES: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "empty": (lambda: b"", "m.pt2", "empty"),
    "text": (lambda: b"hello, this is no model\n" * 9, "m.pt", "text file"),
    "json": (lambda: b'{"a": 1}', "m.pt2", "text file"),
    "png": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(99), "m.pt", "PNG image"),
    "jpeg": (lambda: b"\xff\xd8\xff\xe0" + bytes(99), "m.pth", "JPEG image"),
    "hdf5": (lambda: b"\x89HDF\r\n" + bytes(99), "m.h5", "HDF5"),
    "npy": (lambda: b"\x93NUMPY\x01\x00" + bytes(99), "m.npy", "NumPy"),
    "noise": (lambda: bytes(range(255, 0, -1)) * 9, "m.pt", "unknown kind"),
    "zeros": (lambda: bytes(4096), "m.pt2", "unknown kind"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(99), "m.pt.gz", "gzip"),
    "onnx by name": (lambda: b"anything", "m.onnx", "ONNX"),
    "onnx by content": (lambda: b"\x08\x08\x12\x07pytorch" + bytes(99), "m.pt", "ONNX"),
    "tflite": (lambda: b"\x1c\x00\x00\x00TFL3" + bytes(99), "m.tflite", "TensorFlow Lite"),
    "other zip": (lambda: zipped({"a.txt": b"hello"}), "m.pt2", "zip archive|without a PyTorch model"),
    "npz": (lambda: zipped({"x.npy": b"\x93NUMPY"}), "m.npz", "NumPy arrays"),
    "zip bomb": (
        lambda: zipped({"m/models/model.json": bytes(9_000_000)}, zipfile.ZIP_DEFLATED),
        "m.pt2",
        "compressed|zip bomb",
    ),
    "bomb of weights": (lambda: zipped({"m/data.pkl": bytes(9_000_000)}, zipfile.ZIP_DEFLATED), "m.pt", "zip bomb"),
    "truncated state dict": (lambda: truncated(saved(small().state_dict())), "m.pt", "truncated or damaged"),
    "truncated legacy": (
        lambda: truncated(saved(small().state_dict(), _use_new_zipfile_serialization=False)),
        "m.pt",
        "truncated",
    ),
    "truncated safetensors": (lambda: (900).to_bytes(8, "little") + b'{"a":', "m.safetensors", "truncated"),
    "damaged safetensors": (lambda: (5).to_bytes(8, "little") + b'{"a":' + bytes(9), "m.safetensors", "safetensors"),
    "plain pickle": (lambda: pickle.dumps([1, 2, 3], protocol=2), "m.pkl", "not from torch.save"),
    "no state": (lambda: saved([1, 2, 3]), "m.pt", "holds a list|state_dict()"),
    "tensor": (lambda: saved(torch.ones(3)), "m.pt", "holds a Tensor"),
    "empty state": (lambda: saved({}), "m.pt", "state dict is empty"),
    "hyperparameters": (lambda: saved({"lr": 0.1, "epoch": 3}), "m.pt", "no state dict|lr, epoch"),
    "two networks": (
        lambda: saved({"generator": small().state_dict(), "critic": small().state_dict()}),
        "m.pt",
        "several|generator, critic",
    ),
    "no factory": (lambda: saved(small().state_dict()), "m.pt", "state dict of 7 tensors|--model"),
    "old export": (lambda: zipped({"serialized_exported_program.json": b"{}", "version": b"8.1"}), "m.pt2", "before"),
    "archive without a program": (
        lambda: zipped({"m/archive_format": b"pt2", "m/archive_version": b"0"}),
        "m.pt2",
        "does not load",
    ),
    "pickled module": (lambda: saved(nn.Linear(2, 2)), "m.pt", "--allow-pickle|any code|Linear"),
    "malicious state dict": (lambda: saved({"conv.weight": Touch()}), "m.pt", "--allow-pickle|any code"),
    "malicious legacy": (
        lambda: saved({"a": Touch()}, _use_new_zipfile_serialization=False),
        "m.pth",
        "--allow-pickle|any code",
    ),
    "malicious plain pickle": (lambda: pickle.dumps(Touch(), protocol=2), "m.pkl", "it"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_other_files_are_refused(case: str) -> None:
    make, name, words = WRONG_FILES[case]
    Path(name).write_bytes(make())
    refused(name, ReadError, words)


def test_paths_that_are_no_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused("missing.pt2", ReadError, "no such file")
    Path("folder.pt2").mkdir()
    refused("folder.pt2", ReadError, "folder")
    os.mkfifo("pipe.pt2")
    refused("pipe.pt2", ReadError, "not a regular file")
    os.symlink("loop.pt2", "loop.pt2")
    refused("loop.pt2", ReadError, "cannot be opened")
    refused("nul\0byte", ReadError, "cannot be opened")
    Path("locked.pt2").write_bytes(b"PK")

    def deny(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fxcompile.filekinds.open", deny, raising=False)
    refused("locked.pt2", ReadError, "may not be read")


def test_torchscript_is_refused_without_loading_it() -> None:
    """torch.jit.load runs `__setstate__` of the archive, and TorchScript can write files."""
    torch.jit.save(torch.jit.trace(small().eval(), torch.zeros(1, 1, 8, 8)), "script.pt")
    refused("script.pt", ReadError, "TorchScript|torch.export.save")
    refused("script.pt", ReadError, "TorchScript", allow_pickle=True)


# weights that do not fit

WRONG_WEIGHTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Any]], str]] = {
    "missing": (lambda s: {k: v for k, v in s.items() if k != "conv.bias"}, "1 missing: conv.bias"),
    "unexpected": (lambda s: {**s, "head.weight": torch.ones(1)}, "1 unexpected: head.weight"),
    "mis-shaped": (lambda s: {**s, "conv.weight": torch.ones(2, 1, 5, 5)}, "conv.weight (2x1x5x5, wanted 2x1x3x3)"),
    "another network": (lambda s: {f"layer{i}.w": torch.ones(1) for i in range(50)}, "50 unexpected|and 47 more"),
    "NaN": (lambda s: {**s, "conv.bias": torch.tensor([1.0, torch.nan])}, "'conv.bias' has 1 NaN"),
    "infinite": (lambda s: {**s, "norm.running_var": torch.tensor([1.0, torch.inf])}, "'norm.running_var'"),
    "NaN in half": (
        lambda s: {k: (v * torch.nan).half() if k == "conv.bias" else v for k, v in s.items()},
        "conv.bias",
    ),
    "sparse": (lambda s: {**s, "conv.weight": torch.ones(2, 2).to_sparse()}, "sparse"),
    "no values": (lambda s: {**s, "conv.weight": torch.ones(2, 1, 3, 3, device="meta")}, "conv.weight"),
    "inflated": (lambda s: {**s, "conv.weight": torch.ones(1).expand(10**6, 10**6)}, "claims 1000000000000 values"),
    "no tensor": (lambda s: {**s, "conv.weight": "text"}, "conv.weight (str"),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(case: str) -> None:
    change, words = WRONG_WEIGHTS[case]
    Path("w.pt").write_bytes(saved(change(small().state_dict())))
    refused("w.pt", ReadError, words, factory="nets:Small")


WRONG_FACTORIES: dict[str, tuple[str, type[FxcompileError], str]] = {
    "no colon": ("nets", UsageError, "MODULE:FACTORY"),
    "empty": ("", UsageError, "MODULE:FACTORY"),
    "no name": ("nets:", UsageError, "MODULE:FACTORY"),
    "a call": ("nets:Small()", UsageError, "MODULE:FACTORY"),
    "code": (f"nets:{CODE}", UsageError, "MODULE:FACTORY"),
    "no module": ("surely_not_there:f", UsageError, "no module 'surely_not_there'"),
    "no file": ("nowhere/net.py:f", UsageError, "no file"),
    "misspelt": ("nets:Smal", UsageError, "no 'Smal'|Small"),
    "not callable": ("nets:number", UsageError, "of type int, no function"),
    "raises on import": ("broken:f", ReadError, "ZeroDivisionError"),
    "file raises on import": ("broken.py:f", ReadError, "ZeroDivisionError"),
    "lacks a package": ("lacking:f", ReadError, "surely_not_installed|install"),
    "raises": ("nets:raises", ReadError, "no such width"),
    "leaves": ("nets:leaves", ReadError, "SystemExit"),
    "needs arguments": ("nets:needs", ReadError, "without arguments"),
    "returns nothing": ("nets:nothing", ReadError, "returns a NoneType"),
}


@pytest.mark.parametrize("case", WRONG_FACTORIES)
def test_wrong_factories_are_refused(case: str) -> None:
    factory, kind, words = WRONG_FACTORIES[case]
    Path("w.pt").write_bytes(saved(small().state_dict()))
    refused("w.pt", kind, words, factory=factory)


def test_a_factory_goes_with_a_state_dict_only(good: Path) -> None:
    refused(good, UsageError, "leave --model out", factory="nets:Small")
    Path("whole.pt").write_bytes(saved(small()))
    refused("whole.pt", UsageError, "leave --model out", factory="nets:Small", allow_pickle=True)


# exported programs that would run code


def graph(data: Any) -> Any:
    return data["graph_module"]["graph"]


def node(data: Any, target: str) -> Any:
    return next(item for item in graph(data)["nodes"] if target in item["target"])


def call(data: Any) -> Any:
    return data["graph_module"]["module_call_graph"][0]["signature"]


def rename(old: str, new: str) -> Callable[[Any], None]:
    """Another name wherever a value of the program is named."""

    def apply(data: Any) -> None:
        text = json.dumps(data).replace(json.dumps(old), json.dumps(new))
        text = text.replace(json.dumps(json.dumps([old]))[1:-1], json.dumps(json.dumps([new]))[1:-1])
        data.clear()
        data.update(json.loads(text))

    return apply


def calls(target: str, *texts: str) -> Callable[[Any], None]:
    inputs = [{"name": "", "kind": 1, "arg": {"as_string": text}} for text in texts]
    return lambda data: node(data, "relu").update(target=target, inputs=inputs)


def tree(kind: str, context: Any) -> str:
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    return json.dumps([1, {"type": kind, "context": json.dumps(context), "children_spec": [leaf]}])


def size(expression: str) -> Callable[[Any], None]:
    value = {"as_expr": {"expr_str": expression, "hint": None}}
    return lambda data: graph(data)["tensor_values"]["x"]["sizes"].__setitem__(0, value)


ENUM = tree("builtins.dict", [{"__enum__": True, "fqn": "evil_module:X", "name": "y"}])
DEFAULT = tree(
    "collections.defaultdict",
    {"default_factory_module": "evil_module", "default_factory_name": "x", "dict_context": ["out"]},
)
PICKLED = {"use_pickle": True, "tensor_meta": None}

MALICIOUS: dict[str, tuple[Callable[[Records], object], str]] = {
    "example inputs": (record(SAMPLES, saved(((Touch(),), {}))), "pickled with more than tensors"),
    "legacy weights": (record("data/weights/model.pt", saved({"conv.weight": Touch()})), "more than tensors"),
    "legacy constants": (record("data/constants/model.pt", saved({"k": Touch()})), "more than tensors"),
    "pickled weight": (
        both(
            record("data/weights/weight_0", saved(Touch())),
            edit(WEIGHTS, lambda data: data["config"]["conv.weight"].update(use_pickle=True)),
        ),
        "pickled tensors",
    ),
    "pickled constant": (
        both(
            record("data/constants/tensor_0", saved(Touch())),
            edit(CONSTANTS, lambda data: data["config"]["k"].update(use_pickle=True)),
        ),
        "pickled tensors",
    ),
    "opaque object": (
        both(
            record("data/constants/opaque_obj_0", pickle.dumps(Touch())),
            edit(CONSTANTS, lambda data: data["config"]["k"].update(PICKLED, path_name="opaque_obj_0")),
        ),
        "pickled objects",
    ),
    "opaque object in disguise": (
        both(
            record("data/constants/tensor_0", pickle.dumps(Touch())),
            edit(CONSTANTS, lambda data: data["config"]["k"].update(path_name="opaque_obj_0")),
        ),
        "pickled object",
    ),
    "script object": (
        both(
            record("data/constants/custom_obj_0", pickle.dumps(Touch())),
            edit(CONSTANTS, lambda data: data["config"]["k"].update(PICKLED, path_name="custom_obj_0")),
        ),
        "pickled objects",
    ),
    "compiled library": (record("data/aotinductor/model/model.so", b"\x7fELF"), "native code"),
    "unknown record": (record("data/plugins/model.py", CODE.encode()), "none that fxcompile knows"),
    "size": (edit(MODEL, size(CODE)), "not plain arithmetic"),
    "size in a function": (edit(MODEL, size(f'Add("{CODE}")')), "not plain arithmetic"),
    "size by an attribute": (edit(MODEL, size("s0.__class__.__mro__")), "not plain arithmetic"),
    "size without end": (edit(MODEL, size("9**9**9")), "not plain arithmetic"),
    "keyword of the call": (edit(MODEL, rename("scale", f"scale={CODE}")), "could be code"),
    "name of an input": (edit(MODEL, rename("x", f"x,y={CODE}")), "could be code"),
    "name of a node": (edit(MODEL, rename("relu", f"relu=0;{CODE};relu")), "could be code"),
    "name of an argument": (
        edit(MODEL, lambda data: node(data, "relu")["inputs"][0].update(name=f"a={CODE},b")),
        "could be code",
    ),
    "name of a parameter": (
        both(*(edit(name, rename("conv.weight", f'conv.a")+{CODE}+("')) for name in (MODEL, WEIGHTS))),
        "could be code",
    ),
    "name in the signature": (
        edit(MODEL, lambda data: call(data).update(forward_arg_names=[f"x={CODE}", "scale"])),
        "could be code",
    ),
    "text in an input": (edit(MODEL, calls("torch.ops.aten.relu.default", f"'+{CODE}+'")), "could be code"),
    "enum": (edit(MODEL, lambda data: call(data).update(out_spec=ENUM)), "code to import"),
    "default factory": (edit(MODEL, lambda data: call(data).update(out_spec=DEFAULT)), "no plain container"),
    "registered class": (edit(MODEL, lambda data: call(data).update(out_spec=tree("some.Output", []))), "some.Output"),
    "function": (edit(MODEL, calls("torch.os.system", f"touch {MARKER}")), "no tensor operator"),
    "loader": (edit(MODEL, calls("torch.hub.load", "a", "b")), "no tensor operator"),
    "method": (edit(MODEL, calls("_operator.methodcaller", "touch")), "no tensor operator"),
    "extension": (edit(MODEL, calls("#namespace:operator")), "no tensor operator"),
    "operator that saves": (edit(MODEL, calls("torch.ops.aten.save.default", MARKER)), "no tensor operator"),
    "operator that maps files": (edit(MODEL, calls("torch.ops.aten.from_file.default", MARKER)), "no tensor operator"),
    "operator as an argument": (
        edit(MODEL, lambda data: node(data, "relu")["inputs"][0].update(arg={"as_operator": "torch.os.system"})),
        "no tensor operator",
    ),
    "unknown field": (edit(MODEL, lambda data: data.update(new_code="x")), "does not know"),
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_programs_that_would_run_code_are_refused(good: Path, case: str) -> None:
    change, words = MALICIOUS[case]
    refused(altered(good, change), ReadError, f"{words}|--allow-pickle")


def test_the_way_of_altering_archives_leaves_good_ones_good(good: Path) -> None:
    assert read_model(altered(good, edit(MODEL, lambda data: None))).kind == "exported"


@pytest.mark.parametrize("case", ["example inputs", "pickled constant", "opaque object", "size"])
def test_the_payloads_are_live(good: Path, case: str) -> None:
    """The same files run their code where pickles are allowed, so the refusals above refuse something."""
    path = altered(good, MALICIOUS[case][0])
    with contextlib.suppress(ReadError):
        read_model(path, allow_pickle=True)
    assert Path(MARKER).exists()


def test_guards_of_the_file_never_run(good: Path) -> None:
    path = altered(good, edit(MODEL, lambda data: data.update(guards_code=[f"{CODE} is None"])))
    file = read_model(path)
    assert file.exported is not None
    assert file.example_inputs is not None
    file.exported.module()(*file.example_inputs[0], **file.example_inputs[1])
    assert not Path(MARKER).exists()


def test_metadata_of_the_file_is_cut_to_what_is_read(good: Path) -> None:
    wanted = {"custom": json.dumps({"code": CODE}), "from_node": "[]", "nn_module_stack": f'"""{CODE}'}
    path = altered(good, edit(MODEL, lambda data: node(data, "relu")["metadata"].update(wanted)))
    exported = read_model(path).exported
    assert exported is not None
    assert not any("custom" in item.meta or "from_node" in item.meta for item in exported.graph.nodes)


DAMAGED: dict[str, tuple[Callable[[Records], object], str]] = {
    "no weights": (lambda records: records.pop("data/weights/weight_0"), "does not load"),
    "no configuration": (lambda records: records.pop(WEIGHTS), "does not load"),
    "no program": (lambda records: records.pop(MODEL), "0 exported programs"),
    "two programs": (lambda records: records.update({"models/b.json": records[MODEL]}), "2 exported programs"),
    "broken JSON": (record(MODEL, b'{"graph_module": '), "damaged"),
    "deep JSON": (record(MODEL, b"[" * 100_000), "damaged"),
    "JSON of another kind": (record(MODEL, b"[]"), "does not load"),
    "future schema": (edit(MODEL, lambda data: data["schema_version"].update(major=99)), "99"),
    "future archive": (record("archive_format", b"pt9"), "does not load"),
    "claimed size": (
        edit(WEIGHTS, lambda data: data["config"]["conv.weight"]["tensor_meta"].update(sizes=[{"as_int": 10**12}])),
        "claims 1000000000000 values",
    ),
    "out of bounds": (
        edit(WEIGHTS, lambda data: data["config"]["conv.weight"]["tensor_meta"].update(storage_offset={"as_int": 99})),
        "does not load",
    ),
    "weights without values": (record("data/weights/weight_0", b""), "holds 0 bytes"),
    "NaN": (record("data/weights/weight_1", np.array([1, np.nan], "f4").tobytes()), "'conv.bias' has 1 NaN"),
    "odd example inputs": (record(SAMPLES, saved({"x": torch.ones(1)})), "example inputs"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_programs_are_refused(good: Path, case: str) -> None:
    change, words = DAMAGED[case]
    refused(altered(good, change), ReadError, words)


def test_truncated_program_is_refused_at_any_length(good: Path) -> None:
    content = good.read_bytes()
    for length in range(1, len(content), len(content) // 13):
        Path("cut.pt2").write_bytes(content[:length])
        refused("cut.pt2", ReadError, "cut.pt2")


def test_two_records_of_one_name_are_refused(good: Path) -> None:
    path = Path("twice.pt2")
    path.write_bytes(good.read_bytes())
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.namelist()[0], b"other")
    refused(path, ReadError, "two entries")


def test_an_unknown_torch_is_refused_rather_than_trusted(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.export.pt2_archive._package._load_exported_programs")
    refused(good, ReadError, "does not know how torch")


def test_what_is_replaced_while_reading_is_put_back(good: Path) -> None:
    import sympy  # type: ignore[import-untyped]
    from torch._export.serde import serialize
    from torch.utils import _pytree

    def now() -> list[Any]:
        return [torch.load, pickle.loads, pickle.load, torch._C._pickle_load_obj, sympy.sympify,
                vars(_pytree)["importlib"], serialize.deserialize_torch_artifact]  # fmt: skip

    before = now()
    read_model(good)
    refused(altered(good, MALICIOUS["example inputs"][0]), ReadError, "more than tensors")
    assert all(a is b for a, b in zip(before, now(), strict=True))


def test_other_threads_unpickle_as_ever_while_one_reads(good: Path) -> None:
    errors: list[BaseException] = []
    done = threading.Event()

    def unpickle() -> None:
        try:
            while not done.is_set():
                assert pickle.loads(pickle.dumps({1, 2})) == {1, 2}
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=unpickle)]
    threads[0].start()
    try:
        read_model(good)
    finally:
        done.set()
        threads[0].join()
    assert not errors


@pytest.mark.parametrize(
    "text",
    [
        *(
            "s0",
            "2*s0 + 1",
            "s77//2",
            "Max(1, u0)",
            "FloorDiv(s0, 2) >= 3",
            "Symbol('s77', positive=True, integer=True)",
        ),
        "Pow(Symbol('s0', integer=True), Integer(2))",
    ],
)
def test_arithmetic_on_sizes_passes(text: str) -> None:
    check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        *("eval('1')", "open(s0)", "[s0]", "lambda: s0", "s0 if s0 else s0", "__import__('os')", "Symbol('s0; x')"),
        *("Add('s0')", "f's0'", "10**100", "Pow(2, s0)", "s0 # x", "", "("),
    ],
)
def test_other_expressions_do_not(text: str) -> None:
    with pytest.raises(Refused):
        check_expression(text)


@pytest.mark.parametrize(
    "target",
    [
        *("torch.ops.aten.conv2d.default", "_operator.getitem", "math.ceil", "torch.sym_max"),
        *("torch.ops.aten.sym_size.int", "torch.ops.higher_order.cond"),
    ],
)
def test_tensor_operators_pass(target: str) -> None:
    check_operator(target)


@pytest.mark.parametrize(
    "target",
    [
        *("torch.load", "torch.ops.load_library", "_operator.attrgetter", "math.__loader__.x", "builtins.eval", ""),
        *("torch.ops.aten.relu.default.__call__", "torch.ops.evil.op.default", "torch.sym_int.__globals__"),
        "torch.ops.aten._print.default",
    ],
)
def test_other_functions_do_not(target: str) -> None:
    with pytest.raises(Refused):
        check_operator(target)
