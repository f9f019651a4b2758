"""Which channels go together, layer by layer: each network's channel graph as text, and held against zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Net
from test_channel_removal import holds
from torch import Tensor, nn

from fxcompile.channel_graph import ChannelGraph
from fxcompile.channel_removal import remove_channels
from fxcompile.tracing import trace


def graph_of(model: nn.Module, x: Tensor) -> ChannelGraph:
    torch.manual_seed(0)
    program = trace(model.eval(), (x,))
    holds(program)
    return ChannelGraph.of(program)


def chain(*layers: nn.Module, inputs: int = 3) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*layers), torch.randn(2, inputs, 8, 8)


def net(function: Callable[[Any, Tensor], Any], **layers: nn.Module) -> tuple[nn.Module, Tensor]:
    return Net(function, **layers), torch.randn(2, 3, 8, 8)


class Tied(nn.Module):
    """Two layers over one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.b.weight = self.a.weight
        self.c, self.d = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.a(x)) + self.d(self.b(x.flip(3)).relu())
        return y


def attention(self: Any, x: Tensor) -> Tensor:
    x = x.flatten(2).mT
    y: Tensor = self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
    return y


def gated(self: Any, x: Tensor) -> Tensor:
    y = self.body(x)
    z: Tensor = self.last(y * self.up(self.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid())
    return z


def residual(self: Any, x: Tensor) -> Tensor:
    y = self.stem(x).relu()
    y = (y + self.norm(self.b(self.a(y).relu()))).relu()
    z: Tensor = self.head(y)
    return z


NETWORKS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], str]] = {
    "chain": (
        lambda: chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.PReLU(6), nn.MaxPool2d(2), nn.Conv2d(6, 4, 1)),
        "0: 6 channels of 0; with 1, 2; taken by 4",
    ),
    "residual": (
        lambda: net(
            residual,
            stem=nn.Conv2d(3, 6, 3),
            a=nn.Conv2d(6, 5, 1),
            b=nn.Conv2d(5, 6, 1),
            norm=nn.BatchNorm2d(6),
            head=nn.Conv2d(6, 2, 1),
        ),
        """
        stem: 6 channels of stem, b; with norm; taken by a, head
        a: 5 channels of a; taken by b
        """,
    ),
    "concatenation": (
        lambda: net(
            lambda self, x: self.c(torch.cat([self.a(x), self.b(x)], 1)),
            a=nn.Conv2d(3, 4, 1),
            b=nn.Conv2d(3, 5, 1),
            c=nn.Conv2d(9, 2, 1),
        ),
        """
        a: 4 channels of a; taken by c
        b: 5 channels of b; taken by c
        """,
    ),
    "parts": (
        lambda: net(
            lambda self, x: self.b(self.a(x)[:, 1:4]) + self.c(self.a(x)[:, 3:]),
            a=nn.Conv2d(3, 6, 1),
            b=nn.Conv2d(3, 2, 1),
            c=nn.Conv2d(3, 2, 1),
        ),
        """
        a:1: 2 channels of a; taken by b
        a:3: 1 channels of a; taken by b, c
        a:4: 2 channels of a; taken by c
        a:0: 1 channels of a; taken by no layer
        """,
    ),
    "depthwise": (
        lambda: chain(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 12, 3, groups=4), nn.BatchNorm2d(12), nn.Conv2d(12, 2, 1)),
        "0: 4 channels of 0; with 1, 2; taken by 3",
    ),
    "more groups than channels in each": (
        lambda: chain(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 2, 1)),
        "0: 8 channels in units of 2 of 0; with 1; taken by 2",
    ),
    "fewer groups than channels in each": (
        lambda: chain(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 2, 1)),
        """
        0: 8 channels in units of 2 of 0; taken by 1
        1: 6 channels in units of 2 of 1; taken by 2
        """,
    ),
    "transposed, grouped": (
        lambda: chain(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Conv2d(6, 2, 1)),
        """
        0: 8 channels in units of 2 of 0; taken by 1
        1: 3 channels of 1; taken by 2
        """,
    ),
    "channel shuffle": (
        lambda: chain(nn.Conv2d(3, 6, 1), nn.ChannelShuffle(2), nn.Conv2d(6, 2, 1)),
        "0: 6 channels in units of 2 of 0; taken by 2",
    ),
    "squeeze and excitation": (
        lambda: net(
            gated,
            body=nn.Conv2d(3, 8, 1),
            down=nn.Conv2d(8, 3, 1),
            up=nn.Conv2d(3, 8, 1),
            last=nn.Conv2d(8, 2, 1),
        ),
        """
        body: 8 channels of body, up; taken by down, last
        down: 3 channels of down; taken by up
        """,
    ),
    "flattened": (
        lambda: chain(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5), nn.ReLU(), nn.Linear(5, 2)),
        """
        0: 4 channels of 0; taken by 2
        2: 5 channels of 2; taken by 4
        """,
    ),
    "group norm": (
        lambda: chain(nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), nn.Conv2d(6, 2, 1)),
        "0: 6 channels in units of 2 of 0; with 1; taken by 2",
    ),
    "layer norm": (
        lambda: chain(nn.Conv2d(3, 4, 1), nn.LayerNorm([4, 8, 8]), nn.Conv2d(4, 2, 1)),
        "0: 4 channels of 0; taken by 2; none can go: '1' takes statistics over all of them",
    ),
    "pixel shuffle": (
        lambda: chain(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 2, 1)),
        "0: 8 channels in units of 4 of 0; taken by 2",
    ),
    "pixel unshuffle": (
        lambda: chain(nn.Conv2d(3, 4, 1), nn.PixelUnshuffle(2), nn.Conv2d(16, 2, 1)),
        "0: 4 channels of 0; taken by 2",
    ),
    "gated linear unit": (
        lambda: chain(nn.Conv2d(3, 6, 1), nn.GLU(1), nn.Conv2d(3, 2, 1)),
        "0: 6 channels in units of 2 of 0; taken by 2",
    ),
    "attention": (
        lambda: net(attention, q=nn.Linear(3, 4), k=nn.Linear(3, 4), v=nn.Linear(3, 5), out=nn.Linear(5, 2)),
        """
        v: 5 channels of v; taken by out
        q: 4 channels of q, k; taken by no layer
        """,
    ),
    "recurrent": (
        lambda: (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Recurrent()), torch.randn(2, 8, 3)),
        "0: 4 channels of 0; taken by 2.rnn",
    ),
    "tied": (
        lambda: (Tied(), torch.randn(2, 3, 8, 8)),
        "a: 4 channels of a, b; taken by c, d",
    ),
    "called on its own output": (
        lambda: net(
            lambda self, x: self.last(self.again(self.again(self.first(x)).relu())),
            first=nn.Conv2d(3, 4, 1),
            again=nn.Conv2d(4, 4, 1),
            last=nn.Conv2d(4, 2, 1),
        ),
        "first: 4 channels of first, again; taken by again, last",
    ),
    "channels padded in a residual network": (
        lambda: net(
            lambda self, x: self.c(self.b(self.a(x)) + F.pad(self.a(x), (0, 0, 0, 0, 1, 1))),
            a=nn.Conv2d(3, 4, 1),
            b=nn.Conv2d(4, 6, 1),
            c=nn.Conv2d(6, 2, 1),
        ),
        """
        a: 4 channels of a, b; taken by b, c
        b: 2 channels of b; taken by c
        """,
    ),
    "an output": (
        lambda: net(lambda self, x: (self.a(x), self.b(self.a(x))), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)),
        "a: 4 channels of a; taken by b; none can go: they are an output of the model",
    ),
    "an operation that is not known": (
        lambda: net(
            lambda self, x: self.b(self.a(x)) + self.a(x).sort(1)[0][:, :2], a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)
        ),
        "a: 4 channels of a; taken by b; none can go: 'sort' calls sort, which they are not followed through",
    ),
}


class Recurrent(nn.Module):
    """The sequence of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 3, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rnn(x)[0]
        return y


@pytest.mark.parametrize("name", NETWORKS)
def test_what_goes_together(name: str) -> None:
    make, wanted = NETWORKS[name]
    torch.manual_seed(0)
    assert str(graph_of(*make())).split("\n") == [line.strip() for line in wanted.strip().split("\n")]


def test_queries_and_keys_may_lose_features_and_keep_their_scale() -> None:
    program = trace(NETWORKS["attention"][0]()[0].eval(), (torch.randn(2, 3, 8, 8),))
    remove_channels(ChannelGraph.of(program), {"q": [1, 2]})
    (node,) = (node for node in program.graph.nodes if node.target is F.scaled_dot_product_attention)
    assert node.kwargs["scale"] == 0.5


def test_a_unit_is_found_by_any_of_its_channels() -> None:
    graph = graph_of(*NETWORKS["depthwise"][0]())
    nodes = {node.target: node for node in graph.program.graph.nodes}
    for channel in range(12):
        found = graph.unit(nodes["1"], channel)
        assert found is not None
        assert (found[0].name, found[1]) == ("0", channel // 3)
    assert graph.unit(nodes["3"], 0) is None
    with pytest.raises(KeyError):
        graph.group("3")


def test_norms_that_only_count_channels_are_layers_of_their_group_too() -> None:
    norms = [nn.InstanceNorm2d(4), nn.GroupNorm(2, 4, affine=False), nn.BatchNorm2d(4)]
    graph = graph_of(*chain(nn.Conv2d(3, 4, 1), *norms, nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 1)))
    assert [graph.layers(group) for group in graph.groups] == [["0", "1", "2", "3", "4"], ["4", "5", "6"]]
