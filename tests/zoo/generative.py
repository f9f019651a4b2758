"""Image to image, and noise to image: ESPCN, DCGAN's two halves, style transfer, pix2pix, an EDSR-like residual net."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Entry, floats


class ESPCN(nn.Module):
    """Super-resolution by PixelShuffle."""

    def __init__(self, upscale: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, (5, 5), (1, 1), (2, 2))
        self.conv2 = nn.Conv2d(16, 12, (3, 3), (1, 1), (1, 1))
        self.conv3 = nn.Conv2d(12, upscale**2, (3, 3), (1, 1), (1, 1))
        self.pixel_shuffle = nn.PixelShuffle(upscale)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv1(x))
        x = torch.tanh(self.conv2(x))
        return torch.sigmoid(self.pixel_shuffle(self.conv3(x)))


class Generator(nn.Module):
    """DCGAN's generator: transposed 4x4 convolutions from a 1x1 code."""

    def __init__(self, nz: int = 12, ngf: int = 6) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 4, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


class Discriminator(nn.Module):
    def __init__(self, ndf: int = 6) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, ndf, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 4),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 4, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        output = self.main(x)
        return output.view(-1, 1).squeeze(1)


class ConvLayer(nn.Module):
    def __init__(self, inp: int, out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.reflection_pad = nn.ReflectionPad2d(kernel // 2)
        self.conv2d = nn.Conv2d(inp, out, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.reflection_pad(x)
        return self.conv2d(out)


class StyleResidual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.in1 = ConvLayer(channels, channels, 3, 1), nn.InstanceNorm2d(channels, affine=True)
        self.conv2, self.in2 = ConvLayer(channels, channels, 3, 1), nn.GroupNorm(4, channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.in1(self.conv1(x)))
        out = self.in2(self.conv2(out))
        return out + residual


class StyleTransfer(nn.Module):
    """fast-neural-style: reflection padding, instance norm (one group norm), nearest upsampling, 9x9 ends."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.in1 = ConvLayer(3, 8, 9, 1), nn.InstanceNorm2d(8, affine=True)
        self.conv2, self.in2 = ConvLayer(8, 16, 3, 2), nn.InstanceNorm2d(16)
        self.res = StyleResidual(16)
        self.upsample = 2
        self.deconv, self.in3 = ConvLayer(16, 8, 3, 1), nn.InstanceNorm2d(8, affine=True)
        self.out, self.relu = ConvLayer(8, 3, 9, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.in1(self.conv1(x)))
        y = self.relu(self.in2(self.conv2(y)))
        y = self.res(y)
        y = F.interpolate(y, mode="nearest", scale_factor=self.upsample)
        y = self.relu(self.in3(self.deconv(y)))
        return self.out(y)


class UnetSkipBlock(nn.Module):
    """pix2pix: a U-Net nested in itself, each block concatenating its input to its submodule's output."""

    def __init__(
        self, outer: int, inner: int, inp: int | None = None, sub: Any = None, outermost: bool = False
    ) -> None:
        super().__init__()
        self.outermost = outermost
        down: list[nn.Module] = [nn.Conv2d(inp or outer, inner, 4, 2, 1, bias=False)]
        up: list[nn.Module] = [nn.ReLU(True)]
        up += [nn.ConvTranspose2d(inner if sub is None else inner * 2, outer, 4, 2, 1, bias=outermost)]
        if outermost:
            self.model = nn.Sequential(*down, sub, *up, nn.Tanh())
        elif sub is None:
            self.model = nn.Sequential(nn.LeakyReLU(0.2, True), *down, *up, nn.BatchNorm2d(outer))
        else:
            norm = nn.BatchNorm2d(inner)
            self.model = nn.Sequential(nn.LeakyReLU(0.2), *down, norm, sub, *up, nn.BatchNorm2d(outer), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        if self.outermost:
            return self.model(x)
        return torch.cat([x, self.model(x)], 1)


def pix2pix() -> nn.Module:
    block = UnetSkipBlock(16, 16)
    block = UnetSkipBlock(8, 16, sub=block)
    return UnetSkipBlock(3, 8, inp=3, sub=block, outermost=True)


class EDSR(nn.Module):
    """No norms: blocks scaled by 0.1 through `mul` and a mean shift written as a frozen 1x1 convolution."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.sub_mean = nn.Conv2d(3, 3, 1)
        self.sub_mean.weight.data = torch.eye(3).view(3, 3, 1, 1) / 0.5
        self.sub_mean.bias = nn.Parameter(torch.tensor([-0.4488, -0.4371, -0.4040]))
        for p in self.sub_mean.parameters():
            p.requires_grad = False
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(True), nn.Conv2d(channels, channels, 3, 1, 1)
            )
            for _ in range(3)
        )
        self.tail = nn.Sequential(nn.Conv2d(channels, channels * 4, 3, padding=1), nn.PixelShuffle(2))
        self.last = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.sub_mean(x))
        res = x
        for block in self.body:
            r = block(res).mul(0.1)
            r += res
            res = r
        res += x
        return self.last(self.tail(res))


FAMILIES = {
    "espcn": Entry(ESPCN, floats(1, 20, 24)),
    "dcgan_generator": Entry(Generator, floats(12, 1, 1)),
    "dcgan_discriminator": Entry(Discriminator, floats(3, 32, 32)),
    "style_transfer": Entry(StyleTransfer, floats(3, 32, 32)),
    "pix2pix": Entry(pix2pix, floats(3, 32, 32)),
    "edsr": Entry(EDSR, floats(3, 20, 20)),
}
