"""Detectors with several outputs: RetinaNet (heads shared by all levels), SSD, CenterNet. YOLO is in `yolo.py`."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Entry, floats


def conv_bn(inp: int, out: int, stride: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inp, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class FPN(nn.Module):
    """Lateral 1x1s summed top-down, a 3x3 on each, and one more level by a strided convolution after a ReLU."""

    def __init__(self, channels: tuple[int, ...], out: int) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList([nn.Conv2d(c, out, 1) for c in channels])
        self.layer_blocks = nn.ModuleList([nn.Conv2d(out, out, 3, padding=1) for _ in channels])
        self.p6 = nn.Conv2d(out, out, 3, 2, 1)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        names = list(x.keys())
        features = list(x.values())
        last_inner = self.inner_blocks[-1](features[-1])
        results = [self.layer_blocks[-1](last_inner)]
        for idx in range(len(features) - 2, -1, -1):
            inner_lateral = self.inner_blocks[idx](features[idx])
            feat_shape = inner_lateral.shape[-2:]
            inner_top_down = F.interpolate(last_inner, size=feat_shape, mode="nearest")
            last_inner = inner_lateral + inner_top_down
            results.insert(0, self.layer_blocks[idx](last_inner))
        results.append(self.p6(F.relu(results[-1])))
        names.append("p6")
        return dict(zip(names, results, strict=True))


class RetinaHead(nn.Module):
    """A tower called on each level: every layer is shared. [N, A*K, H, W] -> [N, H*W*A, K]."""

    def __init__(self, channels: int, anchors: int, outputs: int) -> None:
        super().__init__()
        tower: list[nn.Module] = []
        for _ in range(2):
            tower += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*tower)
        self.logits = nn.Conv2d(channels, anchors * outputs, 3, padding=1)
        self.outputs = outputs

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        every = []
        for level in features:
            y = self.logits(self.conv(level))
            n, _, h, w = y.shape
            y = y.view(n, -1, self.outputs, h, w)
            y = y.permute(0, 3, 4, 1, 2)
            every.append(y.reshape(n, -1, self.outputs))
        return every


class RetinaNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"c2": conv_bn(3, 8), "c3": conv_bn(8, 12), "c4": conv_bn(12, 16)})
        self.fpn = FPN((12, 16), 12)
        self.classification, self.regression = RetinaHead(12, 3, 5), RetinaHead(12, 3, 4)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        features = {}
        for name, stage in self.body.items():
            x = stage(x)
            if name != "c2":
                features[name] = x
        levels = list(self.fpn(features).values())
        return self.classification(levels), torch.cat(self.regression(levels), dim=1)


class L2Norm(nn.Module):
    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.eps = 1e-10
        self.weight = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        norm = x.pow(2).sum(dim=1, keepdim=True).sqrt() + self.eps
        x = torch.div(x, norm)
        return self.weight.unsqueeze(0).unsqueeze(2).unsqueeze(3).expand_as(x) * x


class SSD(nn.Module):
    """ssd.pytorch (amdegroot): sources, `permute(0, 2, 3, 1).contiguous()`, `view(o.size(0), -1)`, `cat`."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.num_classes = classes
        vgg: list[nn.Module] = []
        for inp, out in ((3, 8), (8, 12), (12, 16)):
            vgg += [nn.Conv2d(inp, out, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2, ceil_mode=True)]
        vgg += [nn.Conv2d(16, 16, 3, padding=3, dilation=3), nn.ReLU(inplace=True)]
        self.vgg = nn.ModuleList(vgg)
        self.L2Norm = L2Norm(12, 5.0)
        self.extras = nn.ModuleList([nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 3, stride=2, padding=1)])
        self.loc = nn.ModuleList([nn.Conv2d(c, a * 4, 3, padding=1) for c, a in ((12, 2), (16, 3), (16, 3))])
        self.conf = nn.ModuleList([nn.Conv2d(c, a * classes, 3, padding=1) for c, a in ((12, 2), (16, 3), (16, 3))])
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sources, loc, conf = [], [], []
        for k in range(6):
            x = self.vgg[k](x)
        sources.append(self.L2Norm(x))
        for k in range(6, len(self.vgg)):
            x = self.vgg[k](x)
        sources.append(x)
        for k, v in enumerate(self.extras):
            x = F.relu(v(x), inplace=True)
            if k % 2 == 1:
                sources.append(x)
        for source, location, confidence in zip(sources, self.loc, self.conf, strict=True):
            loc.append(location(source).permute(0, 2, 3, 1).contiguous())
            conf.append(confidence(source).permute(0, 2, 3, 1).contiguous())
        locs = torch.cat([o.view(o.size(0), -1) for o in loc], 1)
        confs = torch.cat([o.view(o.size(0), -1) for o in conf], 1)
        return locs.view(locs.size(0), -1, 4), self.softmax(confs.view(confs.size(0), -1, self.num_classes))


class CenterNet(nn.Module):
    """Objects as points: transposed 4x4 convolutions started as bilinear, one head a task held by attribute name."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = {"hm": 3, "wh": 2, "reg": 2}
        sizes = (3, 8, 12, 16)
        self.down = nn.Sequential(*[conv_bn(a, b) for a, b in pairwise(sizes)])
        self.deconv_layers = nn.Sequential(*self._deconv(16, 12), *self._deconv(12, 8))
        for head, outputs in self.heads.items():
            self.__setattr__(
                head, nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(12, outputs, 1))
            )

    @staticmethod
    def _deconv(inp: int, out: int) -> list[nn.Module]:
        up = nn.ConvTranspose2d(inp, out, kernel_size=4, stride=2, padding=1, output_padding=0, bias=False)
        f = math.ceil(up.weight.size(2) / 2)
        c = (2 * f - 1 - f % 2) / (2.0 * f)
        line = torch.tensor([1 - abs(i / f - c) for i in range(up.weight.size(2))])
        up.weight.data.add_(line[:, None] * line[None, :])
        return [up, nn.BatchNorm2d(out, momentum=0.1), nn.ReLU(inplace=True)]

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        x = self.deconv_layers(self.down(x))
        ret = {}
        for head in self.heads:
            ret[head] = self.__getattr__(head)(x)
        ret["hm"] = torch.clamp(ret["hm"].sigmoid_(), min=1e-4, max=1 - 1e-4)
        return [ret]


FAMILIES = {
    "retinanet": Entry(RetinaNet, floats(3, 48, 40)),
    "ssd": Entry(SSD, floats(3, 40, 40)),
    "centernet": Entry(CenterNet, floats(3, 48, 48)),
}
