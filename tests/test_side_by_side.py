"""Layers in place, in networks that branch, split, join and call layers again."""

from __future__ import annotations

import pytest
import torch
import zoo
from culprits import Dropped
from fxcompile.passes import FoldBatchNorm, StackKernels
from helpers import Net, relative, with_layers
from torch import Tensor, nn

import fxcompile as fxc
from fxcompile import yardstick
from fxcompile.manager import PassManager
from fxcompile.rewriting import Pass
from fxcompile.side_by_side import LayerError


class Branched(nn.Module):
    """A residual, a concatenation, a constant, and a map cut in two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 5, padding=2)
        self.conv3 = nn.Conv2d(8, 8, 5, padding=2)
        self.head = nn.Linear(12, 5)
        self.register_buffer("offset", torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv1(x)) + self.offset
        z = self.conv2(y) + y
        first, second = torch.cat([z, self.conv3(z)], 1).split([10, 6], 1)
        joined = torch.cat([first, second.chunk(3, 1)[1]], 1)
        return self.head(joined.mean((2, 3)))


def layers_of(model: nn.Module, passes: list[Pass], x: Tensor) -> dict[str, LayerError]:
    found = fxc.bisect(fxc.trace(model, x[:2]), passes, case=x, emit=False, again=0, verify="off")
    return {item.name: item for item in found.layers}


def test_figures_in_a_network_that_branches_are_what_plain_torch_gives() -> None:
    net, x = Branched().eval(), torch.randn(40, 3, 10, 10)
    module = PassManager([StackKernels(rank=1)]).run(fxc.trace(net, x[:2])).module
    made = {name: nn.Sequential(*getattr(module, name).children()) for name in ("conv2", "conv3")}
    compiled = with_layers(net, **made)
    layers = layers_of(net, [StackKernels(rank=1)], x)
    y = torch.relu(net.conv1(x)) + net.offset
    z, now = net.conv2(y) + y, compiled.conv2(y) + y
    assert layers["conv3"].own == pytest.approx(relative(compiled.conv3(z), net.conv3(z)), rel=1e-4)
    assert layers["conv3"].error == pytest.approx(relative(compiled.conv3(now), net.conv3(z)), rel=1e-4)
    assert layers["conv3"].inherited == pytest.approx(relative(now, z), rel=1e-4)
    for name in made:
        assert layers[name].alone == pytest.approx(
            relative(with_layers(net, **{name: made[name]})(x), net(x)), rel=1e-4
        )
        mended = with_layers(compiled, **{name: getattr(net, name)})
        assert layers[name].mended == pytest.approx(relative(mended(x), net(x)), rel=1e-4)
    assert {name for name, item in layers.items() if item.own} == {"conv2", "conv3"}


def test_batches_cut_to_memory_give_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Branched().eval(), torch.randn(40, 3, 10, 10)
    whole = layers_of(net, [StackKernels(rank=1)], x)
    monkeypatch.setattr(yardstick, "MEMORY", 200_000)
    cut = layers_of(net, [StackKernels(rank=1)], x)
    for name, item in whole.items():
        for key in ("error", "own", "alone", "mended", "inherited"):
            wanted = getattr(item, key)
            assert getattr(cut[name], key) == (wanted and pytest.approx(wanted, rel=1e-4, abs=1e-7))


def test_where_two_values_became_one_a_layer_that_takes_both_is_not_measured_by_itself() -> None:
    net = Net(lambda self, x: self.act(self.conv(x)) + self.conv(x), conv=nn.Conv2d(3, 4, 3), act=nn.ReLU6()).eval()
    x = torch.randn(8, 3, 7, 7)
    layers = layers_of(net, [Dropped()], x)
    y = net.conv(x)
    assert layers["act"].own == pytest.approx(relative(y, net.act(y)), rel=1e-5)
    assert layers["add"].error == pytest.approx(relative(2 * y, net.act(y) + y), rel=1e-5)
    assert layers["add"].own == 0.0
    net.function = lambda self, x: (lambda y: self.act(y) + y)(self.conv(x))
    layers = layers_of(net, [Dropped()], x)
    assert layers["act"].own == pytest.approx(relative(y, net.act(y)), rel=1e-5)
    assert layers["act"].alone == pytest.approx(relative(2 * y, net.act(y) + y), rel=1e-5)
    assert layers["add"].error == pytest.approx(relative(2 * y, net.act(y) + y), rel=1e-5)
    assert layers["add"].own is None


@pytest.mark.parametrize("name", ["shufflenet_v2", "densenet", "crnn", "yolov8", "vit_conv_stem", "res2net"])
def test_on_real_architectures_exact_passes_leave_nothing_but_rounding(name: str) -> None:
    torch.manual_seed(0)
    args, kwargs = zoo.example_inputs(name)
    program = fxc.trace((zoo.ARCHITECTURES | zoo.FAMILIES)[name](), args, kwargs)
    found = fxc.bisect(program, [FoldBatchNorm()], emit=False, verify="off")
    assert not found.is_off
    assert sum(bool(item.by) for item in found.layers) >= found.passes[0].rewritten > 0
    floats = [item for item in found.layers if item.own is not None]
    assert len(floats) > 0.9 * len(found.layers)
    assert max(item.own for item in floats if item.own is not None) < 1e-6
