"""VGG, and ResNet with its kin: ResNeXt, SE-ResNet, CBAM, Res2Net, RegNet, stochastic depth, frozen batch norm."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Entry, floats


class VGG(nn.Module):
    """torchvision's VGG with batch norm: a configuration list, `M` for a pool."""

    def __init__(self, cfg: tuple[int | str, ...] = (8, 8, "M", 16, "M", 16, 16, "M", 24, 24, "M"), classes: int = 10):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for v in cfg:
            if isinstance(v, str):
                layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
            else:
                layers += [nn.Conv2d(channels, v, kernel_size=3, padding=1), nn.BatchNorm2d(v), nn.ReLU(inplace=True)]
                channels = v
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(channels * 2 * 2, 32),
            nn.ReLU(True),
            nn.Dropout(p=0.5),
            nn.Linear(32, 32),
            nn.ReLU(True),
            nn.Dropout(p=0.5),
            nn.Linear(32, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


def conv3x3(inp: int, out: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inp, out, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)


def conv1x1(inp: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inp, out, kernel_size=1, stride=stride, bias=False)


class FrozenBatchNorm2d(nn.Module):
    """Detection backbones' batch norm: four buffers and arithmetic (torchvision.ops.misc)."""

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.empty(num_features).uniform_(-0.5, 1.5))
        self.register_buffer("bias", torch.empty(num_features).uniform_(-0.5, 0.5))
        self.register_buffer("running_mean", torch.empty(num_features).uniform_(-0.3, 0.3))
        self.register_buffer("running_var", torch.empty(num_features).uniform_(0.5, 2.0))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.reshape(1, -1, 1, 1)
        b = self.bias.reshape(1, -1, 1, 1)
        rv = self.running_var.reshape(1, -1, 1, 1)
        rm = self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + self.eps).rsqrt()
        bias = b - rm * scale
        return x * scale + bias


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(
        self, inp: int, planes: int, stride: int, downsample: nn.Module | None, norm: Callable[..., nn.Module]
    ):
        super().__init__()
        self.conv1 = conv3x3(inp, planes, stride)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride = stride

    def attend(self, out: Tensor) -> Tensor:
        return out

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.attend(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4
    groups = 1

    def __init__(
        self, inp: int, planes: int, stride: int, downsample: nn.Module | None, norm: Callable[..., nn.Module]
    ):
        super().__init__()
        width = planes * (2 if self.groups > 1 else 1)
        self.conv1 = conv1x1(inp, width)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, stride, self.groups)
        self.bn2 = norm(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)
        out = self.conv3(out)
        out = self.bn3(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNeXtBottleneck(Bottleneck):
    groups = 4


class SEBlock(BasicBlock):
    """Squeeze and excitation as in the first public code: average pool, `view`, two linear layers, `expand_as`."""

    def __init__(self, inp: int, planes: int, *rest: Any):
        super().__init__(inp, planes, *rest)
        self.fc = nn.Sequential(
            nn.Linear(planes, planes // 4, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(planes // 4, planes, bias=False),
            nn.Sigmoid(),
        )

    def attend(self, out: Tensor) -> Tensor:
        b, c, _, _ = out.size()
        y = F.adaptive_avg_pool2d(out, 1).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return out * y.expand_as(out)


class CBAMBlock(BasicBlock):
    """Channel attention (shared MLP on average and maximum), then spatial attention with a 7x7 convolution."""

    def __init__(self, inp: int, planes: int, *rest: Any):
        super().__init__(inp, planes, *rest)
        self.mlp = nn.Sequential(nn.Conv2d(planes, planes // 4, 1), nn.ReLU(), nn.Conv2d(planes // 4, planes, 1))
        self.spatial = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)

    def attend(self, out: Tensor) -> Tensor:
        avg = self.mlp(F.avg_pool2d(out, (out.size(2), out.size(3)), stride=(out.size(2), out.size(3))))
        top = self.mlp(F.adaptive_max_pool2d(out, 1))
        out = torch.sigmoid(avg + top) * out
        pooled = torch.cat((torch.max(out, 1)[0].unsqueeze(1), torch.mean(out, 1).unsqueeze(1)), dim=1)
        return out * torch.sigmoid(self.spatial(pooled))


class StochasticBlock(BasicBlock):
    """Drops whole blocks in training (Huang et al. 2016); in eval the branch is scaled by its survival probability."""

    survival = 0.8

    def attend(self, out: Tensor) -> Tensor:
        if self.training:
            return out * torch.bernoulli(torch.full((out.shape[0], 1, 1, 1), self.survival))
        return out * self.survival


class Res2Block(nn.Module):
    """Res2Net: `torch.split` into scales, each convolved with the last one's output added."""

    expansion = 4

    def __init__(
        self, inp: int, planes: int, stride: int, downsample: nn.Module | None, norm: Callable[..., nn.Module]
    ):
        super().__init__()
        self.width, self.scale = planes // 2, 4
        self.conv1, self.bn1 = conv1x1(inp, self.width * self.scale), norm(self.width * self.scale)
        self.stype = "stage" if downsample is not None else "normal"
        self.nums = self.scale - 1
        self.pool = nn.AvgPool2d(kernel_size=3, stride=stride, padding=1)
        self.convs = nn.ModuleList([conv3x3(self.width, self.width, stride) for _ in range(self.nums)])
        self.bns = nn.ModuleList([norm(self.width) for _ in range(self.nums)])
        self.conv3 = conv1x1(self.width * self.scale, planes * 4)
        self.bn3 = norm(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        spx = torch.split(out, self.width, 1)
        sp = spx[0]
        for i in range(self.nums):
            sp = spx[i] if i == 0 or self.stype == "stage" else sp + spx[i]
            sp = self.convs[i](sp)
            sp = self.relu(self.bns[i](sp))
            out = sp if i == 0 else torch.cat((out, sp), 1)
        last = self.pool(spx[self.nums]) if self.stype == "stage" else spx[self.nums]
        out = self.bn3(self.conv3(torch.cat((out, last), 1)))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


class ResNet(nn.Module):
    """torchvision's ResNet: 7x7 stem, max pool, stages of blocks, global pool."""

    def __init__(
        self,
        block: Any,
        layers: tuple[int, ...] = (2, 2, 1),
        width: int = 8,
        classes: int = 10,
        norm: Callable[..., nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        self.inplanes, self.norm = width, norm
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, width, layers[0], 1)
        self.layer2 = self._make_layer(block, width * 2, layers[1], 2)
        self.layer3 = self._make_layer(block, width * 4, layers[2], 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(width * 4 * block.expansion, classes)

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int) -> nn.Sequential:
        downsample = None
        out = planes * block.expansion
        if stride != 1 or self.inplanes != out:
            downsample = nn.Sequential(conv1x1(self.inplanes, out, stride), self.norm(out))
        layers = [block(self.inplanes, planes, stride, downsample, self.norm)]
        self.inplanes = out
        layers += [block(out, planes, 1, None, self.norm) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


_image = floats(3, 64, 64)
ARCHITECTURES = {
    "vgg": Entry(VGG, floats(3, 32, 32)),
    "resnet": Entry(lambda: ResNet(BasicBlock), _image),
    "resnet_bottleneck": Entry(lambda: ResNet(Bottleneck, (2, 1, 1)), _image),
}
FAMILIES = {
    "resnext": Entry(lambda: ResNet(ResNeXtBottleneck, (2, 1, 1)), _image),
    "se_resnet": Entry(lambda: ResNet(SEBlock, (1, 2, 1)), _image),
    "cbam_resnet": Entry(lambda: ResNet(CBAMBlock, (1, 2, 1)), _image),
    "stochastic_depth_resnet": Entry(lambda: ResNet(StochasticBlock, (2, 2, 1)), _image),
    "res2net": Entry(lambda: ResNet(Res2Block, (2, 1, 1)), _image),
    "frozen_bn_resnet": Entry(lambda: ResNet(BasicBlock, (1, 2, 1), norm=FrozenBatchNorm2d), _image),
}
