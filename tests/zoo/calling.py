"""Ways of calling: two inputs and one trunk, keywords, nested outputs, tied weights, an int argument, containers."""

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Entry, Inputs, draw_normal, floats


def trunk(inp: int = 3, width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inp, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(inplace=True),
    )


class Siamese(nn.Module):
    """One trunk called twice; the head sees the distance."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = trunk(1)
        self.fc, self.out = nn.Linear(16, 8), nn.Linear(8, 1)

    def forward_once(self, x: Tensor) -> Tensor:
        output = self.cnn(x)
        output = F.adaptive_avg_pool2d(output, 1)
        output = output.view(output.size()[0], -1)
        return self.fc(output)

    def forward(self, input1: Tensor, input2: Tensor) -> tuple[Tensor, Tensor]:
        output1 = self.forward_once(input1)
        output2 = self.forward_once(input2)
        score = self.out(torch.abs(output1 - output2)).sigmoid()
        return F.pairwise_distance(output1, output2), score


class CrossCorrelation(nn.Module):
    """SiamFC: the features of one input are the convolution kernels for the other's, by groups."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = trunk()
        self.scale = 0.05

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        z, x = self.backbone(z), self.backbone(x)
        nz = z.size(0)
        nx, c, h, w = x.size()
        x = x.view(-1, nz * c, h, w)
        out = F.conv2d(x, z, groups=nz)
        return out.view(nx, -1, out.size(-2), out.size(-1)) * self.scale


class MultiModal(nn.Module):
    """Keyword inputs, one of them optional, and a dict of dicts out."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.table = trunk(), nn.Linear(5, 16)
        self.norm = nn.BatchNorm1d(32)
        self.heads = nn.ModuleDict({"age": nn.Linear(32, 1), "kind": nn.Linear(32, 4)})

    def forward(
        self, image: Tensor, *, table: Tensor, mask: Tensor | None = None, return_features: bool = True
    ) -> dict[str, Any]:
        features = self.image(image)
        if mask is not None:
            features = features * mask
        joined = torch.cat([features.mean((2, 3)), torch.relu(self.table(table))], dim=-1)
        joined = self.norm(joined)
        outputs: dict[str, Any] = {"heads": {name: head(joined) for name, head in self.heads.items()}}
        if return_features:
            outputs["features"] = {"map": features, "pair": (joined, [joined.argmax(1)])}
        return outputs


class Tied(nn.Module):
    """A convolutional auto-encoder whose decoder uses the encoder's weights, and two layers sharing one Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.mid1, self.mid2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.mid2.weight = self.mid1.weight
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.bias = nn.Parameter(torch.randn(3) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.encoder(x))
        y = F.relu(self.bn1(self.mid1(y)))
        y = F.relu(self.bn2(self.mid2(y)))
        return F.conv_transpose2d(y, self.encoder.weight, self.bias, stride=2, padding=1, output_padding=1)


class Recurrent(nn.Module):
    """DRCN-like: the same convolution and batch norm applied `steps` times, `steps` an int argument of `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.bn = nn.Conv2d(3, 8, 5, padding=2), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, steps: int) -> Tensor:
        h = F.relu(self.stem(x))
        first = h
        for _ in range(steps):
            h = F.relu(self.bn(self.conv(h))) + first
        if steps > 2:
            h = h / steps
        return self.last(h) + x


class Containers(nn.Module):
    """Sequential indexing, slicing and iteration, ModuleDict, ParameterList, ParameterDict, `__getattr__`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = trunk()
        layers = [("conv", nn.Conv2d(16, 16, 3, padding=1)), ("act", nn.Hardswish())]
        self.named = nn.Sequential(OrderedDict(layers))
        self.choices = nn.ModuleDict({"max": nn.MaxPool2d(2), "avg": nn.AvgPool2d(2)})
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(1, 16, 1, 1)) for _ in range(2)])
        self.filters = nn.ParameterDict({"edge": nn.Parameter(torch.randn(4, 16, 3, 3) / 8)})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.body[0](x)
        x = self.body[1:3](x)
        for layer in list(self.body)[3:]:
            x = layer(x)
        x = self.named.act(self.named.conv(x))
        pooled = [self.choices[kind](x) * scale for kind, scale in zip(("max", "avg"), self.scales, strict=True)]
        edges = F.conv2d(pooled[0] + pooled[1], self.filters["edge"], padding="same")
        return edges, *pooled


class Features(NamedTuple):
    logits: Tensor
    embedding: Tensor


class Embedder(nn.Module):
    """A named tuple out, `einsum`, `F.normalize`, broadcasting against a parameter, and an assignment to a slice."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.features = trunk()
        self.weight = nn.Parameter(torch.randn(classes, 16))

    def forward(self, x: Tensor) -> Features:
        x = self.features(x)
        x = x.clone()
        x[:, :, 0, :] = 0.0  # drop the border row
        gem = x.clamp(min=1e-6).pow(3.0).mean(dim=[-2, -1]).pow(1.0 / 3.0)
        embedding = F.normalize(gem, p=2.0, dim=1)
        cosine = torch.einsum("nd,cd->nc", embedding, F.normalize(self.weight))
        return Features(cosine * 8.0, embedding)


class InputDependent(nn.Module):
    """A loop over spatial strips whose number comes from the input's width, and `torch.stack`."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classify = trunk(), nn.Conv1d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        strips = [strip.mean(dim=(2, 3)) for strip in torch.chunk(x, x.shape[-1] // 2, dim=-1)]
        return self.classify(torch.stack(strips, dim=-1)).softmax(dim=1)


def _siamese(batch: int) -> Inputs:
    return (draw_normal(batch, 1, 24, 24), draw_normal(batch, 1, 24, 24, seed=1)), {}


def _tracking(batch: int) -> Inputs:
    return (draw_normal(batch, 3, 16, 16), draw_normal(batch, 3, 32, 32, seed=1)), {}


def _modal(batch: int) -> Inputs:
    return (draw_normal(batch, 3, 24, 24),), {"table": draw_normal(batch, 5, seed=1)}


def _steps(batch: int) -> Inputs:
    return (draw_normal(batch, 3, 20, 20), 3), {}


FAMILIES = {
    "siamese": Entry(Siamese, _siamese),
    "siamfc": Entry(CrossCorrelation, _tracking),
    "multimodal_kwargs": Entry(MultiModal, _modal),
    "tied_weights": Entry(Tied, floats(3, 24, 24)),
    "int_argument": Entry(Recurrent, _steps),
    "containers": Entry(Containers, floats(3, 24, 24)),
    "embedder": Entry(Embedder, floats(3, 24, 24)),
    "strips": Entry(InputDependent, floats(3, 16, 32)),
}
