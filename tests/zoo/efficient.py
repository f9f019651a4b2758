"""EfficientNet, RegNet-Y and GhostNet: squeeze and excitation written three ways."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Entry, floats
from .mobile import ConvNormActivation, SqueezeExcitation


def stochastic_depth(x: Tensor, p: float, training: bool) -> Tensor:
    if not training or p == 0.0:
        return x
    noise = torch.empty([x.shape[0]] + [1] * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(1.0 - p)
    return x * noise.div_(1.0 - p)


class StochasticDepth(nn.Module):
    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return stochastic_depth(x, self.p, self.training)


class MBConv(nn.Module):
    def __init__(self, inp: int, out: int, expand: int, kernel: int, stride: int, p: float):
        super().__init__()
        self.use_res_connect = stride == 1 and inp == out
        exp = inp * expand
        layers: list[nn.Module] = [ConvNormActivation(inp, exp, 1, act=nn.SiLU)] if expand != 1 else []
        layers += [
            ConvNormActivation(exp, exp, kernel, stride, groups=exp, act=nn.SiLU),
            SqueezeExcitation(exp, max(1, inp // 4), act=partial(nn.SiLU, inplace=True)),
            ConvNormActivation(exp, out, 1, act=None),
        ]
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(p)

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += x
        return result


class EfficientNet(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(
            ConvNormActivation(3, 8, 3, 2, act=nn.SiLU),
            nn.Sequential(MBConv(8, 8, 1, 3, 1, 0.0)),
            nn.Sequential(MBConv(8, 12, 4, 3, 2, 0.05), MBConv(12, 12, 4, 3, 1, 0.1)),
            nn.Sequential(MBConv(12, 16, 4, 5, 2, 0.1), MBConv(16, 16, 4, 5, 1, 0.15)),
            ConvNormActivation(16, 48, 1, act=nn.SiLU),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(p=0.2, inplace=True), nn.Linear(48, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        x = torch.flatten(x, 1)
        return self.classifier(x)


class RegNetBlock(nn.Module):
    """RegNet-Y: a bottleneck of group convolutions with squeeze and excitation; `x = proj(x) + f(x)`."""

    def __init__(self, inp: int, out: int, stride: int, group_width: int = 8):
        super().__init__()
        self.proj = None
        if inp != out or stride != 1:
            self.proj = ConvNormActivation(inp, out, 1, stride, act=None)
        self.f = nn.Sequential(
            ConvNormActivation(inp, out, 1),
            ConvNormActivation(out, out, 3, stride, groups=out // group_width),
            SqueezeExcitation(out, round(0.25 * inp)),
            ConvNormActivation(out, out, 1, act=None),
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x) + self.f(x) if self.proj is not None else x + self.f(x)
        return self.activation(x)


class RegNetY(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = ConvNormActivation(3, 8, 3, 2)
        self.trunk_output = nn.Sequential(RegNetBlock(8, 16, 2), RegNetBlock(16, 24, 2), RegNetBlock(24, 24, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk_output(self.stem(x))
        x = self.avgpool(x)
        x = x.flatten(start_dim=1)
        return self.fc(x)


class GhostModule(nn.Module):
    """Half of the channels by a 1x1, the rest as cheap depthwise copies; the surplus is sliced off."""

    def __init__(self, inp: int, oup: int, relu: bool = True, ratio: int = 2):
        super().__init__()
        self.oup = oup
        init = -(-oup // ratio)
        self.primary_conv = ConvNormActivation(inp, init, 1, act=nn.ReLU if relu else None)
        self.cheap_operation = ConvNormActivation(init, init, 3, groups=init, act=nn.ReLU if relu else None)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        x2 = self.cheap_operation(x1)
        out = torch.cat([x1, x2], dim=1)
        return out[:, : self.oup, :, :]


class GhostBottleneck(nn.Module):
    def __init__(self, inp: int, mid: int, out: int, stride: int):
        super().__init__()
        self.ghost1, self.ghost2 = GhostModule(inp, mid), GhostModule(mid, out, relu=False)
        self.dw = ConvNormActivation(mid, mid, 3, stride, groups=mid, act=None) if stride > 1 else None
        self.reduce, self.expand = nn.Conv2d(mid, mid // 4, 1), nn.Conv2d(mid // 4, mid, 1)
        self.shortcut = nn.Sequential()
        if stride > 1 or inp != out:
            dw = ConvNormActivation(inp, inp, 3, stride, groups=inp, act=None)
            self.shortcut = nn.Sequential(*dw, *ConvNormActivation(inp, out, 1, act=None))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.ghost1(x)
        if self.dw is not None:
            x = self.dw(x)
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)), inplace=True))
        x = x * (F.relu6(gate + 3.0) / 6.0)
        x = self.ghost2(x)
        x += self.shortcut(residual)
        return x


class GhostNet(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = ConvNormActivation(3, 8, 3, 2)
        self.blocks = nn.Sequential(
            GhostBottleneck(8, 12, 9, 1), GhostBottleneck(9, 20, 12, 2), GhostBottleneck(12, 24, 12, 1)
        )
        self.head, self.classifier = nn.Conv2d(12, 32, 1), nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = F.relu(self.head(F.adaptive_avg_pool2d(x, (1, 1))))
        x = x.view(x.size(0), -1)
        return self.classifier(F.dropout(x, p=0.2, training=self.training))


ARCHITECTURES = {"efficientnet": Entry(EfficientNet, floats(3, 64, 64))}
FAMILIES = {
    "regnet_y": Entry(RegNetY, floats(3, 48, 48)),
    "ghostnet": Entry(GhostNet, floats(3, 32, 32)),
}
