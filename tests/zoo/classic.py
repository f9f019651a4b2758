"""Networks before batch norm and their kin: LeNet-5, AlexNet, local response norm, maxout, NIN, SqueezeNet."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Entry, floats


class LeNet5(nn.Module):
    """As in the first PyTorch tutorial: sizes counted by `num_flat_features`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 40)
        self.fc2 = nn.Linear(40, 30)
        self.fc3 = nn.Linear(30, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, self.num_flat_features(x))
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return F.log_softmax(self.fc3(x), dim=1)

    def num_flat_features(self, x: Tensor) -> int:
        size = x.size()[1:]  # all dimensions except the batch dimension
        num_features = 1
        for s in size:
            num_features *= s
        return num_features


class AlexNet(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, kernel_size=11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(16, 24, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(24, 24, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((3, 3))
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(24 * 3 * 3, 48),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(48, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = x.view(x.size(0), 24 * 3 * 3)
        return self.classifier(x)


class CaffeNet(nn.Module):
    """The two-tower AlexNet of Caffe: local response norms, grouped convolutions, ceil-mode pools."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 7, 2), nn.Conv2d(16, 24, 5, padding=2, groups=2)
        self.conv3, self.conv4 = nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1, groups=2)
        self.lrn1, self.lrn2 = nn.LocalResponseNorm(5, 1e-2, 0.75), nn.LocalResponseNorm(5, 1e-2, 0.75)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.fc = nn.Linear(16 * 2 * 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lrn1(self.pool(F.relu(self.conv1(x))))
        x = self.lrn2(self.pool(F.relu(self.conv2(x))))
        x = F.relu(self.conv3(x), inplace=True)
        x = self.pool(self.conv4(x).clamp_(min=0))
        return F.softmax(self.fc(x.reshape(x.shape[0], -1)), dim=-1)


class Maxout(nn.Module):
    """The largest of k linear maps (Goodfellow et al. 2013), by `view` and `max`, which returns a pair."""

    def __init__(self, inp: int, out: int, k: int) -> None:
        super().__init__()
        self.conv, self.out, self.k = nn.Conv2d(inp, out * k, 3, padding=1), out, k

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        n, _, h, w = y.shape
        m, _ = y.view(n, self.out, self.k, h, w).max(dim=2)
        return m


class MaxoutNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Maxout(3, 8, 2), nn.MaxPool2d(2), nn.Dropout2d(0.2), Maxout(8, 12, 4), nn.MaxPool2d(2), Maxout(12, 12, 2)
        )
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return self.fc(torch.amax(x, dim=(-2, -1)))


class NIN(nn.Module):
    """Network in network: 1x1 convolutions and a global average instead of linear layers."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.classifier = nn.Sequential(
            nn.Conv2d(3, 16, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 12, 1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Dropout(0.5, inplace=True),
            nn.Conv2d(12, 16, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 1),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(3, stride=2, padding=1),
            nn.Dropout(0.5),
            nn.Conv2d(16, classes, 1),
            nn.AvgPool2d(8, stride=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.classifier(x)
        return x.squeeze(-1).squeeze(-1)


class Fire(nn.Module):
    def __init__(self, inp: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inp, squeeze, kernel_size=1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeeze, expand, kernel_size=1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(squeeze, expand, kernel_size=3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat(
            [self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1
        )


class SqueezeNet(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, kernel_size=3, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(16, 4, 12),
            Fire(24, 6, 12),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(24, 8, 16),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(p=0.5),
            nn.Conv2d(32, classes, kernel_size=1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d((1, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.classifier(x)
        return torch.flatten(x, 1)


FAMILIES = {
    "lenet5": Entry(LeNet5, floats(1, 32, 32)),
    "alexnet": Entry(AlexNet, floats(3, 64, 64)),
    "caffenet_lrn": Entry(CaffeNet, floats(3, 48, 48)),
    "maxout": Entry(MaxoutNet, floats(3, 24, 24)),
    "nin": Entry(NIN, floats(3, 32, 32)),
    "squeezenet": Entry(SqueezeNet, floats(3, 48, 48)),
}
