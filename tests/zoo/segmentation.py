"""Dense prediction: U-Net (transposed or bilinear), DeepLab-v3, HRNet, and DBNet's text-detection head."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Entry, floats


class DoubleConv(nn.Module):
    """(conv => BN => ReLU) * 2, as in milesial/Pytorch-UNet."""

    def __init__(self, inp: int, out: int, mid: int | None = None):
        super().__init__()
        mid = mid or out
        self.double_conv = nn.Sequential(
            nn.Conv2d(inp, mid, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(mid),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid, out, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Up(nn.Module):
    """Upscale, pad to the skip's size as odd sizes need, concatenate, convolve."""

    def __init__(self, inp: int, out: int, bilinear: bool):
        super().__init__()
        self.up: nn.Module
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = DoubleConv(inp, out, inp // 2)
        else:
            self.up = nn.ConvTranspose2d(inp, inp // 2, kernel_size=2, stride=2)
            self.conv = DoubleConv(inp, out)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        x1 = self.up(x1)
        diff_y = x2.size()[2] - x1.size()[2]
        diff_x = x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diff_x // 2, diff_x - diff_x // 2, diff_y // 2, diff_y - diff_y // 2])
        x = torch.cat([x2, x1], dim=1)
        return self.conv(x)


class UNet(nn.Module):
    def __init__(self, bilinear: bool = False, width: int = 8, classes: int = 2):
        super().__init__()
        factor = 2 if bilinear else 1
        self.inc = DoubleConv(3, width)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(width, width * 2))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(width * 2, width * 4))
        self.down3 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(width * 4, width * 8 // factor))
        self.up1 = Up(width * 8, width * 4 // factor, bilinear)
        self.up2 = Up(width * 4, width * 2 // factor, bilinear)
        self.up3 = Up(width * 2, width, bilinear)
        self.outc = nn.Conv2d(width, classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x = self.up1(x4, x3)
        x = self.up2(x, x2)
        x = self.up3(x, x1)
        return self.outc(x)


class ASPPConv(nn.Sequential):
    def __init__(self, inp: int, out: int, dilation: int):
        super().__init__(
            nn.Conv2d(inp, out, 3, padding=dilation, dilation=dilation, bias=False), nn.BatchNorm2d(out), nn.ReLU()
        )


class ASPPPooling(nn.Sequential):
    def __init__(self, inp: int, out: int):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inp, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for mod in self:
            x = mod(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class ASPP(nn.Module):
    def __init__(self, inp: int, rates: tuple[int, ...], out: int):
        super().__init__()
        modules: list[nn.Module] = [nn.Sequential(nn.Conv2d(inp, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())]
        modules += [ASPPConv(inp, out, rate) for rate in rates]
        modules.append(ASPPPooling(inp, out))
        self.convs = nn.ModuleList(modules)
        self.project = nn.Sequential(
            nn.Conv2d(len(self.convs) * out, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.Dropout(0.5)
        )

    def forward(self, x: Tensor) -> Tensor:
        res = []
        for conv in self.convs:
            res.append(conv(x))
        return self.project(torch.cat(res, dim=1))


class DeepLabV3(nn.Module):
    """A dilated backbone, ASPP, and logits resized to the input; an ordered dict comes out."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 3, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3, padding=2, dilation=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Sequential(
            ASPP(16, (2, 4, 6), 12),
            nn.Conv2d(12, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, classes, 1),
        )
        self.aux_classifier: nn.Module | None = None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        input_shape = x.shape[-2:]
        features = self.backbone(x)
        result = {}
        x = self.classifier(features)
        x = F.interpolate(x, size=input_shape, mode="bilinear", align_corners=False)
        result["out"] = x
        if self.aux_classifier is not None:
            result["aux"] = self.aux_classifier(features)
        return result


class HighResolutionModule(nn.Module):
    """Branches of several resolutions, each convolved, then all summed into each."""

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True))
            for c in channels
        )
        self.fuse_layers = nn.ModuleList()
        for i, out in enumerate(channels):
            row = nn.ModuleList()
            for j, inp in enumerate(channels):
                steps: list[nn.Module] = []
                if j > i:
                    steps = [nn.Conv2d(inp, out, 1, bias=False), nn.BatchNorm2d(out)]
                for k in range(i - j):
                    last = k == i - j - 1
                    steps += [nn.Conv2d(inp, out if last else inp, 3, 2, 1, bias=False)]
                    steps += [nn.BatchNorm2d(out if last else inp)] + ([] if last else [nn.ReLU(inplace=True)])
                row.append(nn.Sequential(*steps) if steps else nn.Identity())
            self.fuse_layers.append(row)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        for i in range(len(self.branches)):
            x[i] = self.branches[i](x[i])
        x_fuse = []
        for i in range(len(self.fuse_layers)):
            y = x[0] if i == 0 else self.fuse_layers[i][0](x[0])
            for j in range(1, len(self.branches)):
                if i == j:
                    y = y + x[j]
                elif j > i:
                    height, width = x[i].shape[-2], x[i].shape[-1]
                    y = y + F.interpolate(
                        self.fuse_layers[i][j](x[j]), size=[height, width], mode="bilinear", align_corners=True
                    )
                else:
                    y = y + self.fuse_layers[i][j](x[j])
            x_fuse.append(self.relu(y))
        return x_fuse


class HRNet(nn.Module):
    def __init__(self, channels: tuple[int, ...] = (6, 8, 12), classes: int = 3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels[0], 3, 2, 1), nn.BatchNorm2d(channels[0]), nn.ReLU(True))
        self.transition = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(True))
            for a, b in pairwise(channels)
        )
        self.stage2, self.stage3 = HighResolutionModule(channels[:2]), HighResolutionModule(channels)
        self.last_layer = nn.Conv2d(sum(channels), classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.stage2([x, self.transition[0](x)])
        y.append(self.transition[1](y[-1]))
        y = self.stage3(y)
        h, w = y[0].size(2), y[0].size(3)
        up = [F.interpolate(level, size=(h, w), mode="bilinear", align_corners=False) for level in y[1:]]
        return self.last_layer(torch.cat([y[0], *up], 1))


class DBHead(nn.Module):
    """Probability and threshold maps by transposed convolutions; a steep sigmoid of their difference in training."""

    def __init__(self, inp: int, k: int = 50):
        super().__init__()
        self.k = k
        self.binarize, self.thresh = self._branch(inp), self._branch(inp)

    @staticmethod
    def _branch(inp: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inp, inp // 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(inp // 4),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(inp // 4, inp // 4, 2, 2),
            nn.BatchNorm2d(inp // 4),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(inp // 4, 1, 2, 2),
            nn.Sigmoid(),
        )

    def step_function(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.reciprocal(1 + torch.exp(-self.k * (x - y)))

    def forward(self, x: Tensor) -> Tensor:
        shrink_maps = self.binarize(x)
        threshold_maps = self.thresh(x)
        if self.training:
            return torch.cat((shrink_maps, threshold_maps, self.step_function(shrink_maps, threshold_maps)), dim=1)
        return torch.cat((shrink_maps, threshold_maps), dim=1)


class DBNet(nn.Module):
    """Three levels summed top-down by nearest upsampling, smoothed, concatenated, then the head."""

    def __init__(self, inner: int = 16):
        super().__init__()
        self.stages = nn.ModuleList()
        for inp, out, stride in ((3, 8, 4), (8, 12, 2), (12, 16, 2)):
            conv = nn.Conv2d(inp, out, 5, stride, 2, bias=False)
            self.stages.append(nn.Sequential(conv, nn.BatchNorm2d(out), nn.Hardswish(inplace=True)))
        self.reduce = nn.ModuleList(nn.Conv2d(c, inner, 1, bias=False) for c in (8, 12, 16))
        self.smooth = nn.ModuleList(nn.Conv2d(inner, inner // 4, 3, padding=1, bias=False) for _ in range(3))
        self.out = nn.Conv2d(inner // 4 * 3, inner, 3, padding=1)
        self.head = DBHead(inner)

    def forward(self, x: Tensor) -> Tensor:
        c2 = self.stages[0](x)
        c3 = self.stages[1](c2)
        c4 = self.stages[2](c3)
        p4 = self.reduce[2](c4)
        p3 = self._upsample_add(p4, self.reduce[1](c3))
        p2 = self._upsample_add(p3, self.reduce[0](c2))
        h, w = p2.size()[2:]
        ps = [F.interpolate(conv(p), size=(h, w)) for conv, p in zip(self.smooth, (p2, p3, p4), strict=True)]
        return self.head(self.out(torch.cat(ps, dim=1)))

    def _upsample_add(self, x: Tensor, y: Tensor) -> Tensor:
        return F.interpolate(x, size=y.size()[2:]) + y


ARCHITECTURES = {
    "unet": Entry(UNet, floats(3, 36, 44)),
    "unet_bilinear": Entry(lambda: UNet(bilinear=True), floats(3, 36, 44)),
}
FAMILIES = {
    "deeplab_v3": Entry(DeepLabV3, floats(3, 48, 40)),
    "hrnet": Entry(HRNet, floats(3, 32, 40)),
    "dbnet": Entry(DBNet, floats(3, 64, 64)),
}
