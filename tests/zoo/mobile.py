"""Networks for small devices: MobileNet-v3 and ShuffleNet-v2, as torchvision writes them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .common import Entry, floats


def make_divisible(v: float, divisor: int = 4) -> int:
    new = max(divisor, int(v + divisor / 2) // divisor * divisor)
    return new + divisor if new < 0.9 * v else new


class ConvNormActivation(nn.Sequential):
    def __init__(
        self,
        inp: int,
        out: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        act: Callable[..., nn.Module] | None = nn.ReLU,
        eps: float = 1e-5,
    ):
        layers: list[nn.Module] = [
            nn.Conv2d(inp, out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out, eps=eps, momentum=0.01),
        ]
        if act is not None:
            layers.append(act(inplace=True))
        super().__init__(*layers)


class SqueezeExcitation(nn.Module):
    """torchvision.ops.SqueezeExcitation."""

    def __init__(self, inp: int, squeeze: int, act: Any = nn.ReLU, scale: Any = nn.Sigmoid):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(inp, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, inp, 1)
        self.activation = act()
        self.scale_activation = scale()

    def _scale(self, x: Tensor) -> Tensor:
        scale = self.avgpool(x)
        scale = self.fc1(scale)
        scale = self.activation(scale)
        scale = self.fc2(scale)
        return self.scale_activation(scale)

    def forward(self, x: Tensor) -> Tensor:
        scale = self._scale(x)
        return scale * x


class InvertedResidualV3(nn.Module):
    def __init__(self, inp: int, kernel: int, exp: int, out: int, use_se: bool, act: str, stride: int):
        super().__init__()
        self.use_res_connect = stride == 1 and inp == out
        activation = nn.Hardswish if act == "HS" else nn.ReLU
        layers: list[nn.Module] = []
        if exp != inp:
            layers.append(ConvNormActivation(inp, exp, 1, act=activation, eps=0.001))
        layers.append(ConvNormActivation(exp, exp, kernel, stride, groups=exp, act=activation, eps=0.001))
        if use_se:
            layers.append(SqueezeExcitation(exp, make_divisible(exp // 4), scale=nn.Hardsigmoid))
        layers.append(ConvNormActivation(exp, out, 1, act=None, eps=0.001))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result += x
        return result


class MobileNetV3(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(
            ConvNormActivation(3, 8, 3, 2, act=nn.Hardswish, eps=0.001),
            InvertedResidualV3(8, 3, 8, 8, True, "RE", 2),
            InvertedResidualV3(8, 3, 24, 12, False, "RE", 1),
            InvertedResidualV3(12, 3, 28, 12, False, "RE", 1),
            InvertedResidualV3(12, 5, 32, 16, True, "HS", 2),
            InvertedResidualV3(16, 5, 48, 16, True, "HS", 1),
            ConvNormActivation(16, 48, 1, act=nn.Hardswish, eps=0.001),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(48, 64), nn.Hardswish(inplace=True), nn.Dropout(p=0.2, inplace=True), nn.Linear(64, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batchsize, num_channels, height, width = x.size()
    channels_per_group = num_channels // groups
    x = x.view(batchsize, groups, channels_per_group, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, num_channels, height, width)


class ShuffleUnit(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int):
        super().__init__()
        self.stride = stride
        features = oup // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                self.depthwise(inp, inp, 3, stride, 1),
                nn.BatchNorm2d(inp),
                nn.Conv2d(inp, features, 1, 1, 0, bias=False),
                nn.BatchNorm2d(features),
                nn.ReLU(inplace=True),
            )
        self.branch2 = nn.Sequential(
            nn.Conv2d(inp if stride > 1 else features, features, 1, 1, 0, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(inplace=True),
            self.depthwise(features, features, 3, stride, 1),
            nn.BatchNorm2d(features),
            nn.Conv2d(features, features, 1, 1, 0, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(inplace=True),
        )

    @staticmethod
    def depthwise(i: int, o: int, kernel: int, stride: int, padding: int) -> nn.Conv2d:
        return nn.Conv2d(i, o, kernel, stride, padding, bias=False, groups=i)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.stage2 = nn.Sequential(ShuffleUnit(8, 16, 2), ShuffleUnit(16, 16, 1), ShuffleUnit(16, 16, 1))
        self.stage3 = nn.Sequential(ShuffleUnit(16, 32, 2), ShuffleUnit(32, 32, 1))
        self.conv5 = nn.Sequential(nn.Conv2d(32, 64, 1, 1, 0, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.maxpool(x)
        x = self.stage2(x)
        x = self.stage3(x)
        x = self.conv5(x)
        x = x.mean([2, 3])  # globalpool
        return self.fc(x)


ARCHITECTURES = {
    "mobilenet_v3": Entry(MobileNetV3, floats(3, 64, 64)),
    "shufflenet_v2": Entry(ShuffleNetV2, floats(3, 64, 64)),
}
