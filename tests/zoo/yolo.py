"""YOLO as Ultralytics writes it: v5 (anchors, objectness) and v8 (split-and-concat C2f, distribution focal head)."""

from typing import Any

import torch
from torch import Tensor, nn

from .common import Entry, floats


class Conv(nn.Module):
    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, p: int | None = None, g: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2 if p is None else p, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=0.001, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, c1: int, c2: int, shortcut: bool = True, k: tuple[int, int] = (1, 3)) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, c2, k[0]), Conv(c2, c2, k[1])
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C3(nn.Module):
    """CSP bottleneck with three convolutions."""

    def __init__(self, c1: int, c2: int, shortcut: bool = True) -> None:
        super().__init__()
        c_ = c2 // 2
        self.cv1, self.cv2, self.cv3 = Conv(c1, c_), Conv(c1, c_), Conv(2 * c_, c2)
        self.m = nn.Sequential(Bottleneck(c_, c_, shortcut))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class C2f(nn.Module):
    """Chunk in two, chain bottlenecks on the last, concatenate all."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = False) -> None:
        super().__init__()
        self.c = c2 // 2
        self.cv1, self.cv2 = Conv(c1, 2 * self.c), Conv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(Bottleneck(self.c, self.c, shortcut, k=(3, 3)) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    """Three 5x5 max pools in a row: one module called three times."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, c1 // 2), Conv(c1 // 2 * 4, c2)
        self.m = nn.MaxPool2d(kernel_size=5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class DetectV5(nn.Module):
    """Anchor grids made from the shapes of the feature maps with `arange` and `meshgrid`."""

    def __init__(self, nc: int, anchors: Any, strides: tuple[int, ...], ch: tuple[int, ...]) -> None:
        super().__init__()
        self.nc, self.no, self.nl, self.na = nc, nc + 5, len(anchors), len(anchors[0]) // 2
        self.stride = torch.tensor(strides, dtype=torch.float32)
        self.register_buffer("anchors", torch.tensor(anchors).float().view(self.nl, -1, 2))
        self.m = nn.ModuleList(nn.Conv2d(x, self.no * self.na, 1) for x in ch)

    def forward(self, x: list[Tensor]) -> dict[str, Any]:
        z = []
        for i in range(self.nl):
            x[i] = self.m[i](x[i])
            bs, _, ny, nx = x[i].shape
            x[i] = x[i].view(bs, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2).contiguous()
            if not self.training:
                grid, anchor_grid = self._make_grid(nx, ny, i)
                xy, wh, conf = x[i].sigmoid().split((2, 2, self.nc + 1), 4)
                xy = (xy * 2 + grid) * self.stride[i]
                wh = (wh * 2) ** 2 * anchor_grid
                z.append(torch.cat((xy, wh, conf), 4).view(bs, self.na * nx * ny, self.no))
        return {"raw": x} if self.training else {"predictions": torch.cat(z, 1), "raw": x}

    def _make_grid(self, nx: int, ny: int, i: int) -> tuple[Tensor, Tensor]:
        d, t = self.anchors[i].device, self.anchors[i].dtype
        shape = 1, self.na, ny, nx, 2
        yv, xv = torch.meshgrid(torch.arange(ny, device=d, dtype=t), torch.arange(nx, device=d, dtype=t), indexing="ij")
        grid = torch.stack((xv, yv), 2).expand(shape) - 0.5
        anchor_grid = (self.anchors[i] * self.stride[i]).view((1, self.na, 1, 1, 2)).expand(shape)
        return grid, anchor_grid


class YOLOv5(nn.Module):
    def __init__(self, nc: int = 3) -> None:
        super().__init__()
        self.stem, self.down1, self.c3_1 = Conv(3, 8, 6, 2, 2), Conv(8, 12, 3, 2), C3(12, 12)
        self.down2, self.c3_2, self.sppf = Conv(12, 16, 3, 2), C3(16, 16), SPPF(16, 16)
        self.lateral, self.up = Conv(16, 12), nn.Upsample(None, 2, "nearest")
        self.c3_3, self.down3, self.c3_4 = C3(24, 12, False), Conv(12, 12, 3, 2), C3(24, 16, False)
        anchors = [[1.25, 1.625, 2.0, 3.75], [1.875, 3.8125, 3.875, 2.8125]]
        self.detect = DetectV5(nc, anchors, (4, 8), (12, 16))

    def forward(self, x: Tensor) -> dict[str, Any]:
        p2 = self.c3_1(self.down1(self.stem(x)))
        p3 = self.lateral(self.sppf(self.c3_2(self.down2(p2))))
        n2 = self.c3_3(torch.cat([self.up(p3), p2], 1))
        n3 = self.c3_4(torch.cat([self.down3(n2), p3], 1))
        return self.detect([n2, n3])


class DFL(nn.Module):
    """Integral over a distribution of distances: a softmax and a fixed 1x1 convolution with weights 0..c1-1."""

    def __init__(self, c1: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(c1, dtype=torch.float).view(1, c1, 1, 1)
        self.c1 = c1

    def forward(self, x: Tensor) -> Tensor:
        b, _, a = x.shape
        return self.conv(x.view(b, 4, self.c1, a).transpose(2, 1).softmax(1)).view(b, 4, a)


def make_anchors(feats: list[Tensor], strides: tuple[int, ...], offset: float = 0.5) -> tuple[Tensor, Tensor]:
    points, stride_tensor = [], []
    dtype, device = feats[0].dtype, feats[0].device
    for i, stride in enumerate(strides):
        _, _, h, w = feats[i].shape
        sx = torch.arange(end=w, device=device, dtype=dtype) + offset
        sy = torch.arange(end=h, device=device, dtype=dtype) + offset
        sy, sx = torch.meshgrid(sy, sx, indexing="ij")
        points.append(torch.stack((sx, sy), -1).view(-1, 2))
        stride_tensor.append(torch.full((h * w, 1), stride, dtype=dtype, device=device))
    return torch.cat(points), torch.cat(stride_tensor)


class DetectV8(nn.Module):
    def __init__(self, nc: int, strides: tuple[int, ...], ch: tuple[int, ...], reg_max: int = 8) -> None:
        super().__init__()
        self.nc, self.reg_max, self.no, self.strides = nc, reg_max, nc + reg_max * 4, strides
        self.cv2 = nn.ModuleList(nn.Sequential(Conv(x, 12, 3), nn.Conv2d(12, 4 * reg_max, 1)) for x in ch)
        self.cv3 = nn.ModuleList(nn.Sequential(Conv(x, x, 3, g=x), Conv(x, 12), nn.Conv2d(12, nc, 1)) for x in ch)
        self.dfl = DFL(reg_max)

    def forward(self, x: list[Tensor]) -> Tensor | list[Tensor]:
        for i in range(len(x)):
            x[i] = torch.cat((self.cv2[i](x[i]), self.cv3[i](x[i])), 1)
        if self.training:
            return x
        shape = x[0].shape
        x_cat = torch.cat([xi.view(shape[0], self.no, -1) for xi in x], 2)
        anchors, strides = (t.transpose(0, 1) for t in make_anchors(x, self.strides))
        box, cls = x_cat.split((self.reg_max * 4, self.nc), 1)
        lt, rb = self.dfl(box).chunk(2, 1)
        x1y1, x2y2 = anchors - lt, anchors + rb
        dbox = torch.cat(((x1y1 + x2y2) / 2, x2y2 - x1y1), 1) * strides
        return torch.cat((dbox, cls.sigmoid()), 1)


class YOLOv8(nn.Module):
    def __init__(self, nc: int = 3) -> None:
        super().__init__()
        self.stem, self.down1, self.c2f_1 = Conv(3, 8, 3, 2), Conv(8, 12, 3, 2), C2f(12, 12, 2, True)
        self.down2, self.c2f_2, self.sppf = Conv(12, 16, 3, 2), C2f(16, 16, 1, True), SPPF(16, 16)
        self.up, self.c2f_3 = nn.Upsample(scale_factor=2), C2f(28, 12)
        self.detect = DetectV8(nc, (4, 8), (12, 16))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        p2 = self.c2f_1(self.down1(self.stem(x)))
        p3 = self.sppf(self.c2f_2(self.down2(p2)))
        n2 = self.c2f_3(torch.cat([self.up(p3), p2], 1))
        return self.detect([n2, p3])


FAMILIES = {
    "yolov5": Entry(YOLOv5, floats(3, 64, 48)),
    "yolov8": Entry(YOLOv8, floats(3, 64, 48)),
}
