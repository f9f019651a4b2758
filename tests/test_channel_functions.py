"""Channels are followed through each function, as far as removal stays zeroing, and no farther."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_channel_removal import holds
from torch import Tensor, nn

from fxcompile.channel_graph import ChannelGraph
from fxcompile.tracing import trace

Function = Callable[[Any, Any], Any]

BOTH: dict[str, Function] = {
    "add": lambda a, b: a + b,
    "maximum of two": lambda a, b: torch.max(a, b),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "power": lambda a, b: a.abs() ** b.clamp(0, 1),
    "one less": lambda a, b: 1 - a + b,
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.5),
    "sum over pixels": lambda a, b: a.sum(dim=[2, 3], keepdim=True) + b,
    "spread over pixels": lambda a, b: a.std(dim=(2, 3), keepdim=True) * b,
    "smallest of pixels": lambda a, b: a.amin((2, 3), keepdim=True) + b,
    "sums along a row": lambda a, b: a.cumsum(2) + b,
    "pixels taken round": lambda a, b: torch.roll(a, shifts=(1, 2), dims=(2, 3)) + b,
    "channels reversed": lambda a, b: torch.flip(a, [1]) + b,
    "pixels repeated": lambda a, b: a.repeat(1, 1, 2, 2) + b.repeat(1, 1, 2, 2),
    "normalised over pixels": lambda a, b: F.normalize(a, dim=2) + b,
    "products over channels": lambda a, b: torch.einsum("nchw,nchw->nhw", a, b).unsqueeze(1) + a,
    "attention of pixels": lambda a, b: torch.bmm(a.flatten(2).mT, b.flatten(2)).mean(2).view(-1, 1, 6, 6) * a,
    "chunks in another order": lambda a, b: torch.cat(a.chunk(3, 1)[::-1], 1) + b,
    "parts of sizes": lambda a, b: torch.cat(torch.split(a, [2, 4], 1), 1) + b,
    "slices joined": lambda a, b: torch.cat([a[:, 2:], a.narrow(1, 0, 2)], 1) + b,
    "stacked": lambda a, b: torch.stack([a, b], 1).sum(1),
    "rows one by one": lambda a, b: torch.stack(a.unbind(2), 2) + b,
    "tokens and back": lambda a, b: a.flatten(2).mT.mT.view_as(a) + b,
    "channels padded": lambda a, b: F.pad(a, (0, 0, 0, 0, 1, 2))[:, 1:7] + b,
    "pixels mirrored": lambda a, b: F.pad(a, (1, 1, 1, 1), mode="reflect")[:, :, 1:-1, 1:-1] + b,
    "resized": lambda a, b: F.interpolate(a, scale_factor=2) + F.interpolate(b, size=(12, 12)),
    "squeezed": lambda a, b: a.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1)[..., None, None] + b,
    "expanded": lambda a, b: a.mean((2, 3), keepdim=True).expand_as(b) + b,
    "layer norm of maps": lambda a, b: F.layer_norm(a, [6, 6]) + b,
    "instance norm": lambda a, b: F.instance_norm(a) + b,
    "gated": lambda a, b: F.glu(torch.cat([a, b], 1), 1) + b,
    "a part of each pair": lambda a, b: F.max_pool2d(a, 2, return_indices=True)[0] + F.avg_pool2d(b, 2),
}
"""All six channels of both operands go, one by one."""

TIED: dict[str, tuple[Function, int]] = {
    "shuffled by shape": (lambda a, b: a.view(-1, 2, 3, 6, 6).transpose(1, 2).reshape(-1, 6, 6, 6) + b, 3),
    "shuffled": (lambda a, b: torch.channel_shuffle(a, 2) + b, 3),
    "group norm": (lambda a, b: F.group_norm(a, 3) + b, 3),
}
"""Several channels go as one."""

FIXED: dict[str, tuple[Function, str]] = {
    "softmax": (lambda a, b: a.softmax(1) * b, "takes the softmax over them"),
    "normalised over channels": (lambda a, b: F.normalize(a, dim=1) + b, "puts them together with what is no channel"),
    "channels taken round": (lambda a, b: torch.roll(a, 2, 1) + b, "takes them round"),
    "everything taken round": (lambda a, b: torch.roll(a, 1) + a + b, "which they are not followed through"),
    "layer norm": (lambda a, b: F.layer_norm(a, [6, 6, 6]) + b, "takes statistics over all of them"),
    "response norm": (lambda a, b: F.local_response_norm(a, 2) + b, "slides over them"),
    "cosine": (lambda a, b: F.cosine_similarity(a, b, dim=1)[:, None] * a, "which they are not followed through"),
    "sorted": (lambda a, b: a.sort(dim=1)[0] + a + b, "which they are not followed through"),
    "counted from a mean": (lambda a, b: a * a.mean(1, keepdim=True) + b, "takes the mean over them"),
    "every second": (lambda a, b: a + torch.cat([a[:, ::2], b[:, ::2]], 1), "takes every 2th of them"),
}
"""None can go."""


class Two(nn.Module):
    """A function of the outputs of two layers, and a layer that takes it."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.third = nn.LazyConv2d(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(self.function(self.first(x), self.second(x)))
        return y


def graph_of(function: Function) -> ChannelGraph:
    torch.manual_seed(0)
    model, x = Two(function), torch.randn(2, 3, 6, 6)
    model(x)
    program = trace(model.eval(), (x,))
    holds(program)
    return ChannelGraph.of(program)


@pytest.mark.parametrize("name", BOTH)
def test_all_channels_go_one_by_one(name: str) -> None:
    graph = graph_of(BOTH[name])
    group = graph.group("first")
    assert (group.reason, len(group), group.channels) == ("", 6, 1)
    assert {member.owner for member in group.members} == {"first", "second", "third"}


@pytest.mark.parametrize("name", TIED)
def test_several_channels_go_as_one(name: str) -> None:
    function, units = TIED[name]
    group = graph_of(function).group("first")
    assert (group.reason, len(group), group.channels) == ("", units, 6 // units)


@pytest.mark.parametrize("name", FIXED)
def test_no_channel_can_go_and_the_reason_is_said(name: str) -> None:
    function, reason = FIXED[name]
    found = [group for group in graph_of(function).groups if group.name.startswith("first")]
    assert found
    assert all(reason in group.reason for group in found), [group.reason for group in found]


def test_what_goes_together_can_be_read() -> None:
    text = str(graph_of(lambda a, b: torch.channel_shuffle(a.relu(), 2) + b))
    assert text == "first: 6 channels in units of 2 of first, second; taken by third"
    text = str(graph_of(lambda a, b: a.softmax(1) * b))
    assert (
        text == "first: 6 channels of first, second; taken by third; none can go: 'softmax' takes the softmax over them"
    )
