"""Bad inputs through the command: one sentence on stderr that says where and what mends it, and nothing else happens.

Nothing else: stdout stays empty, no file appears or changes, and no code of a file runs.
"""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import (
    CODE,
    CONSTANTS,
    MARKER,
    MODEL,
    SAMPLES,
    Touch,
    altered,
    edit,
    npy,
    npz,
    record,
    saved,
    truncated,
    zipped,
)
from PIL import Image
from safetensors.torch import save

from fxcompile.cli import main
from fxcompile.errors import FxcompileError

NETS = """
import os, sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, image):
        return self.head(torch.relu(self.norm(self.conv(image))).mean((2, 3)))

class Two(Net):
    def forward(self, image, mask):
        return super().forward(image * mask)

class Prints(Net):
    def forward(self, image):
        print("looking at", tuple(image.shape))
        return super().forward(image)

class Branches(Net):
    def forward(self, image):
        return super().forward(image) if image.sum() > 0 else super().forward(-image)

class Leaves(Net):
    def forward(self, image):
        sys.exit(0)

class Random(Net):
    def forward(self, image):
        return super().forward(image) + torch.rand(1)

def needs(width): return nn.Conv2d(3, width, 3)
def raises(): raise RuntimeError("no\\nsuch\\x1b[31mwidth")
def leaves(): raise SystemExit(0)
def nothing(): return None
def double(): return Net().double()
def moves():
    os.chdir("/")
    return Net()
number = 3
"""

sys.path.insert(0, "")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The content of the good files that every case starts from."""
    names: dict[str, object] = {}
    exec(NETS, names)
    torch.manual_seed(0)
    net = names["Net"]().eval()  # type: ignore[operator]
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(net, (torch.randn(2, 3, 8, 8),), dynamic_shapes={"image": {0: batch}})
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    return {
        "net.pt2": buffer.getvalue(),
        "weights.pt": saved(net.state_dict()),
        "weights.safetensors": save(net.state_dict()),
        "nets.py": NETS.encode(),
        "calibration.npz": npz(image=np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype("f4")),
    }


@pytest.fixture(autouse=True)
def folder(made: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each case has a folder of its own with the good files and an output of an earlier run in it."""
    monkeypatch.chdir(tmp_path)
    for name, content in made.items():
        Path(name).write_bytes(content)
    Path("old.onnx").write_bytes(b"old")
    yield tmp_path
    sys.modules.pop("nets", None)


def files() -> dict[str, bytes | str]:
    """Every path below the current folder, with its content."""
    paths = sorted(Path().rglob("*"))
    return {
        str(path): path.read_bytes() if path.is_file() and not path.is_symlink() else os.readlink(path)
        if path.is_symlink() else "" for path in paths if "__pycache__" not in path.parts
    }  # fmt: skip


def refused(capfd: pytest.CaptureFixture[str], args: list[str], code: int, words: str) -> str:
    """Run the command, and check that it refuses as it should; returns the sentence."""
    before = files()
    with pytest.raises(SystemExit) as caught:
        main(args)
    printed = capfd.readouterr()
    assert printed.out == ""
    sentence = printed.err.removesuffix("\n")
    assert sentence.startswith("fxcompile: ")
    assert "\n" not in sentence
    assert sentence.isprintable()
    assert len(sentence) < 600
    assert "Traceback" not in sentence
    assert "internal error" not in sentence
    for word in words.split("|"):
        assert word in sentence
    assert caught.value.code == code
    assert not Path(MARKER).exists(), "the file's code ran"
    assert files() == before
    return sentence


@dataclass(frozen=True)
class Case:
    """A call, and what its refusal says.

    Attributes:
        args: the arguments; where none is an output, `-o old.onnx` is added.
        words: pieces of the sentence, separated by |.
        code: 1 where the work failed, 2 where the call is wrong.
        make: makes the bad files.
    """

    args: str
    words: str
    code: int = 1
    make: Callable[[], object] = lambda: None

    def split(self) -> list[str]:
        args = self.args.split(" ") if self.args else []
        args = [arg.replace("~", " ") for arg in args]
        return args if {"-o", "show", "passes", "--help"} & set(args) else [*args, "-o", "old.onnx"]


def write(name: str, content: bytes | Callable[[], bytes]) -> Callable[[], object]:
    return lambda: Path(name).write_bytes(content if isinstance(content, bytes) else content())


def weights(change: Callable[[dict[str, torch.Tensor]], object], name: str = "w.pt") -> Callable[[], object]:
    """A state dict with something wrong in it."""

    def make() -> None:
        state: OrderedDict[str, torch.Tensor] = torch.load("weights.pt")
        change(state)
        torch.save(state, name)

    return make


def pt2(change: Callable[[dict[str, bytes]], object]) -> Callable[[], object]:
    return lambda: altered(Path("net.pt2"), change)


def legacy_tar() -> bytes:
    """What torch.save wrote before version 0.1.10: a tar archive of pickles."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Touch(), protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def lying_safetensors(offsets: str, shape: str = "[4]") -> bytes:
    header = f'{{"conv.bias":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}'
    return safetensors(header.encode(), bytes(16))


def picture(path: str, mode: str = "RGB") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8)).save(path)


def images(change: Callable[[], object] = lambda: None) -> Callable[[], object]:
    def make() -> None:
        picture("set/a.png")
        change()

    return make


STATE = "w.pt --model nets:Net --input-shape 1x3x8x8"
GOOD_STATE = "weights.pt --model nets:Net --input-shape 1x3x8x8"

MODELS: dict[str, Case] = {
    "missing file": Case("nowhere.pt2", "nowhere.pt2: there is no such file|check the path"),
    "no model": Case("-o old.onnx", "Missing argument 'MODEL'|--help", 2),
    "folder": Case("d.pt2", "d.pt2: it is a folder", make=lambda: Path("d.pt2").mkdir()),
    "pipe": Case("p.pt2", "p.pt2: it is not a regular file", make=lambda: os.mkfifo("p.pt2")),
    "device": Case("/dev/zero", "/dev/zero: it is not a regular file"),
    "loop of links": Case("l.pt2", "l.pt2: it cannot be opened", make=lambda: os.symlink("l.pt2", "l.pt2")),
    "long name": Case("n" * 300 + ".pt2", "it cannot be opened"),
    "empty file": Case("m.pt2", "m.pt2: the file is empty", make=write("m.pt2", b"")),
    "image": Case("set/a.png", "it is a PNG image, not a PyTorch model|give a .pt2", make=images()),
    "text": Case("nets.py", "it is a text file, not a PyTorch model"),
    "ONNX": Case("old.onnx -o new.onnx", "it is an ONNX file"),
    "output as input": Case("old.onnx", "'old.onnx' is an input too", 2),
    "zip": Case("m.zip", "it is a zip archive without a PyTorch model", make=write("m.zip", zipped({"a": b"b"}))),
    "arrays": Case("calibration.npz", "an archive of NumPy arrays without a PyTorch model"),
    "gzip": Case("m.pt.gz", "it is a gzip file", make=write("m.pt.gz", b"\x1f\x8b\x08" + bytes(99))),
    "noise": Case("m.pt", "m.pt: it is of an unknown kind", make=write("m.pt", bytes(range(255, 0, -1)))),
    "truncated pt2": Case("m.pt2", "truncated or damaged",
                          make=lambda: Path("m.pt2").write_bytes(truncated(Path("net.pt2").read_bytes()))),
    "truncated pt": Case("w.pt", "truncated or damaged",
                         make=lambda: Path("w.pt").write_bytes(truncated(Path("weights.pt").read_bytes()))),
    "misspelt operator": Case("m.pt2", "m.pt2: its graph calls 'torch.ops.aten.konv2d.default'", make=lambda: Path(
        "m.pt2").write_bytes(Path("net.pt2").read_bytes().replace(b"ops.aten.conv2d", b"ops.aten.konv2d"))),
    "zip bomb": Case("m.pt2", "zip bomb", make=write("m.pt2", lambda: zipped(
        {"m/models/model.json": bytes(9_000_000)}, zipfile.ZIP_DEFLATED))),
    "pickled state dict": Case("m.pt", "runs any code in them|--allow-pickle",
                               make=write("m.pt", lambda: saved({"conv.weight": Touch()}))),
    "pickled pth": Case("m.pth", "runs any code in them|--allow-pickle", make=write("m.pth", lambda: saved(
        {"a": Touch()}, _use_new_zipfile_serialization=False))),
    "bare pickle": Case("m.pt", "m.pt: it", make=write("m.pt", pickle.dumps(Touch(), protocol=2))),
    "old pickle protocol": Case("m.pt", "m.pt: it is", make=write("m.pt", pickle.dumps(Touch(), protocol=0))),
    "zip with data.pkl": Case("m.pt", "m.pt: it", make=write("m.pt", lambda: zipped(
        {"m/data.pkl": pickle.dumps(Touch(), protocol=2), "m/version": b"3\n", "m/byteorder": b"little"}))),
    "tar": Case("m.pt", "m.pt: it is a tar archive, not a PyTorch model", make=write("m.pt", legacy_tar)),
    "pickle in a pt2": Case("altered.pt2", "pickled with more than tensors|--allow-pickle",
                            make=pt2(record(SAMPLES, saved(((Touch(),), {}))))),
    "code in a pt2": Case("altered.pt2", "not plain arithmetic|--allow-pickle", make=pt2(edit(
        MODEL, lambda data: data["graph_module"]["graph"]["tensor_values"]["image"]["sizes"].__setitem__(
            0, {"as_expr": {"expr_str": CODE, "hint": None}})))),
    "function in a pt2": Case("altered.pt2", "no tensor operator", make=pt2(edit(
        MODEL, lambda data: data["graph_module"]["graph"]["nodes"][0].update(target="torch.os.system")))),
    "compiled library in a pt2": Case("altered.pt2", "native code",
                                      make=pt2(record("data/aotinductor/model/model.so", b"\x7fELF"))),
    "no constants in a pt2": Case("altered.pt2", "altered.pt2: ",
                                  make=pt2(lambda records: records.pop(CONSTANTS))),
    "no example inputs in a pt2": Case("altered.pt2", "altered.pt2: |sample_inputs",
                                       make=pt2(lambda records: records.pop(SAMPLES))),
    "short example inputs in a pt2": Case("altered.pt2", "altered.pt2: no tensor among the example inputs",
                                          make=pt2(record(SAMPLES, saved(((), {}))))),
    "wrong example inputs in a pt2": Case("altered.pt2", "altered.pt2: the model fails on|2x3x8x5", make=pt2(
        record(SAMPLES, saved(((torch.zeros(2, 3, 8, 5, dtype=torch.int64),), {}))))),
    "NaN in a pt2": Case("altered.pt2", "the tensor 'conv.weight' has 1 NaN", make=pt2(record(
        "data/weights/weight_0", np.where(np.arange(108) == 5, np.nan, 1).astype("f4").tobytes()))),
    "safetensors with a huge header": Case("w.safetensors", "truncated", make=write(
        "w.safetensors", (2**62).to_bytes(8, "little") + b"{}" + bytes(99))),
    "safetensors beyond its end": Case("w.safetensors --model nets:Net", "safetensors", make=write(
        "w.safetensors", lying_safetensors("[0,1600]", "[400]"))),
    "safetensors with other sizes": Case("w.safetensors --model nets:Net", "safetensors", make=write(
        "w.safetensors", lying_safetensors("[0,16]", "[4000000000,4000000000]"))),
    "safetensors backwards": Case("w.safetensors --model nets:Net", "safetensors", make=write(
        "w.safetensors", lying_safetensors("[16,0]"))),
    "safetensors of text": Case("w.safetensors --model nets:Net", "safetensors", make=write(
        "w.safetensors", safetensors(b'{"a": "not a tensor"}'))),
    "TorchScript": Case("m.pt", "TorchScript", make=write("m.pt", zipped(
        {"m/constants.pkl": b"", "m/data.pkl": b"", "m/code/x.py": b""}))),
    "old export": Case("m.pt2", "before torch 2.8|save it again", make=write("m.pt2", zipped(
        {"serialized_exported_program.json": b"{}", "version": b"8.1"}))),
    "state dict without architecture": Case("weights.pt", "state dict of 9 tensors|--model MODULE:FACTORY"),
    "no tensors": Case("m.pt", "m.pt: it has no state dict", make=write("m.pt", saved({"lr": 0.1}))),
    "a list": Case("m.pt", "m.pt: it holds a list", make=write("m.pt", saved([1, 2]))),
    "missing keys": Case(STATE, "1 missing: conv.bias", make=weights(lambda s: s.pop("conv.bias"))),
    "unexpected keys": Case(STATE, "1 unexpected: extra", make=weights(lambda s: s.update(extra=torch.ones(1)))),
    "key with escapes": Case(STATE, "1 unexpected: \\x1b[2Jextra",
                             make=weights(lambda s: s.update({"\x1b[2Jextra": torch.ones(1)}))),
    "other shape": Case(STATE, "conv.bias (5, wanted 4)",
                        make=weights(lambda s: s.update({"conv.bias": torch.ones(5)}))),
    "NaN weights": Case(STATE, "'conv.bias' has 4 NaN",
                        make=weights(lambda s: s.update({"conv.bias": torch.full((4,), torch.nan)}))),
    "infinite weights": Case(STATE, "'head.weight' has 8 NaN or infinite",
                             make=weights(lambda s: s.update({"head.weight": torch.full((2, 4), torch.inf)}))),
    "complex weights": Case(STATE, "1 of another dtype: conv.weight (complex64, wanted float32)", make=weights(
        lambda s: s.update({"conv.weight": s["conv.weight"].to(torch.complex64) * 1j}))),
    "integer weights": Case(STATE, "1 of another dtype: conv.weight (int64, wanted float32)", make=weights(
        lambda s: s.update({"conv.weight": torch.ones(4, 3, 3, 3, dtype=torch.int64)}))),
    "negative variance": Case(STATE, "nothing could be verified|NaN|negative variance", make=weights(
        lambda s: s.update({"norm.running_var": torch.full((4,), -1.0)}))),
    "sparse weights": Case(STATE, "sparse", make=weights(
        lambda s: s.update({"head.weight": torch.eye(4)[:2].to_sparse()}))),
    "inflated weights": Case(STATE, "claims", make=weights(
        lambda s: s.update({"head.weight": torch.zeros(1).expand(100_000, 100_000)}))),
}  # fmt: skip

FACTORIES: dict[str, Case] = {
    "no colon": Case("weights.pt --model nets", "not of the form MODULE:FACTORY", 2),
    "code": Case(f"weights.pt --model nets:{CODE}", "not of the form MODULE:FACTORY", 2),
    "no module": Case("weights.pt --model nettles:Net", "there is no module 'nettles'", 2),
    "no file": Case("weights.pt --model a/b.py:Net", "there is no file 'a/b.py'", 2),
    "misspelt": Case("weights.pt --model nets:Nett", "'nets' has no 'Nett'|Net", 2),
    "number": Case("weights.pt --model nets:number", "type int, no function or class", 2),
    "syntax error": Case("weights.pt --model bad.py:Net", "bad.py|SyntaxError", make=write("bad.py", b"def (")),
    "no text": Case("weights.pt --model bad.py:Net", "bad.py", make=write("bad.py", b"\xff\xfe\x00")),
    "raises": Case("weights.pt --model nets:raises", "raised RuntimeError: no such\\x1b[31mwidth"),
    "exits": Case("weights.pt --model nets:leaves", "raised SystemExit"),
    "needs arguments": Case("weights.pt --model nets:needs", "without arguments"),
    "returns nothing": Case("weights.pt --model nets:nothing", "returns a NoneType, not an nn.Module"),
    "another architecture": Case("weights.pt --model torch.nn:Identity", "9 unexpected: conv.weight, conv.bias"),
    "with a pt2": Case("net.pt2 --model nets:Net", "brings its own architecture; leave --model out", 2),
    "branches on values": Case("weights.pt --model nets:Branches --input-shape 1x3x8x8",
                               "nets.py:27: |branches|torch.where"),
    "draws random numbers": Case("weights.pt --model nets:Random --input-shape 1x3x8x8", "nets.py:|random"),
    "exits in forward": Case("weights.pt --model nets:Leaves --input-shape 1x3x8x8",
                             "nets.py:31: the model's code ends the process"),
}  # fmt: skip

SHAPES: dict[str, Case] = {
    "none": Case("weights.pt --model nets:Net", "--input-shape 1x3x224x224", 2),
    "malformed": Case("weights.pt --model nets:Net --input-shape 1*3*8*8", "--input-shape 1*3*8*8 does not parse", 2),
    "negative": Case("weights.pt --model nets:Net --input-shape=-1x3x8x8", "does not parse", 2),
    "zero": Case("weights.pt --model nets:Net --input-shape 1x3x0x8", "has an axis of size 0", 2),
    "huge": Case("weights.pt --model nets:Net --input-shape 1x3x9999999x9999999", "would not fit in memory", 2),
    "endless": Case(f"weights.pt --model nets:Net --input-shape 1x{'9' * 5000}", "does not parse", 2),
    "other digits": Case("weights.pt --model nets:Net --input-shape 1x3x\uff18x\uff18", "does not parse", 2),
    "no dtype": Case("weights.pt --model nets:Net --input-shape 1x3x8x8:flaot32", "did you mean 'float32'?", 2),
    "wrong dtype": Case("weights.pt --model nets:Net --input-shape 1x3x8x8:int64", "nets.py:"),
    "other float": Case("weights.pt --model nets:double --input-shape 1x3x8x8:float32", "nets.py:"),
    "unknown name": Case("weights.pt --model nets:Net --input-shape imag=1x3x8x8", "did you mean 'image'?", 2),
    "name twice": Case("weights.pt --model nets:Net --input-shape image=1x3x8x8 --input-shape image=1x3x8x8",
                       "names 'image' twice", 2),
    "unnamed after named": Case("weights.pt --model nets:Two --input-shape image=1x3x8x8 --input-shape 1x1x8x8",
                                "name all of them", 2),
    "too few": Case("weights.pt --model nets:Two --input-shape 1x3x8x8", "mask"),
    "too many": Case("weights.pt --model nets:Net --input-shape 1x3x8x8 --input-shape 1", "positional"),
    "wrong channels": Case("weights.pt --model nets:Net --input-shape 1x4x8x8", "nets.py:|channels"),
    "too small": Case("weights.pt --model nets:Net --input-shape 1x3x2x2", "nets.py:|Kernel size"),
    "with a pt2": Case("net.pt2 --input-shape 1x3x8x8", "leave --input-shape out", 2),
}  # fmt: skip

CALIBRATIONS: dict[str, Case] = {
    "missing": Case("net.pt2 --calibration nowhere.npz", "nowhere.npz: there is no such file"),
    "empty": Case("net.pt2 --calibration c.npz", "c.npz: the file is empty", make=write("c.npz", b"")),
    "text": Case("net.pt2 --calibration nets.py", "nets.py: '.py' is no kind of calibration file"),
    "model": Case("net.pt2 --calibration net.pt2", "'.pt2' is no kind of calibration file"),
    "truncated": Case("net.pt2 --calibration c.npz", "c.npz: it is truncated or damaged", make=lambda: Path(
        "c.npz").write_bytes(truncated(Path("calibration.npz").read_bytes()))),
    "npy of objects": Case("net.pt2 --calibration c.npy", "pickled objects", make=write(
        "c.npy", lambda: npy(np.array([Touch()], dtype=object), allow_pickle=True))),
    "npz with a pickle": Case("net.pt2 --calibration c.npz", "pickled objects", make=write(
        "c.npz", lambda: npz(image=np.array([Touch()], dtype=object)))),
    "npz with a bare pickle": Case("net.pt2 --calibration c.npz", "c.npz: an array of |S|save numbers", make=write(
        "c.npz", zipped({"image.npy": pickle.dumps(Touch())}))),
    "pickle for npz": Case("net.pt2 --calibration c.npz", "c.npz: it", make=write("c.npz", pickle.dumps(Touch()))),
    "pickled pt": Case("net.pt2 --calibration c.pt", "pickled objects", make=write("c.pt", lambda: saved([Touch()]))),
    "no samples": Case("net.pt2 --calibration c.npy", "has no samples|give at least one",
                       make=write("c.npy", npy(np.zeros((0, 3, 8, 8), "f4")))),
    "wrong channels": Case("net.pt2 --calibration c.npy", "5x4x8x8 and Nx3x8x8 is wanted",
                           make=write("c.npy", npy(np.zeros((5, 4, 8, 8), "f4")))),
    "channels last": Case("net.pt2 --calibration c.npy", "its channels come last|transpose",
                          make=write("c.npy", npy(np.zeros((5, 8, 8, 3), "f4")))),
    "bytes": Case("net.pt2 --calibration c.npy", "uint8 and the input float32|normalise",
                  make=write("c.npy", npy(np.zeros((5, 3, 8, 8), "u1")))),
    "NaN": Case("net.pt2 --calibration c.npy", "hold NaN or infinity",
                make=write("c.npy", npy(np.full((5, 3, 8, 8), np.nan, "f4")))),
    "infinity": Case("net.pt2 --calibration c.npy", "hold NaN or infinity",
                     make=write("c.npy", npy(np.full((5, 3, 8, 8), np.inf, "f4")))),
    "no arrays": Case("net.pt2 --calibration c.npz", "holds no arrays", make=write("c.npz", npz())),
    "no images": Case("net.pt2 --calibration set", "there are no images", make=lambda: Path("set").mkdir()),
    "only hidden images": Case("net.pt2 --calibration set", "there are no images",
                               make=lambda: picture("set/.cache/a.png")),
    "unreadable image": Case("net.pt2 --calibration set", "set/b.png: it is no image", make=images(
        write("set/b.png", b"hello"))),
    "truncated image": Case("net.pt2 --calibration set", "set/b.jpg: it is no image", make=images(
        lambda: Path("set/b.jpg").write_bytes(truncated(Path("set/a.png").read_bytes())))),
    "32-bit image": Case("net.pt2 --calibration set", "set/b.tif: its pixels are 32-bit", make=images(
        lambda: picture("set/b.tif", "F"))),
    "mean of two": Case("net.pt2 --calibration set --image-mean 0.5,0.5", "2 values for 3 channels", make=images()),
    "mean of words": Case("net.pt2 --calibration set --image-mean a,b,c", "a,b,c is no list of numbers", 2, images()),
    "mean of NaN": Case("net.pt2 --calibration set --image-mean nan,0,0", "is not finite", 2, images()),
    "deviation of zero": Case("net.pt2 --calibration set --image-std 1,0,1", "must be positive", 2, images()),
    "mean without calibration": Case("net.pt2 --image-mean 0.5,0.5,0.5", "give one with --calibration", 2),
    "mean with arrays": Case("net.pt2 --calibration calibration.npz --image-mean 0,0,0", "for a folder of images", 2),
    "calibration for another model": Case(f"{GOOD_STATE} --calibration c.npz", "no array for input 'image'",
                                          make=write("c.npz", npz(a=np.zeros((2, 5)), b=np.zeros((2, 6))))),
}  # fmt: skip

PASSES: dict[str, Case] = {
    "unknown pass": Case("net.pt2 --passes fold-batchnrom", "column 1|did you mean 'fold-batchnorm'?", 2),
    "unlike any": Case("net.pt2 --passes zzz", "eliminate-identity|fold-batchnorm", 2),
    "unknown option": Case("net.pt2 --passes stack-kernels(rnak=0.5)", "column 15|did you mean 'rank'?", 2),
    "option of another kind": Case("net.pt2 --passes stack-kernels(rank=big)", "column 15|cannot be big|a number", 2),
    "out of bounds": Case("net.pt2 --passes stack-kernels(rank=-1)", "cannot be -1|above 0", 2),
    "no choice": Case("net.pt2 --passes stack-kernels(activation=gelu)", "one of none, relu", 2),
    "list": Case("net.pt2 --passes stack-kernels(rank=[0.5])", "cannot be [0.5]", 2),
    "option twice": Case("net.pt2 --passes stack-kernels(rank=1,rank=2)", "given twice", 2),
    "open bracket": Case("net.pt2 --passes stack-kernels(rank=1", "column 21|the end", 2),
    "closing bracket": Case("net.pt2 --passes fold-batchnorm)", "column 15|')'", 2),
    "no comma": Case("net.pt2 --passes fold-batchnorm~eliminate-identity", "column 16|','", 2),
    "two commas": Case("net.pt2 --passes fold-batchnorm,,eliminate-identity", "column 16|a pass's name", 2),
    "no value": Case("net.pt2 --passes stack-kernels(rank=)", "column 20|a value", 2),
    "no name": Case("net.pt2 --passes stack-kernels(=3)", "column 15|an option's name", 2),
    "open quote": Case('net.pt2 --passes stack-kernels(only="a)', "never closed|close it", 2),
    "code": Case(f"net.pt2 --passes stack-kernels(rank={CODE})", "column", 2),
    "passes twice": Case("net.pt2 --passes fold-batchnorm --passes stack-kernels", "more than once", 2),
    "missing file": Case("net.pt2 --passes @nowhere.txt", "nowhere.txt: there is no such file", 2),
    "no file": Case("net.pt2 --passes @", "names no file", 2),
    "folder": Case("net.pt2 --passes @d", "d: it is a folder", 2, lambda: Path("d").mkdir()),
    "endless file": Case("net.pt2 --passes @/dev/zero", "not a regular file", 2),
    "binary file": Case("net.pt2 --passes @p", "p: it is no text", 2, write("p", b"\xff\xfe\xfa")),
    "wrong line of a file": Case("net.pt2 --passes @p", "p, line 2, column 3|did you mean", 2,
                                 write("p", b"fold-batchnorm,\n  stack-kernel\n")),
    "pass of passes": Case("passes stack-kernel", "did you mean 'stack-kernels'?", 2),
}  # fmt: skip

OUTPUTS: dict[str, Case] = {
    "none": Case("net.pt2 -o", "requires an argument", 2),
    "other suffix": Case("net.pt2 -o net.pb", "is no .onnx file|OUT.onnx", 2),
    "missing folder": Case("net.pt2 -o a/b.onnx", "a: the folder does not exist; make it first"),
    "file as folder": Case("net.pt2 -o nets.py/b.onnx", "nets.py: the folder does not exist"),
    "folder": Case("net.pt2 -o d.onnx", "d.onnx: it is a folder", make=lambda: Path("d.onnx").mkdir()),
    "device": Case("net.pt2 -o full.onnx", "full.onnx: it is a device",
                   make=lambda: os.symlink("/dev/full", "full.onnx")),
    "pipe": Case("net.pt2 -o p.onnx", "p.onnx: it is a device or a pipe", make=lambda: os.mkfifo("p.onnx")),
    "long name": Case(f"net.pt2 -o {'n' * 300}.onnx", "File name too long"),
    "loop of links": Case("net.pt2 -o l.onnx", "levels of symbolic links",
                          make=lambda: os.symlink("l.onnx", "l.onnx")),
    "report to a device": Case("net.pt2 --report /dev/null", "/dev/null: it is a device"),
    "report in a missing folder": Case("net.pt2 --report a/r.json", "a: the folder does not exist"),
    "report over the model": Case("net.pt2 --report net.pt2", "'net.pt2' is an input too", 2),
    "report over the calibration": Case("net.pt2 --calibration calibration.npz --report calibration.npz",
                                        "is an input too", 2),
    "report over the pipeline": Case("net.pt2 --passes @p --report p", "'p' is an input too", 2, write("p", b"")),
    "report over the output": Case("net.pt2 --report ./d/../old.onnx", "name the same file", 2,
                                   lambda: Path("d").mkdir()),
    "output over the model": Case("net.onnx", "'old.onnx' is an input too", 2,
                                  lambda: (os.link("net.pt2", "net.onnx"), os.remove("old.onnx"),
                                           os.link("net.onnx", "old.onnx"))),
    "dumps in a file": Case("net.pt2 --dump-dir nets.py", "'nets.py' is a file"),
    "dumps below a file": Case("net.pt2 --dump-dir nets.py/a/b", "is a file|give a folder's name"),
}  # fmt: skip

FLAGS: dict[str, Case] = {
    "unknown flag": Case("net.pt2 --pases fold-batchnorm", "there is no option --pases; did you mean '--passes'?", 2),
    "unknown command": Case("shwo net.pt2", "did you mean 'show'?", 2),
    "two models": Case("net.pt2 net.pt2", "unexpected extra argument", 2),
    "no output": Case("show", "Missing argument 'MODEL'", 2),
    "verify": Case("net.pt2 --verify maybe", "'maybe' is not one of 'raise', 'rollback', 'off'", 2),
    "examples": Case("net.pt2 --verify-examples 0", "not in the range", 2),
    "examples for nothing": Case("net.pt2 --verify off --verify-examples 5", "leave --verify-examples out", 2),
    "seed": Case("net.pt2 --seed one", "'one' is not a valid integer", 2),
    "negative seed": Case("net.pt2 --seed -1", "not in the range", 2),
    "opset of the past": Case("net.pt2 --opset 9", "opset 9 is not supported; choose 18 to 24", 2),
    "opset of the future": Case("net.pt2 --opset 99", "opset 99 is not supported", 2),
    "opset of words": Case("net.pt2 --opset latest", "not a valid integer", 2),
    "dynamic": Case("net.pt2 --dynamic sometimes", "--dynamic sometimes does not parse|NAME=AXIS", 2),
    "dynamic axes of words": Case("net.pt2 --dynamic image=height", "does not parse", 2),
    "dynamic input": Case("net.pt2 --dynamic imag=0", "did you mean 'image'?", 2),
    "dynamic axis": Case("net.pt2 --dynamic image=0,4", "has 4 axes|count from 0", 2),
    "dynamic twice": Case("net.pt2 --dynamic batch --dynamic none", "goes with no other --dynamic", 2),
    "dynamic input twice": Case("net.pt2 --dynamic image=0 --dynamic image=2", "names 'image' twice", 2),
}  # fmt: skip

CASES = {
    f"{group}: {name}": case
    for group, cases in (
        ("model", MODELS), ("factory", FACTORIES), ("shape", SHAPES), ("calibration", CALIBRATIONS),
        ("passes", PASSES), ("output", OUTPUTS), ("flag", FLAGS),
    )
    for name, case in cases.items()
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_inputs_are_refused_in_one_sentence(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    case.make()
    refused(capfd, case.split(), case.code, case.words)


IN_A_PROCESS = ("model: truncated pt2", "model: pickled state dict", "factory: raises", "passes: unknown pass",
                "output: missing folder", "flag: unknown command")  # fmt: skip


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_a_process_says_and_returns_the_same(name: str) -> None:
    case = CASES[name]
    case.make()
    before = files()
    command = [sys.executable, "-c", "from fxcompile.cli import main; main()", *case.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (case.code, "")
    assert done.stderr.startswith("fxcompile: ")
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in case.words.split("|"))
    assert files() == before


DAMAGED = {
    "net.pt2": ["net.pt2"],
    "weights.pt": ["weights.pt", "--model", "nets:Net", "--input-shape", "1x3x8x8"],
    "weights.safetensors": ["weights.safetensors", "--model", "nets:Net", "--input-shape", "1x3x8x8"],
    "calibration.npz": ["net.pt2", "--calibration", "calibration.npz"],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_files_damaged_at_random_are_refused_or_read_but_never_break_it(
    name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte changed, lost or added, most often near the start, where headers are."""
    made = Path(name).read_bytes()
    random = np.random.default_rng(0)
    monkeypatch.setattr("fxcompile.manager.PassManager.run", unreached)
    refusals = 0
    for _ in range(30):
        damaged = bytearray(made)
        place = int(random.integers(400 if random.random() < 0.6 else len(made)))
        how = random.integers(3)
        damaged[place : place + int(how < 2)] = bytes(random.integers(256, size=int(how > 0)).astype("u1"))
        Path(name).write_bytes(damaged)
        with pytest.raises(SystemExit) as left:
            main([*DAMAGED[name], "-o", "old.onnx"])
        printed = capfd.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert "internal error" not in printed.err
        refusals += "could be read" not in printed.err
        assert left.value.code == 1
    assert refusals > 10
    assert not Path(MARKER).exists()
    assert Path("old.onnx").read_bytes() == b"old"


def unreached(*_: object, **__: object) -> None:
    """In place of the work that a file brings which is still good."""
    raise FxcompileError("it could be read")
