"""One and three dimensions: CRNN for text, WaveNet, TCN, a 1-d ResNet for ECG, C3D and R(2+1)D for video."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Entry, floats


class BidirectionalLSTM(nn.Module):
    def __init__(self, inp: int, hidden: int, out: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inp, hidden, bidirectional=True)
        self.embedding = nn.Linear(hidden * 2, out)

    def forward(self, x: Tensor) -> Tensor:
        recurrent, _ = self.rnn(x)
        t, b, h = recurrent.size()
        t_rec = recurrent.view(t * b, h)
        output = self.embedding(t_rec)
        return output.view(t, b, -1)


class CRNN(nn.Module):
    """Text lines [B, 1, 32, W] -> log-probabilities [T, B, C]; pools that halve height only."""

    def __init__(self, classes: int = 11, hidden: int = 12) -> None:
        super().__init__()
        cnn = nn.Sequential()
        channels = (1, 8, 12, 16, 16)
        for i in range(4):
            cnn.add_module(
                f"conv{i}", nn.Conv2d(channels[i], channels[i + 1], 2 if i == 3 else 3, 1, 0 if i == 3 else 1)
            )
            if i >= 2:
                cnn.add_module(f"batchnorm{i}", nn.BatchNorm2d(channels[i + 1]))
            cnn.add_module(f"relu{i}", nn.ReLU(True))
            if i < 2:
                cnn.add_module(f"pooling{i}", nn.MaxPool2d(2, 2))
            elif i == 2:
                cnn.add_module("pooling2", nn.MaxPool2d((4, 2), (4, 1), (0, 1)))
        self.cnn = cnn
        self.rnn = nn.Sequential(BidirectionalLSTM(16, hidden, hidden), BidirectionalLSTM(hidden, hidden, classes))

    def forward(self, x: Tensor) -> Tensor:
        conv = self.cnn(x)
        _, _, h, _ = conv.size()
        assert h == 1, "the height of conv must be 1"
        conv = conv.squeeze(2)
        conv = conv.permute(2, 0, 1)  # [w, b, c]
        output = self.rnn(conv)
        return F.log_softmax(output, dim=2)


class GatedBlock(nn.Module):
    def __init__(self, channels: int, skip: int, dilation: int) -> None:
        super().__init__()
        self.padding = dilation
        self.conv = nn.Conv1d(channels, 2 * channels, 2, dilation=dilation)
        self.res_conv, self.skip_conv = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, skip, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        residual = x
        y = self.conv(F.pad(x, (self.padding, 0)))
        filtered, gate = torch.chunk(y, 2, dim=1)
        y = torch.tanh(filtered) * torch.sigmoid(gate)
        s = self.skip_conv(y)
        return (self.res_conv(y) + residual) * 0.5**0.5, s


class WaveNet(nn.Module):
    """Causal dilated convolutions, gated; skips summed by `sum()` over a list."""

    def __init__(self, channels: int = 8, skip: int = 12, classes: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, channels, 1)
        self.blocks = nn.ModuleList([GatedBlock(channels, skip, 2**i) for i in (0, 1, 2, 3, 0, 1)])
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(skip, skip, 1), nn.ReLU(), nn.Conv1d(skip, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skips = []
        for block in self.blocks:
            x, s = block(x)
            skips.append(s)
        return self.last(sum(skips))


class Chomp1d(nn.Module):
    def __init__(self, chomp_size: int) -> None:
        super().__init__()
        self.chomp_size = chomp_size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.chomp_size].contiguous()


class TemporalBlock(nn.Module):
    """TCN (Bai et al. 2018): weight-normed convolutions padded on both sides, the future chopped off."""

    def __init__(self, inp: int, out: int, dilation: int, kernel: int = 3) -> None:
        super().__init__()
        norm, pad = nn.utils.parametrizations.weight_norm, (kernel - 1) * dilation
        self.conv1 = norm(nn.Conv1d(inp, out, kernel, padding=pad, dilation=dilation))
        self.conv2 = norm(nn.Conv1d(out, out, kernel, padding=pad, dilation=dilation))
        self.net = nn.Sequential(
            self.conv1, Chomp1d(pad), nn.ReLU(), nn.Dropout(0.2), self.conv2, Chomp1d(pad), nn.ReLU(), nn.Dropout(0.2)
        )
        self.downsample = nn.Conv1d(inp, out, 1) if inp != out else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        res = x if self.downsample is None else self.downsample(x)
        return F.relu(out + res)


class TCN(nn.Module):
    """The layers of a block are registered twice: under their own name and in `net`."""

    def __init__(self) -> None:
        super().__init__()
        self.tcn = nn.Sequential(TemporalBlock(4, 8, 1), TemporalBlock(8, 8, 2), TemporalBlock(8, 12, 4))
        self.linear = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.tcn(x)[:, :, -1])


class ECGBlock(nn.Module):
    def __init__(self, inp: int, out: int, downsample: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inp, out, 9, padding=4, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm1d(out), nn.BatchNorm1d(out)
        self.conv2 = nn.Conv1d(out, out, 9, stride=downsample, padding=4, bias=False)
        self.skip = nn.Sequential(nn.MaxPool1d(downsample, stride=downsample), nn.Conv1d(inp, out, 1, bias=False))
        self.relu, self.dropout = nn.ReLU(), nn.Dropout(0.2)

    def forward(self, xy: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = xy
        y = self.skip(y)
        x = self.dropout(self.relu(self.bn1(self.conv1(x))))
        x = self.conv2(x)
        x += y
        y = x
        x = self.dropout(self.relu(self.bn2(x)))
        return x, y


class ECGResNet(nn.Module):
    """ResNet1d for 12-lead ECG (Ribeiro et al. 2020): blocks in a `Sequential` pass a pair along."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(12, 8, 9, padding=4, stride=2, bias=False), nn.BatchNorm1d(8)
        self.res_blocks = nn.Sequential(ECGBlock(8, 12, 4), ECGBlock(12, 16, 4))
        self.lin = nn.Linear(16 * 8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x, _ = self.res_blocks((x, x))
        x = x.view(x.size(0), -1)
        return self.lin(x)


class C3D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 8, kernel_size=(3, 3, 3), padding=(1, 1, 1))
        self.pool1 = nn.MaxPool3d(kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.conv2 = nn.Conv3d(8, 12, kernel_size=(3, 3, 3), padding=(1, 1, 1))
        self.bn2 = nn.BatchNorm3d(12)
        self.pool2 = nn.MaxPool3d(kernel_size=(2, 2, 2), stride=(2, 2, 2), padding=(0, 1, 1))
        self.fc6, self.fc7 = nn.Linear(12 * 4 * 5 * 5, 24), nn.Linear(24, 7)
        self.relu, self.dropout = nn.ReLU(), nn.Dropout(p=0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu(self.conv1(x)))
        x = self.pool2(self.relu(self.bn2(self.conv2(x))))
        x = x.view(-1, 12 * 4 * 5 * 5)
        x = self.dropout(self.relu(self.fc6(x)))
        return self.fc7(x)


class Conv2Plus1D(nn.Sequential):
    def __init__(self, inp: int, out: int, mid: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(inp, mid, kernel_size=(1, 3, 3), stride=(1, stride, stride), padding=(0, 1, 1), bias=False),
            nn.BatchNorm3d(mid),
            nn.ReLU(inplace=True),
            nn.Conv3d(mid, out, kernel_size=(3, 1, 1), stride=(stride, 1, 1), padding=(1, 0, 0), bias=False),
        )


class VideoBlock(nn.Module):
    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        mid = (inp * out * 27) // (inp * 9 + 3 * out)
        self.conv1 = nn.Sequential(Conv2Plus1D(inp, out, mid, stride), nn.BatchNorm3d(out), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(Conv2Plus1D(out, out, mid), nn.BatchNorm3d(out))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inp != out:
            self.downsample = nn.Sequential(nn.Conv3d(inp, out, 1, stride, bias=False), nn.BatchNorm3d(out))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.conv2(self.conv1(x))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


class R2Plus1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 6, kernel_size=(1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False),
            nn.BatchNorm3d(6),
            nn.ReLU(inplace=True),
            nn.Conv3d(6, 8, kernel_size=(3, 1, 1), stride=(1, 1, 1), padding=(1, 0, 0), bias=False),
            nn.BatchNorm3d(8),
            nn.ReLU(inplace=True),
        )
        self.layer1, self.layer2 = VideoBlock(8, 8, 1), VideoBlock(8, 12, 2)
        self.avgpool, self.fc = nn.AdaptiveAvgPool3d((1, 1, 1)), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        x = self.avgpool(x)
        x = x.flatten(1)
        return self.fc(x)


FAMILIES = {
    "crnn": Entry(CRNN, floats(1, 32, 48)),
    "wavenet": Entry(WaveNet, floats(1, 64)),
    "tcn_weight_norm": Entry(TCN, floats(4, 40)),
    "ecg_resnet1d": Entry(ECGResNet, floats(12, 256)),
    "c3d": Entry(C3D, floats(3, 8, 16, 16)),
    "r2plus1d": Entry(R2Plus1D, floats(3, 6, 20, 20)),
}
