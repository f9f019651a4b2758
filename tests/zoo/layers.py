"""Layers of one's own: weights computed from others, paddings computed from shapes, kernels in buffers, activations."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from .common import Entry, floats


class WSConv2d(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019): the convolution's weight is normalised at each call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        weight_mean = weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = weight - weight_mean
        std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        weight = weight / std.expand_as(weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Conv2dSame(nn.Conv2d):
    """TensorFlow's "same" (timm): padding computed from `x.shape`, the odd pixel after."""

    def forward(self, x: Tensor) -> Tensor:
        ih, iw = x.size()[-2:]
        pad_h = self._same(ih, self.kernel_size[0], self.stride[0], self.dilation[0])
        pad_w = self._same(iw, self.kernel_size[1], self.stride[1], self.dilation[1])
        if pad_h > 0 or pad_w > 0:
            x = F.pad(x, [pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)

    @staticmethod
    def _same(i: int, k: int, s: int, d: int) -> int:
        return max((math.ceil(i / s) - 1) * s + (k - 1) * d + 1 - i, 0)


class BlurPool(nn.Module):
    """Antialiased downsampling (Zhang 2019): a fixed binomial kernel in a buffer, depthwise."""

    def __init__(self, channels: int, stride: int = 2) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride
        a = torch.tensor([1.0, 3.0, 3.0, 1.0])
        filt = a[:, None] * a[None, :]
        filt = filt / torch.sum(filt)
        self.register_buffer("filt", filt[None, None, :, :].repeat((channels, 1, 1, 1)))
        self.pad = nn.ReflectionPad2d([1, 2, 1, 2])

    def forward(self, inp: Tensor) -> Tensor:
        return F.conv2d(self.pad(inp), self.filt, stride=self.stride, groups=inp.shape[1])


class Classifier(nn.Module):
    """Layers, a global average, a linear layer."""

    def __init__(self, channels: int, *layers: nn.Module, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head(x.mean(dim=(2, 3)))


def weight_normed() -> nn.Module:
    return Classifier(
        12,
        weight_norm(nn.Conv2d(3, 8, 3, padding=1)),
        nn.ELU(),
        weight_norm(nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1), dim=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        weight_norm(nn.Conv2d(12, 12, 3, groups=4)),
    )


def spectral_normed() -> nn.Module:
    return Classifier(
        16,
        spectral_norm(nn.Conv2d(3, 12, 4, 2, 1)),
        nn.LeakyReLU(0.1),
        spectral_norm(nn.Conv2d(12, 16, 3, 1, 1, bias=False)),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(0.1),
    )


def weight_standardised() -> nn.Module:
    return Classifier(
        16,
        WSConv2d(3, 12, 3, padding=1, bias=False),
        nn.GroupNorm(4, 12),
        nn.ReLU(inplace=True),
        WSConv2d(12, 16, 3, stride=2, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(inplace=True),
    )


def same_padded() -> nn.Module:
    return Classifier(
        16,
        Conv2dSame(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8, eps=0.001),
        nn.SiLU(inplace=True),
        Conv2dSame(8, 8, 5, stride=2, groups=8, bias=False),
        nn.BatchNorm2d(8, eps=0.001),
        nn.SiLU(inplace=True),
        Conv2dSame(8, 16, 3, dilation=2),
    )


def blur_pooled() -> nn.Module:
    return Classifier(
        12,
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=2, stride=1),
        BlurPool(8),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        BlurPool(12),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
    )


class RepVGGBlock(nn.Module):
    """Three branches to be merged into one 3x3 convolution: batch norm alone, 1x1, and 3x3."""

    def __init__(self, inp: int, out: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.nonlinearity = nn.ReLU()
        self.rbr_identity = nn.BatchNorm2d(inp) if out == inp and stride == 1 else None
        self.rbr_dense = self._conv_bn(inp, out, 3, stride, 1, groups)
        self.rbr_1x1 = self._conv_bn(inp, out, 1, stride, 0, groups)

    @staticmethod
    def _conv_bn(inp: int, out: int, kernel: int, stride: int, padding: int, groups: int) -> nn.Sequential:
        result = nn.Sequential()
        result.add_module("conv", nn.Conv2d(inp, out, kernel, stride, padding, groups=groups, bias=False))
        result.add_module("bn", nn.BatchNorm2d(out))
        return result

    def forward(self, inputs: Tensor) -> Tensor:
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        return self.nonlinearity(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out)


def rep_vgg() -> nn.Module:
    return Classifier(
        16, RepVGGBlock(3, 8, 2), RepVGGBlock(8, 8), RepVGGBlock(8, 16, 2, groups=2), RepVGGBlock(16, 16, groups=2)
    )


class Activations(nn.Module):
    """Many non-linearities, as modules, functions and methods, in place and not; a batch norm called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(6))
        self.prelu, self.prelu1 = nn.PReLU(8), nn.PReLU()
        self.selu, self.mish, self.softplus = nn.SELU(inplace=True), nn.Mish(), nn.Softplus(beta=2)
        self.relu6 = nn.ReLU6(inplace=True)
        self.register_buffer("mean", torch.empty(8).uniform_(-0.5, 0.5))
        self.register_buffer("var", torch.empty(8).uniform_(0.5, 2.0))
        self.gamma = nn.Parameter(torch.empty(8).uniform_(-0.5, 1.5))
        self.beta = nn.Parameter(torch.empty(8).uniform_(-0.5, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.convs[0](x))
        x = self.prelu1(F.elu(self.convs[1](x), alpha=0.7))
        x = F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, self.training, eps=1e-3)
        x = self.mish(self.selu(self.convs[2](x)))
        x = self.softplus(self.convs[3](x)) - F.softsign(x)
        x = self.relu6(self.convs[4](x)) + F.hardtanh(x, -2.0, 2.0).abs()
        x = F.celu(self.convs[5](x)) + F.logsigmoid(x)
        x = x.sigmoid().mul(x)
        return F.glu(F.leaky_relu_(x, 0.05), dim=1)


class AddCoords(nn.Module):
    """CoordConv (Liu et al. 2018): two channels of coordinates made by `linspace` from the input's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 12, 3, padding=1, padding_mode="circular")
        self.bn = nn.BatchNorm2d(12, affine=False)
        self.out = nn.Conv2d(12, 4, 3, padding=1, padding_mode="replicate")

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        ys = torch.linspace(-1, 1, h, dtype=x.dtype, device=x.device).view(1, 1, h, 1).expand(n, 1, h, w)
        xs = torch.linspace(-1, 1, w, dtype=x.dtype, device=x.device).view(1, 1, 1, w).expand(n, 1, h, w)
        x = self.conv(torch.cat([x, xs, ys], dim=1))
        return self.out(F.relu(self.bn(x)))


_image: Any = floats(3, 32, 32)
FAMILIES = {
    "weight_norm": Entry(weight_normed, floats(3, 20, 20)),
    "spectral_norm": Entry(spectral_normed, _image),
    "weight_standardised": Entry(weight_standardised, _image),
    "same_padding": Entry(same_padded, floats(3, 31, 34)),
    "blur_pool": Entry(blur_pooled, _image),
    "repvgg": Entry(rep_vgg, _image),
    "activations": Entry(Activations, floats(3, 16, 16)),
    "coordconv": Entry(AddCoords, floats(3, 20, 24)),
}
