"""Taking channels out gives what zeros in their place give, in float64, whatever network they are in."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import zoo
from torch import Tensor, nn
from zeroing import zeroed
from zoo.pretrained import load_crepe_tiny, load_onet, load_rnet

from fxcompile.channel_graph import ChannelGraph
from fxcompile.channel_removal import remove_channels
from fxcompile.errors import FxcompileError, UsageError
from fxcompile.layers import as_double
from fxcompile.program import FEATURE, PART, Program, part_of
from fxcompile.testing.growing import RandomPicker, grow
from fxcompile.tracing import trace


def double(program: Program) -> Program:
    copied = program.snapshot()
    copied.module.double()
    return replace(copied, examples=tuple(map(as_double, copied.examples)))


def drawn(graph: ChannelGraph, seed: int) -> dict[str, list[int]]:
    """Some units of each group that can lose any, not all of them."""
    choice = random.Random(seed)
    groups = [group for group in graph.all if not group.reason and len(group) > 1]
    return {group.name: choice.sample(range(len(group)), choice.randint(1, len(group) - 1)) for group in groups}


def difference(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """The largest, relative to the largest value of its output."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.isnan(), b.isnan())
        if a.numel():
            a, b = (item.double().nan_to_num(0.0, 0.0, 0.0) for item in (a, b))
            worst = max(worst, float((a - b).abs().max()) / max(float(b.abs().max()), 1e-3))
    return worst


def holds(program: Program, seed: int = 0, in_turn: bool = True) -> int:
    """Every group in turn, then all at once, each held against zeros; how many groups there were."""
    program = double(program)
    graph = ChannelGraph.of(program)
    gone = drawn(graph, seed)
    for some in [*({name: units} for name, units in gone.items() if in_turn), gone]:
        copied = program.snapshot()
        remove_channels(ChannelGraph.of(copied), some)
        assert difference(copied.outputs(*program.examples), zeroed(graph, some).outputs(*program.examples)) < 1e-11, (
            some
        )
    return len(gone)


NETWORKS = {**zoo.ARCHITECTURES, **zoo.FAMILIES}


@pytest.mark.parametrize("name", NETWORKS)
def test_removal_is_zeroing_in_every_network_of_the_zoo(name: str) -> None:
    args, kwargs = zoo.example_inputs(name)
    assert holds(trace(NETWORKS[name](), args, kwargs), in_turn=name in zoo.ARCHITECTURES) >= 1


@pytest.mark.parametrize("load", [load_rnet, load_onet, load_crepe_tiny])
def test_removal_is_zeroing_in_networks_with_real_weights(load: Callable[[], tuple[nn.Module, tuple[Tensor]]]) -> None:
    model, examples = load()
    assert holds(trace(model, examples)) >= 4


def test_removal_is_zeroing_in_drawn_networks() -> None:
    groups = 0
    for seed in range(200):
        network = grow(RandomPicker(seed))
        model, examples = network.build()
        try:
            program = trace(model, examples)
        except FxcompileError:
            continue
        groups += holds(program, seed)
    assert groups >= 20


def test_what_is_left_of_a_feature_is_said() -> None:
    """Each node still stands for its node of the original, and says which of its channels it has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    original = trace(model, (x,))
    program = original.snapshot()
    for step, units in enumerate(([1, 4], [0])):
        remove_channels(ChannelGraph.of(program), {"0": units})
        norm = next(node for node in program.graph.nodes if node.target == "1")
        assert norm.meta[FEATURE] == next(node.name for node in original.graph.nodes if node.target == "1")
        assert norm.meta[PART][1].tolist() == [[0, 2, 3, 5], [2, 3, 5]][step]
    whole = model[1](model[0](x))
    assert torch.equal(part_of(whole, norm), whole[:, [2, 3, 5]])
    assert all(PART not in node.meta for node in program.graph.nodes if node.target == "3")


class Both(nn.Module):
    """Two layers; the first one's output is an output, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        return y, self.third(self.second(y))


@pytest.mark.parametrize(
    ("name", "units", "said"),
    [
        ("second", range(5), "all channels of 'second' would go; leave one at least"),
        ("first", [0], "no channels of 'first' can go: they are an output of the model; leave it out"),
    ],
)
def test_what_cannot_go_is_refused_and_the_program_left(name: str, units: list[int], said: str) -> None:
    program = trace(Both().eval(), (torch.randn(1, 3, 4, 4),))
    text = program.module.code
    with pytest.raises(UsageError, match=said):
        remove_channels(ChannelGraph.of(program), {name: units})
    assert program.module.code == text
    assert program.module.second.weight.shape == (5, 6, 1, 1)
