"""A small network and wrong passes for the tests of the diagnosis: each is off at one place that is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompile.contracts import Exact
from fxcompile.layers import shallow_copy
from fxcompile.program import Program
from fxcompile.rewriting import Pass, Replacement, Site, Skip


class Chain(nn.Module):
    """Three 5x5 convolutions, each with a batch norm and a ReLU6, and a head.

    The first and the last are stacks of two 3x3 with two channels between, so `stack-kernels(rank=2)` loses nothing
    there; the second is no such thing.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(4, 4, 5, padding=2, bias=False) for _ in range(3))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(4) for _ in range(3))
        self.act1, self.act2, self.act3 = (nn.ReLU6() for _ in range(3))
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            for conv in (self.conv1, self.conv3):
                conv.weight.copy_(composed(generator, inner=2))
            self.conv2.weight.normal_(0, 0.1, generator=generator)
            for norm in (self.bn1, self.bn2, self.bn3):
                norm.weight.uniform_(0.5, 1.5, generator=generator)
                norm.bias.normal_(0, 0.2, generator=generator)
                norm.running_var.uniform_(0.5, 2.0, generator=generator)
            self.head.weight.normal_(generator=generator)
            self.head.bias.normal_(generator=generator)
        self.eval()

    def stage1(self, x: Tensor) -> Tensor:
        return self.act1(self.bn1(self.conv1(x)))

    def stage2(self, x: Tensor) -> Tensor:
        return self.act2(self.bn2(self.conv2(x)))

    def stage3(self, x: Tensor) -> Tensor:
        return self.act3(self.bn3(self.conv3(x)))

    def end(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))

    def forward(self, image: Tensor) -> Tensor:
        return self.end(self.stage3(self.stage2(self.stage1(image))))


def composed(generator: torch.Generator, inner: int) -> Tensor:
    """A 5x5 weight [4, 4, 5, 5] that is a 3x3 after a 3x3 with `inner` channels between."""
    first = torch.randn(inner, 4, 3, 3, generator=generator)
    second = torch.randn(4, inner, 3, 3, generator=generator)
    weight = F.conv_transpose2d(first.transpose(0, 1), second.transpose(0, 1)).transpose(0, 1)
    return weight / weight.std() * 0.1


class Forgetful(Pass):
    """conv, batch norm -> conv; at one layer it forgets the batch norm's eps."""

    name: ClassVar = "forgetful-fold"
    contract: ClassVar = Exact()
    where: str = "conv2"

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        for node, _ in program.layers(nn.Conv2d):
            following = next(iter(node.users))
            if isinstance(program.layer(following), nn.BatchNorm2d):
                yield Site.of(program, node, following)

    def rewrite(self, site: Site) -> Replacement:
        conv, norm = site.layers
        return [folded(conv, norm, 0.0 if site.name == self.where else norm.eps)]


def folded(conv: Any, norm: Any, eps: float) -> nn.Module:
    """A convolution without bias and its batch norm as one convolution."""
    scale = norm.weight.double() / (norm.running_var.double() + eps).sqrt()
    made = shallow_copy(conv)
    weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
    bias = norm.bias.double() - norm.running_mean.double() * scale
    made.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    made.register_parameter("bias", nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False))
    return made


class Unclamped(Pass):
    """ReLU6 -> ReLU: right as long as nothing exceeds 6, as calibration data may have it."""

    name: ClassVar = "unclamp"
    contract: ClassVar = Exact()

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        for node, _ in program.layers(nn.ReLU6):
            yield Site.of(program, node)

    def rewrite(self, site: Site) -> Replacement:
        return [nn.ReLU()]


class Dropped(Pass):
    """Removes activations, which compute something."""

    name: ClassVar = "drop-activation"
    contract: ClassVar = Exact()

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        for node, _ in program.layers(nn.ReLU6):
            yield Site.of(program, node)

    def rewrite(self, site: Site) -> Replacement:
        return []


class Meddling(Pass):
    """Puts a batch norm in its own place, and takes out the last activation on the side."""

    name: ClassVar = "meddle"
    contract: ClassVar = Exact()

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        for node, _ in program.layers(nn.BatchNorm2d):
            yield Site.of(program, node)

    def rewrite(self, site: Site) -> Replacement:
        for node in list(site.node.graph.nodes):
            if getattr(node.target, "__name__", "") == "mean":
                before = node.all_input_nodes[0]
                if before.target == "act3":
                    node.replace_input_with(before, before.all_input_nodes[0])
        return [site.layer]
