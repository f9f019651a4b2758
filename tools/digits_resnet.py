"""A ResNet-18 that reads the digits of tools/digits.py: trained once, on the same images, and then kept.

It lies as a state dict beside the digit network, in resnet18-KEY, where KEY changes with this file, with digits.py and
with the version of torch.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

import torch
from digits import accuracy, cache_root, held_out_fifth, read_digits, recipe_key, train
from torch import Tensor, nn

EPOCHS = 4
WIDTHS = (64, 128, 256, 512)
LOWEST_ACCURACY = 0.97


class Block(nn.Module):
    """ResNet's block of two 3x3 convolutions (He et al. 2016), the stride in the first."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]"""
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + shortcut)


class ResNet18(nn.Module):
    """[N, inputs, H, W] -> [N, classes]: eight blocks of 64 to 512 channels behind a 3x3 stem of stride 2.

    The stem is that for small images: none of ImageNet's 7x7 kernel and pooling. 11.2 million parameters.
    """

    def __init__(self, inputs: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, WIDTHS[0], 3, 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        blocks: list[nn.Module] = []
        channels = WIDTHS[0]
        for stage, width in enumerate(WIDTHS):
            blocks += [Block(channels, width, 2 if stage else 1), Block(width, width, 1)]
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> logits [N, classes]"""
        x = self.blocks(torch.relu(self.bn1(self.conv1(x))))
        out: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return out


def resnet_digits() -> ResNet18:
    """The trained network, in eval mode; trained first if it is not there."""
    key = hashlib.sha256(Path(__file__).read_bytes() + recipe_key().encode()).hexdigest()[:12]
    path = cache_root() / f"resnet18-{key}.pt"
    if not path.is_file():
        print(f"training a ResNet-18 on the digits, once (about five minutes): {path}", file=sys.stderr)
        images, labels = read_digits()
        held_out = held_out_fifth(labels)
        net = train(ResNet18, torch.from_numpy(images[~held_out]), torch.from_numpy(labels[~held_out]), EPOCHS)
        right = accuracy(net, torch.from_numpy(images[held_out]), torch.from_numpy(labels[held_out]))
        print(f"  {right:.1%} right on the {held_out.sum()} held-out images", file=sys.stderr)
        if right < LOWEST_ACCURACY:
            raise SystemExit(
                f"error: the ResNet-18 reached {right:.1%} on held-out images, below {LOWEST_ACCURACY:.0%}; the recipe "
                "in tools/digits_resnet.py does not suit this machine or this version of torch"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="resnet18-unfinished-", dir=path.parent) as unfinished:
            torch.save(net.state_dict(), Path(unfinished) / "made.pt")
            (Path(unfinished) / "made.pt").replace(path)
    model = ResNet18().eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model
