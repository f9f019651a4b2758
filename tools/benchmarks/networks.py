"""The networks that are measured."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 8
"""Channels of the long networks: few, so that what the compiler does outweighs what the network computes."""


class Residual(nn.Module):
    """x + batch norm(conv(relu(batch norm(conv(x))))): five layers and an add."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(WIDTH, WIDTH, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class Branches(nn.Module):
    """x + cat(1x1 branch, 3x3 branch), a dropout at the end: six layers, a concat and an add."""

    def __init__(self) -> None:
        super().__init__()
        half = WIDTH // 2
        self.conv1, self.bn1 = nn.Conv2d(WIDTH, half, 1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(WIDTH, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.bn1(self.conv1(x)), self.bn2(self.conv2(x))], 1)
        return x + self.dropout(self.relu(joined))


def long_network(layers: int) -> nn.Module:
    """A chain of blocks with that many convolutions, batch norms, activations and dropouts (at most six more).

    Every third block is of branches, every tenth has a 5x5 kernel.
    """
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    made = 0
    while made < layers:
        blocks.append(Branches() if len(blocks) % 3 == 2 else Residual(5 if len(blocks) % 10 == 0 else 3))
        made += sum(1 for module in blocks[-1].modules() if not any(True for _ in module.children()))
    model = nn.Sequential(*blocks)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
        nn.init.normal_(norm.weight, 0.3, 0.05)  # small branches keep thousands of additions in range
        nn.init.normal_(norm.bias, 0, 0.1)
    return model.eval()


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the width, added to the input (He et al. 2015)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != 4 * width:
            shortcut = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet152(nn.Module):
    """ResNet-152 for 1,000 classes as torchvision has it: 60,192,808 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages: list[nn.Module] = []
        channels = 64
        for width, count, stride in ((64, 3, 1), (128, 8, 2), (256, 36, 2), (512, 3, 2)):
            blocks = [Bottleneck(channels if i == 0 else 4 * width, width, stride if i == 0 else 1) for i in range(count)]
            stages.append(nn.Sequential(*blocks))
            channels = 4 * width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, image: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet152() -> nn.Module:
    """A ResNet-152 with random weights, its batch norms' statistics those of random images."""
    torch.manual_seed(0)
    model = ResNet152()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    for norm in norms:
        norm.momentum = None  # averages all batches
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 224, 224))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()
