"""Networks of parallel branches: Inception-v3 and GoogLeNet (as torchvision writes them), Xception."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Entry, floats


class BasicConv2d(nn.Module):
    def __init__(self, inp: int, out: int, **kwargs: Any):
        super().__init__()
        self.conv = nn.Conv2d(inp, out, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x)
        return F.relu(x, inplace=True)


class InceptionA(nn.Module):
    def __init__(self, inp: int, pool: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(inp, 8, kernel_size=1)
        self.branch5x5_1 = BasicConv2d(inp, 6, kernel_size=1)
        self.branch5x5_2 = BasicConv2d(6, 8, kernel_size=5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(inp, 8, kernel_size=1)
        self.branch3x3dbl_2 = BasicConv2d(8, 12, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(12, 12, kernel_size=3, padding=1)
        self.branch_pool = BasicConv2d(inp, pool, kernel_size=1)

    def _forward(self, x: Tensor) -> list[Tensor]:
        branch1x1 = self.branch1x1(x)
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        branch_pool = self.branch_pool(branch_pool)
        return [branch1x1, branch5x5, branch3x3dbl, branch_pool]

    def forward(self, x: Tensor) -> Tensor:
        outputs = self._forward(x)
        return torch.cat(outputs, 1)


class InceptionB(nn.Module):
    """Grid reduction: a strided 3x3, a double 3x3 and a max pool, side by side."""

    def __init__(self, inp: int):
        super().__init__()
        self.branch3x3 = BasicConv2d(inp, 16, kernel_size=3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(inp, 8, kernel_size=1)
        self.branch3x3dbl_2 = BasicConv2d(8, 12, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(12, 12, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3(x)
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = F.max_pool2d(x, kernel_size=3, stride=2)
        return torch.cat([branch3x3, branch3x3dbl, branch_pool], 1)


class InceptionC(nn.Module):
    """7x7 convolutions factorised into 1x7 and 7x1."""

    def __init__(self, inp: int, c7: int):
        super().__init__()
        row: dict[str, Any] = {"kernel_size": (1, 7), "padding": (0, 3)}
        column: dict[str, Any] = {"kernel_size": (7, 1), "padding": (3, 0)}
        self.branch1x1 = BasicConv2d(inp, 12, kernel_size=1)
        self.branch7x7_1 = BasicConv2d(inp, c7, kernel_size=1)
        self.branch7x7_2 = BasicConv2d(c7, c7, **row)
        self.branch7x7_3 = BasicConv2d(c7, 12, **column)
        self.branch7x7dbl_1 = BasicConv2d(inp, c7, kernel_size=1)
        self.branch7x7dbl_2 = BasicConv2d(c7, c7, **column)
        self.branch7x7dbl_3 = BasicConv2d(c7, c7, **row)
        self.branch7x7dbl_4 = BasicConv2d(c7, c7, **column)
        self.branch7x7dbl_5 = BasicConv2d(c7, 12, **row)
        self.branch_pool = BasicConv2d(inp, 12, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        branch_pool = self.branch_pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([branch1x1, branch7x7, branch7x7dbl, branch_pool], 1)


class InceptionD(nn.Module):
    def __init__(self, inp: int):
        super().__init__()
        self.branch3x3_1 = BasicConv2d(inp, 12, kernel_size=1)
        self.branch3x3_2 = BasicConv2d(12, 16, kernel_size=3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(inp, 12, kernel_size=1)
        self.branch7x7x3_2 = BasicConv2d(12, 12, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(12, 12, kernel_size=(7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(12, 12, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7x3 = self.branch7x7x3_2(self.branch7x7x3_1(x))
        branch7x7x3 = self.branch7x7x3_4(self.branch7x7x3_3(branch7x7x3))
        return torch.cat([branch3x3, branch7x7x3, F.max_pool2d(x, kernel_size=3, stride=2)], 1)


class InceptionE(nn.Module):
    """Branches that split again into 1x3 and 3x1."""

    def __init__(self, inp: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(inp, 16, kernel_size=1)
        self.branch3x3_1 = BasicConv2d(inp, 16, kernel_size=1)
        self.branch3x3_2a = BasicConv2d(16, 16, kernel_size=(1, 3), padding=(0, 1))
        self.branch3x3_2b = BasicConv2d(16, 16, kernel_size=(3, 1), padding=(1, 0))
        self.branch_pool = BasicConv2d(inp, 16, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3_1(x)
        branch3x3 = torch.cat([self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3)], 1)
        branch_pool = self.branch_pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([self.branch1x1(x), branch3x3, branch_pool], 1)


class InceptionV3(nn.Module):
    """Inception-v3 for 64x64 inputs: its second stem pool is left out, all else is there once."""

    def __init__(self, classes: int = 10, transform_input: bool = True):
        super().__init__()
        self.transform_input = transform_input
        self.Conv2d_1a_3x3 = BasicConv2d(3, 8, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(8, 8, kernel_size=3)
        self.Conv2d_2b_3x3 = BasicConv2d(8, 16, kernel_size=3, padding=1)
        self.maxpool1 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Conv2d_3b_1x1 = BasicConv2d(16, 16, kernel_size=1)
        self.Conv2d_4a_3x3 = BasicConv2d(16, 24, kernel_size=3)
        self.Mixed_5b = InceptionA(24, 4)
        self.Mixed_6a = InceptionB(32)
        self.Mixed_6b = InceptionC(60, 8)
        self.Mixed_7a = InceptionD(48)
        self.Mixed_7b = InceptionE(76)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(p=0.5)
        self.fc = nn.Linear(64, classes)

    def _transform_input(self, x: Tensor) -> Tensor:
        if self.transform_input:
            x_ch0 = torch.unsqueeze(x[:, 0], 1) * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
            x_ch1 = torch.unsqueeze(x[:, 1], 1) * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
            x_ch2 = torch.unsqueeze(x[:, 2], 1) * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
            x = torch.cat((x_ch0, x_ch1, x_ch2), 1)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self._transform_input(x)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.maxpool1(x)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = self.Mixed_6a(self.Mixed_5b(x))
        x = self.Mixed_6b(x)
        x = self.Mixed_7b(self.Mixed_7a(x))
        x = self.avgpool(x)
        x = self.dropout(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


class GoogLeNetBlock(nn.Module):
    def __init__(self, inp: int):
        super().__init__()
        self.branch1 = BasicConv2d(inp, 8, kernel_size=1)
        self.branch2 = nn.Sequential(BasicConv2d(inp, 8, kernel_size=1), BasicConv2d(8, 12, kernel_size=3, padding=1))
        self.branch3 = nn.Sequential(BasicConv2d(inp, 4, kernel_size=1), BasicConv2d(4, 6, kernel_size=5, padding=2))
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True), BasicConv2d(inp, 6, kernel_size=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class InceptionAux(nn.Module):
    def __init__(self, inp: int, classes: int):
        super().__init__()
        self.conv = BasicConv2d(inp, 8, kernel_size=1)
        self.fc1, self.fc2 = nn.Linear(8 * 4 * 4, 16), nn.Linear(16, classes)
        self.dropout = nn.Dropout(p=0.7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.adaptive_avg_pool2d(x, (4, 4)))
        x = torch.flatten(x, 1)
        x = self.dropout(F.relu(self.fc1(x), inplace=True))
        return self.fc2(x)


class GoogLeNet(nn.Module):
    """Ceil-mode pools, and auxiliary heads that work in training only: dead weights in eval."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.conv1 = BasicConv2d(3, 8, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = BasicConv2d(8, 8, kernel_size=1)
        self.conv3 = BasicConv2d(8, 16, kernel_size=3, padding=1)
        self.inception3a = GoogLeNetBlock(16)
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception4a = GoogLeNetBlock(32)
        self.aux1, self.aux2 = InceptionAux(32, classes), InceptionAux(32, classes)
        self.maxpool4 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.inception5a = GoogLeNetBlock(32)
        self.dropout, self.fc = nn.Dropout(0.2), nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None, Tensor | None]:
        x = self.maxpool1(self.conv1(x))
        x = self.inception3a(self.conv3(self.conv2(x)))
        aux1: Tensor | None = None
        if self.aux1 is not None and self.training:
            aux1 = self.aux1(x)
        x = self.inception4a(self.maxpool3(x))
        aux2: Tensor | None = None
        if self.aux2 is not None and self.training:
            aux2 = self.aux2(x)
        x = self.inception5a(self.maxpool4(x))
        x = F.adaptive_avg_pool2d(x, 1)
        x = self.fc(self.dropout(torch.flatten(x, 1)))
        if self.training:
            return x, aux2, aux1
        return x


class SeparableConv2d(nn.Module):
    def __init__(self, inp: int, out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inp, inp, 3, 1, 1, groups=inp, bias=False)
        self.pointwise = nn.Conv2d(inp, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.conv1(x))


class XceptionBlock(nn.Module):
    """A `rep` list whose first ReLU is made not-in-place or dropped, as in Cadene's Xception."""

    def __init__(self, inp: int, out: int, stride: int, start_with_relu: bool = True):
        super().__init__()
        self.skip = nn.Conv2d(inp, out, 1, stride=stride, bias=False) if out != inp or stride != 1 else None
        self.skipbn = nn.BatchNorm2d(out)
        rep: list[nn.Module] = []
        for a, b in ((inp, out), (out, out)):
            rep += [nn.ReLU(inplace=True), SeparableConv2d(a, b), nn.BatchNorm2d(b)]
        rep = [nn.ReLU(inplace=False), *rep[1:]] if start_with_relu else rep[1:]
        if stride != 1:
            rep.append(nn.MaxPool2d(3, stride, 1))
        self.rep = nn.Sequential(*rep)

    def forward(self, inp: Tensor) -> Tensor:
        x = self.rep(inp)
        skip = self.skipbn(self.skip(inp)) if self.skip is not None else inp
        x += skip
        return x


class Xception(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 0, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.block1 = XceptionBlock(12, 16, 2, start_with_relu=False)
        self.block2 = XceptionBlock(16, 16, 1)
        self.block3 = XceptionBlock(16, 24, 2)
        self.conv4, self.bn4 = SeparableConv2d(24, 32), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = self.block3(self.block2(self.block1(x)))
        x = self.bn4(self.conv4(x)).relu_()
        x = F.adaptive_avg_pool2d(x, (1, 1))
        x = x.view(x.size(0), -1)
        return self.fc(x)


ARCHITECTURES = {"inception_v3": Entry(InceptionV3, floats(3, 64, 64))}
FAMILIES = {
    "googlenet": Entry(GoogLeNet, floats(3, 64, 64)),
    "xception": Entry(Xception, floats(3, 48, 48)),
}
