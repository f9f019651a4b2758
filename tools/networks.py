"""Networks for tools/bench: of any number of layers in several shapes, and ResNet.

Their weights keep values and rounding errors the size they were, however deep the network: a convolution is close to
the identity ("delta" initialisation, Xiao et al. 2018), for a random one would amplify rounding in every layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

CHANNELS = 8
SIZE = 8
"""Side of the square map, all along the network."""

LARGE_EVERY = 8
"""Every so many convolutions, one has a 5x5 kernel."""

NO_OP_EVERY = 4
"""Every so many units there is a layer that computes nothing: dropout, identity, or another ReLU."""


class Maker:
    """Makes layers with near-identity weights from one seed, and counts them.

    Args:
        depth: how many layers the network will have; noise on the weights falls with its root.
    """

    def __init__(self, depth: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.noise = 1 / math.sqrt(max(depth, 1))
        self.made = 0
        self.convolutions = 0
        self.no_ops = 0

    def conv(self, inputs: int, outputs: int, kernel: int | None = None) -> nn.Conv2d:
        """A convolution at the resolution of its input, 3x3 and now and then 5x5 unless a kernel is given."""
        self.made += 1
        self.convolutions += kernel is None
        if kernel is None:
            kernel = 5 if self.convolutions % LARGE_EVERY == 1 else 3
        layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        with torch.no_grad():
            noise = torch.randn(layer.weight.shape, generator=self.generator)
            layer.weight.copy_(noise * (self.noise / math.sqrt(inputs * kernel**2)))
            for channel in range(outputs):
                layer.weight[channel, channel % inputs, kernel // 2, kernel // 2] += 1.0
        return layer

    def norm(self, features: int, scale: float = 1.0) -> nn.BatchNorm2d:
        """A batch norm with statistics as if it had been trained."""
        self.made += 1
        layer = nn.BatchNorm2d(features)
        with torch.no_grad():
            for tensor, centre in ((layer.weight, scale), (layer.bias, 0.0), (layer.running_mean, 0.0),
                                   (layer.running_var, 1.0)):  # fmt: skip
                assert tensor is not None
                tensor.copy_(centre + self.noise * torch.rand(features, generator=self.generator))
        return layer

    def relu(self) -> nn.ReLU:
        self.made += 1
        return nn.ReLU()

    def no_op(self) -> nn.Module:
        """A layer after a ReLU that computes nothing, another kind each time."""
        self.made += 1
        self.no_ops += 1
        return (nn.Dropout(0.1), nn.ReLU(), nn.Identity())[self.no_ops % 3]


class Residual(nn.Module):
    """x -> relu(x + body(x))"""

    def __init__(self, body: nn.Module, relu: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]"""
        out: Tensor = self.relu(x + self.body(x))
        return out


class Dense(nn.Module):
    """Each branch sees what all branches before it gave; `close` mixes that down again (Huang et al. 2017)."""

    def __init__(self, branches: list[nn.Module], close: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.close = close

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]"""
        found = [x]
        for branch in self.branches:
            found.append(branch(torch.cat(found, 1)))
        out: Tensor = self.close(torch.cat(found, 1))
        return out


def _chain_unit(make: Maker) -> nn.Module:
    return nn.Sequential(make.conv(CHANNELS, CHANNELS), make.norm(CHANNELS), make.relu())


def _residual_unit(make: Maker) -> nn.Module:
    body = nn.Sequential(make.conv(CHANNELS, CHANNELS), make.norm(CHANNELS), make.relu(),
                         make.conv(CHANNELS, CHANNELS), make.norm(CHANNELS, make.noise))  # fmt: skip
    return Residual(body, make.relu())


BRANCHES = 4
GROWTH = 4


def _dense_unit(make: Maker) -> nn.Module:
    branches: list[nn.Module] = []
    width = CHANNELS
    for _ in range(BRANCHES):
        branches.append(
            nn.Sequential(
                make.norm(width),
                make.relu(),
                make.conv(width, CHANNELS, 1),
                make.norm(CHANNELS),
                make.relu(),
                make.conv(CHANNELS, GROWTH),
            )
        )
        width += GROWTH
    return Dense(branches, nn.Sequential(make.conv(width, CHANNELS, 1), make.norm(CHANNELS), make.relu()))


UNITS: dict[str, Callable[[Maker], nn.Module]] = {
    "chain": _chain_unit,
    "residual": _residual_unit,
    "dense": _dense_unit,
}
"""The shapes: what is repeated in each, some 3 to 27 layers that the graph's width does not grow with."""


def network(shape: str, layers: int, seed: int = 0) -> nn.Module:
    """A network [N, 3, SIZE, SIZE] -> [N, 10] of exactly so many layers (leaf modules), in eval mode.

    A convolution and a ReLU, units of the shape with a no-op now and then, no-ops up to the number, a linear layer.
    """
    make = Maker(layers, seed)
    parts: list[nn.Module] = [make.conv(3, CHANNELS, 3), make.relu()]
    room = layers - 3  # but for the pool, the flattening and the linear layer
    units = 0
    while True:
        before = make.made
        unit = UNITS[shape](make)
        if make.made > room:
            make.made = before
            break
        parts.append(unit)
        units += 1
        if units % NO_OP_EVERY == 0 and make.made < room:
            parts.append(make.no_op())
    while make.made < room:
        parts.append(make.no_op())
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10)).eval()


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions, 1x1, 3x3, 1x1 (He et al. 2016), the stride in the 3x3."""

    EXPANSION = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.EXPANSION
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, 4 * width, H / stride, W / stride]"""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out + shortcut)
        return result


class ResNet(nn.Module):
    """[N, 3, H, W] -> [N, 1000]; `ResNet((3, 8, 36, 3))` is ResNet-152, 60.2 million parameters.

    Batch norms get statistics as a trained network has them, and the last one of a block a small scale: a random
    network's values would grow with every block.
    """

    def __init__(self, blocks: tuple[int, ...], width: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels = width
        stages: list[nn.Module] = []
        for stage, count in enumerate(blocks):
            inner = width * 2**stage
            layers: list[nn.Module] = []
            for index in range(count):
                layers.append(Bottleneck(channels, inner, 2 if stage and not index else 1))
                channels = inner * Bottleneck.EXPANSION
            stages.append(nn.Sequential(*layers))
        self.layers = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, 1000)
        self._initialise(torch.Generator().manual_seed(seed))
        self.eval()

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        for name, layer in self.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, generator=generator)
            elif isinstance(layer, nn.BatchNorm2d):
                scale = 0.2 if name.endswith("bn3") else 1.0
                for tensor, low, high in ((layer.weight, 0.8 * scale, 1.2 * scale), (layer.bias, -0.1, 0.1),
                                          (layer.running_mean, -0.1, 0.1), (layer.running_var, 0.8, 1.2)):  # fmt: skip
                    assert tensor is not None
                    tensor.uniform_(low, high, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 1000]"""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layers(x))
        out: Tensor = self.fc(torch.flatten(x, 1))
        return out


def resnet152() -> nn.Module:
    """ResNet-152, as `fxcompile --model` calls it."""
    return ResNet((3, 8, 36, 3))


def single(channels: int, kernel: int) -> nn.Module:
    """One convolution that keeps its channels and the size of the map."""
    return nn.Sequential(Maker(1).conv(channels, channels, kernel))


def features(count: int, channels: int, size: int, seed: int = 0) -> Tensor:
    """Maps [count, channels, size, size] as a network has them: channels and pixels are alike, nothing is negative."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(count, 64, size, size, generator=generator)
    mixed = torch.einsum("oc,nchw->nohw", torch.randn(channels, 64, generator=generator), plain)
    noise = 3 * torch.randn(count, channels, size, size, generator=generator)
    return nn.functional.avg_pool2d(mixed + noise, 3, 1, 1).relu()


class DenseLayer(nn.Module):
    """[N, C, H, W] -> [N, C + growth, H, W]: what it makes beside what it takes (Huang et al. 2017)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C + growth, H, W]"""
        made = self.conv1(torch.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.relu(self.norm2(made)))], 1)


def densenet201(growth: int = 32, blocks: tuple[int, ...] = (6, 12, 48, 32)) -> nn.Module:
    """DenseNet-201, [N, 3, H, W] -> [N, 1000], 20.0 million parameters, with random weights."""
    channels = 2 * growth
    layers: list[nn.Module] = [
        nn.Conv2d(3, channels, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
    ]
    for index, count in enumerate(blocks):
        for _ in range(count):
            layers.append(DenseLayer(channels, growth))
            channels += growth
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        if index < len(blocks) - 1:
            layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)).eval()
