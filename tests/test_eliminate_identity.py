"""What computes nothing goes, what only looks so stays, and the network computes the same in float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from fxcompile.passes import EliminateIdentity
from helpers import Net, printed
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from fxcompile.manager import PassManager, Result
from fxcompile.program import Program
from fxcompile.tracing import trace


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 6, 6)), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def eliminated(model: nn.Module, x: Tensor, verify: Any = "raise") -> Result:
    """The model after the pass, which must compute the same to 1e-12 of the largest value, for a batch of any size."""
    model = model.double().eval()
    result = PassManager([EliminateIdentity()], verify=verify).run(trace(model, x))
    inputs = [x, torch.cat([x, -x]), x[:1]] if result.program.batch_is_free else [x]
    for item in inputs:
        wanted, given_ = model(item), result.module(item)
        assert wanted.shape == given_.shape
        assert wanted.dtype == given_.dtype
        assert (given_ - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    return result


def operations(program: Program) -> list[str]:
    """What the program computes with, layers by class and functions by name."""
    nodes = [node for node in program.graph.nodes if node.op in ("call_module", "call_function")]
    layers = [program.layer(node) for node in nodes]
    return [type(layer).__name__ if layer is not None else getattr(node.target, "__name__", str(node.target))
            for node, layer in zip(nodes, layers, strict=True)]  # fmt: skip


Case = Callable[[Any, Tensor], Any]

# what stands between a convolution and a tanh, and what is left of it

GOES: dict[str, tuple[Case, list[str]]] = {
    "identity": (lambda m, x: nn.Identity()(x), []),
    "dropout": (lambda m, x: F.dropout(x, 0.3, m.training), []),
    "dropout of channels": (lambda m, x: m.drop(x), []),
    "reshape to its own sizes": (lambda m, x: x.view(x.size(0), x.size(1), *x.shape[2:]), []),
    "reshape of the batch alone": (lambda m, x: x.reshape(-1, 5, 6, 6), []),
    "permute in order": (lambda m, x: x.permute(0, 1, 2, 3), []),
    "transpose of one axis": (lambda m, x: x.transpose(2, -2), []),
    "flatten of one axis": (lambda m, x: x.flatten(1, 1), []),
    "flatten and back": (lambda m, x: x.flatten(2).unflatten(2, (6, 6)), []),
    "expand to itself": (lambda m, x: x.expand(-1, 5, 6, 6), []),
    "squeeze of an axis that is longer": (lambda m, x: x.squeeze(1), []),
    "contiguous and clone": (lambda m, x: x.contiguous().clone(), []),
    "cast to its own dtype": (lambda m, x: x.to(x.dtype), []),
    "full slices": (lambda m, x: x[:, :][..., 0:], []),
    "all channels": (lambda m, x: x[:, :5], []),
    "cat of one": (lambda m, x: torch.cat([x], 1), []),
    "one chunk": (lambda m, x: torch.chunk(x, 1, 1)[0], []),
    "one split": (lambda m, x: torch.split(x, 5, 1)[0], []),
    "padding by nothing": (lambda m, x: F.pad(x, (0, 0, 0, 0)), []),
    "max pool of one pixel": (lambda m, x: F.max_pool2d(x, 1), []),
    "max pool of one pixel of a line": (lambda m, x: F.max_pool1d(x.flatten(2), 1), ["flatten"]),
    "average pool of one pixel of a line": (lambda m, x: F.avg_pool1d(x.flatten(2), 1), ["flatten"]),
    "max pool of one pixel of a volume": (lambda m, x: F.max_pool3d(x.unsqueeze(2), 1), ["unsqueeze"]),
    "average pool of one pixel of a volume": (lambda m, x: F.avg_pool3d(x.unsqueeze(2), 1), ["unsqueeze"]),
    "a reshape and a flatten that undoes it": (lambda m, x: x.mean(3).reshape(-1, 5, 2, 3).flatten(2), ["mean"]),
    "average pool of one pixel": (lambda m, x: F.avg_pool2d(x, (1, 1), 1), []),
    "adaptive pool of a pooled map": (
        lambda m, x: F.adaptive_max_pool2d(F.adaptive_avg_pool2d(x, 2), (2, 2)), ["AdaptiveAvgPool2d"]),
    "interpolation by one": (lambda m, x: F.interpolate(x, scale_factor=1.0, mode="bilinear"), []),
    "interpolation of a pooled map to its size": (
        lambda m, x: F.interpolate(F.adaptive_avg_pool2d(x, 3), size=(3, 3), mode="bicubic"), ["AdaptiveAvgPool2d"]),
    "pixel shuffle by one": (lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(x, 1), 1), []),
    "channel shuffle of one group": (lambda m, x: F.channel_shuffle(x, 1), []),
    "neutral numbers": (lambda m, x: (1 * x + 0.0) / 1 - 0, []),
    "first power": (lambda m, x: x**1, []),
    "permutations that cancel": (lambda m, x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), []),
    "permutations that do not": (lambda m, x: x.permute(0, 2, 3, 1).transpose(1, 3), ["permute"]),
    "permutations in a row": (
        lambda m, x: x.permute(0, 2, 3, 1).transpose(1, 2).transpose(0, 1).transpose(0, 3), ["permute"]),
    "permutations in a row that cancel": (
        lambda m, x: x.permute(0, 2, 3, 1).transpose(1, 2).transpose(1, 2).permute(0, 3, 1, 2), []),
    "reshapes in a row": (
        lambda m, x: x.flatten(2).reshape(-1, 5, 2, 18).reshape(-1, 10, 18).reshape(-1, 10, 3, 6), ["reshape"]),
    "reshapes in a row, and then a flatten": (
        lambda m, x: F.relu(x.reshape(-1, 5, 2, 18).reshape(-1, 15, 12).flatten(0, 1)), ["reshape", "flatten", "ReLU"]),
    "an unsqueeze and a squeeze": (lambda m, x: x.unsqueeze(2).squeeze(2), []),
    "a squeeze and an unsqueeze": (
        lambda m, x: x.mean(2, keepdim=True).squeeze(2).unsqueeze(-2), ["mean"]),
    "a negation twice": (lambda m, x: -torch.neg(x), []),
    "a roll by nothing": (lambda m, x: x.roll((0, 0), (1, 2)), []),
    "one repetition": (lambda m, x: x.repeat(1, 1, 1, 1).tile(1), []),
    "rounding twice": (lambda m, x: x.floor().floor() + x.round().round() + torch.sign(torch.sign(x)),
                       ["floor", "round", "add", "sign", "add"]),
    "two reshapes": (lambda m, x: x.reshape(-1, 5, 2, 18).reshape(-1, 10, 3, 6), ["reshape"]),
    "two reshapes that take the samples apart again": (
        lambda m, x: F.relu(x.flatten(0, 1)).reshape(-1, 6, 2, 3).reshape(-1, 5, 6, 6), ["flatten", "ReLU", "reshape"]),
    "ReLU twice": (lambda m, x: F.relu(F.relu(x)), ["ReLU"]),
    "one ReLU called twice": (lambda m, x: m.relu(m.relu(x)), ["ReLU"]),
    "ReLU of a max pool of a ReLU": (lambda m, x: F.relu(F.max_pool2d(F.relu(x), 2)), ["ReLU", "MaxPool2d"]),
    "ReLU of a padded average of a ReLU": (
        lambda m, x: F.relu(F.avg_pool2d(F.relu(x), 3, 1, 1)), ["ReLU", "AvgPool2d"]),
    "ReLU of a padded ReLU": (lambda m, x: F.relu(F.pad(F.relu(x), (1, 1), value=0.5)), ["ReLU", "pad"]),
    "ReLU of a reshaped ReLU6": (lambda m, x: F.relu(F.relu6(x).flatten(2)), ["ReLU6", "flatten"]),
    "ReLU6 twice": (lambda m, x: F.relu6(F.relu6(x)), ["ReLU6"]),
    "ReLU6 of a sigmoid": (lambda m, x: F.relu6(torch.sigmoid(x)), ["Sigmoid"]),
    "ReLU of a softmax": (lambda m, x: F.relu(F.softmax(x, 1)), ["Softmax"]),
    "ReLU of an exponential": (lambda m, x: F.relu(torch.exp(x)), ["exp"]),
    "ReLU of a square": (lambda m, x: F.relu(x**2), ["pow"]),
    "clamp of a tanh": (lambda m, x: torch.tanh(x).clamp(-1, 1), ["Tanh"]),
    "clamp from below of a ReLU": (lambda m, x: F.relu(x).clamp(min=0), ["ReLU"]),
    "hardtanh in a wider one": (lambda m, x: F.hardtanh(F.hardtanh(x, -1, 1), -2, 2), ["Hardtanh"]),
    "leaky ReLU of a ReLU": (lambda m, x: F.leaky_relu(F.relu(x), 0.1), ["ReLU"]),
    "absolute value of a ReLU": (lambda m, x: F.relu(x).abs(), ["ReLU"]),
    "what nothing uses": (lambda m, x: (F.relu(x * 2), x)[1], []),
}  # fmt: skip

STAYS: dict[str, tuple[Case, list[str]]] = {
    "a squeeze that would take a batch of one": (lambda m, x: x.squeeze(0), ["squeeze"]),
    "a squeeze of all axes": (lambda m, x: x.squeeze(), ["squeeze"]),
    "all samples but those of a larger batch": (lambda m, x: x[:2], ["getitem"]),
    "all pixels but those of a larger map": (lambda m, x: x[..., :6], ["getitem"]),
    "the first of the parts of a larger map": (lambda m, x: torch.split(x, 6, 3)[0], ["split", "getitem"]),
    "an adaptive pool to the size it just has": (lambda m, x: F.adaptive_avg_pool2d(x, (6, 6)), ["AdaptiveAvgPool2d"]),
    "an interpolation to the size it just has": (lambda m, x: F.interpolate(x, size=(6, 6)), ["interpolate"]),
    "an interpolation that rounds to its size": (
        lambda m, x: F.interpolate(x, scale_factor=1.05, mode="bilinear"), ["interpolate"]),
    "an average that counts otherwise": (lambda m, x: F.avg_pool2d(x, 1, divisor_override=2), ["AvgPool2d"]),
    "a pool of one pixel in two": (lambda m, x: F.max_pool2d(x, 1, 2), ["MaxPool2d"]),
    "a pool of one pixel in two, of a map of one": (
        lambda m, x: F.max_pool2d(x.mean((2, 3), keepdim=True), 1, 2), ["mean", "MaxPool2d"]),
    "a pool of the same size": (lambda m, x: F.max_pool2d(x, 3, 1, 1), ["MaxPool2d"]),
    "a tensor of ones": (lambda m, x: x * m.ones, ["mul"]),
    "a sum with itself": (lambda m, x: x + x, ["add"]),
    "zero times": (lambda m, x: x * 0 + 2 * x, ["mul", "mul", "add"]),
    "a cast": (lambda m, x: x.float(), ["to"]),
    "a square transposed": (lambda m, x: x.transpose(2, 3), ["permute"]),
    "a cat of two": (lambda m, x: torch.cat([x, x], 1), ["cat"]),
    "a crop": (lambda m, x: F.pad(x, (1, -1)), ["pad"]),
    "a channel shuffle": (lambda m, x: F.channel_shuffle(x, 5), ["ChannelShuffle"]),
    "a flip": (lambda m, x: x.flip(1), ["flip"]),
    "a squeeze that would take a batch of one, and an unsqueeze": (
        lambda m, x: x.squeeze(0).unsqueeze(1), ["squeeze", "unsqueeze"]),
    "an unsqueeze and another squeeze": (
        lambda m, x: x.mean(3, keepdim=True).unsqueeze(2).squeeze(4), ["mean", "unsqueeze", "squeeze"]),
    "rounding in another way": (lambda m, x: x.floor().ceil(), ["floor", "ceil"]),
    "rounding to other decimals": (
        lambda m, x: torch.round(torch.round(x, decimals=2), decimals=1), ["round", "round"]),
    "rounding decimals to whole numbers": (lambda m, x: torch.round(torch.round(x, decimals=1)), ["round", "round"]),
    "a roll": (lambda m, x: x.roll((0, 1), (1, 2)), ["roll"]),
    "a repetition": (lambda m, x: x.repeat(1, 2, 1, 1), ["repeat"]),
    "GELU twice": (lambda m, x: F.gelu(F.gelu(x)), ["GELU", "GELU"]),
    "tanh twice": (lambda m, x: torch.tanh(torch.tanh(x)), ["Tanh", "Tanh"]),
    "ReLU of a leaky one": (lambda m, x: F.relu(F.leaky_relu(x)), ["LeakyReLU", "ReLU"]),
    "ReLU6 of a ReLU": (lambda m, x: F.relu6(3 * F.relu(x)), ["ReLU", "mul", "ReLU6"]),
    "ReLU6 of a ReLU alone": (lambda m, x: F.relu6(F.relu(x)), ["ReLU", "ReLU6"]),
    "ReLU of a negative ReLU": (lambda m, x: F.relu(-F.relu(x)), ["ReLU", "neg", "ReLU"]),
    "ReLU of a ReLU padded below": (lambda m, x: F.relu(F.pad(F.relu(x), (1, 1), value=-0.5)), ["ReLU", "pad", "ReLU"]),
    "ReLU of a cubic one": (
        lambda m, x: F.relu(F.interpolate(F.relu(x), scale_factor=2, mode="bicubic")), ["ReLU", "interpolate", "ReLU"]),
    "ReLU of a cube": (lambda m, x: F.relu(x**3), ["pow", "ReLU"]),
    "hardtanh in a narrower one": (lambda m, x: F.hardtanh(F.hardtanh(x, -2, 2)), ["Hardtanh", "Hardtanh"]),
    "hardtanh above zero of a padded average": (
        lambda m, x: F.hardtanh(F.avg_pool2d(F.hardtanh(x, 1, 2), 3, 1, 1), 1, 2),
        ["Hardtanh", "AvgPool2d", "Hardtanh"]),
    "a permutation that is used between": (
        lambda m, x: (y := x.permute(0, 1, 3, 2)).permute(0, 1, 3, 2) + y, ["permute", "permute", "add"]),
    "a ReLU that is used between": (
        lambda m, x: torch.cat([F.max_pool2d(y := F.relu(x), 1, 2), F.relu(y)[..., ::2, ::2]], 1),
        ["ReLU", "MaxPool2d", "ReLU", "getitem", "getitem", "cat"]),
}  # fmt: skip


class Between(nn.Module):
    """A convolution, the case, and a tanh."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 5, 1)
        self.case = case
        self.drop, self.relu = nn.Dropout2d(), nn.ReLU()
        self.register_buffer("ones", torch.ones(5, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.case(self, self.conv(x)) * 0.7)


@pytest.mark.parametrize("name", GOES)
def test_it_goes(name: str) -> None:
    case, left = GOES[name]
    result = eliminated(Between(case), image())
    assert operations(result.program) == ["Conv2d", *left, "mul", "Tanh"]
    if name != "what nothing uses":
        assert result.record.before.macs == result.record.after.macs


@pytest.mark.parametrize("name", STAYS)
def test_it_stays(name: str) -> None:
    case, left = STAYS[name]
    result = eliminated(Between(case), image())
    assert operations(result.program) == ["Conv2d", *left, "mul", "Tanh"]
    assert all(site.outcome == "left" for site in result.record.passes[0].sites)


INTERPOLATED = {"interpolation by one", "interpolation of a pooled map to its size"}
"""Blending with a weight of zero turns infinity into NaN, and without it infinity stays."""


@pytest.mark.parametrize("name", [name for name in GOES if name not in INTERPOLATED])
def test_what_is_not_finite_stays_as_it_was(name: str) -> None:
    model = Net(lambda m, x: GOES[name][0](m, x), drop=nn.Dropout2d(), relu=nn.ReLU()).double().eval()
    x = image(2, 5, 6, 6)
    x.view(-1)[::7], x.view(-1)[3::11], x.view(-1)[5::13] = math.nan, math.inf, -math.inf
    result = PassManager([EliminateIdentity()]).run(trace(model, image(2, 5, 6, 6)))
    assert torch.equal(torch.nan_to_num(result.module(x), 1e9), torch.nan_to_num(model(x), 1e9))


def test_the_reason_why_a_repeated_activation_stays() -> None:
    result = eliminated(Between(STAYS["a ReLU that is used between"][0]), image())
    (site,) = result.record.passes[0].sites
    assert site.name == "relu_1"
    assert site.reason == "the output of 'relu', after which it changes nothing, is used elsewhere"


def test_of_several_calls_of_one_layer_only_the_identity_goes() -> None:
    model = Net(lambda m, x: m.relu(m.conv(m.relu(m.relu(m.conv(x))))), conv=nn.Conv2d(4, 4, 1), relu=nn.ReLU())
    result = eliminated(model, image())
    assert operations(result.program) == ["Conv2d", "ReLU", "Conv2d", "ReLU"]
    assert sorted(result.program.module.state_dict()) == ["conv.bias", "conv.weight"]
    pool = Net(lambda m, x: m.pool(m.pool(x)), pool=nn.AdaptiveAvgPool2d(2))
    assert operations(eliminated(pool, image()).program) == ["AdaptiveAvgPool2d"]


def test_pairs_do_not_overlap() -> None:
    model = Net(lambda m, x: torch.tanh(x.transpose(1, 2).transpose(1, 2).transpose(1, 2)))
    result = eliminated(model, image())
    assert operations(result.program) == ["permute", "Tanh"]
    assert len(result.record.passes[0].sites) == 1


def test_the_report_names_functions_as_torch_does() -> None:
    changes = {
        name: [site.change for site in eliminated(Between(GOES[name][0]), image()).record.passes[0].sites]
        for name in ("permutations that cancel", "permutations that do not", "reshapes in a row", "rounding twice")
    }
    assert changes["permutations that cancel"] == ["permute -> nothing"]
    assert changes["permutations that do not"] == ["permute -> permute"]
    assert changes["reshapes in a row"] == ["flatten -> reshape"]
    assert changes["rounding twice"] == ["floor -> floor", "round -> round", "sign -> sign"]


def test_a_reshape_to_sizes_that_the_network_computes_stays_behind_a_flatten() -> None:
    result = eliminated(Between(lambda m, x: x.flatten(1, 2).reshape(x.shape[0], 5, -1, 6)), image())
    assert [name for name in operations(result.program) if name in ("flatten", "reshape")] == ["flatten", "reshape"]


def test_a_fixed_batch_lets_more_go() -> None:
    """With a batch that is always two, a squeeze of the batch axis is an identity."""
    constant = torch.ones(2, 4, 6, 6, dtype=torch.float64)
    model = Net(lambda m, x: torch.tanh((x + constant).squeeze(0)))
    result = eliminated(model, image())
    assert not result.program.batch_is_free
    assert operations(result.program) == ["add", "Tanh"]


def test_what_fits_only_one_map_goes_where_the_network_takes_no_other() -> None:
    model = Net(lambda m, x: m.fc(F.adaptive_avg_pool2d(x, 6).flatten(1) + x.flatten(1)), fc=nn.Linear(144, 3))
    assert operations(eliminated(model, image()).program) == ["flatten", "flatten", "add", "Linear"]


def test_a_network_of_nothing_gives_its_input() -> None:
    result = eliminated(nn.Sequential(nn.Dropout(), nn.Identity(), nn.Dropout()), image())
    assert operations(result.program) == []
    assert printed(result.program) == "return input"


def test_dead_layers_and_their_weights_go() -> None:
    program = trace(Net(lambda m, x: m.a(x), a=nn.Conv2d(4, 4, 1)).double().eval(), image())
    conv = next(node for node in program.graph.nodes if node.op == "call_module")
    program.module.add_module("dead", nn.Conv2d(4, 4, 1).double())
    with program.graph.inserting_after(conv):
        program.graph.call_module("dead", conv.args).meta.update(conv.meta)
    program.module.recompile()
    result = PassManager("eliminate-identity").run(program)
    assert operations(result.program) == ["Conv2d"]
    assert sorted(result.program.module.state_dict()) == ["a.bias", "a.weight"]
    assert result.record.after.macs == result.record.before.macs // 2


# drawn chains

LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "relu6": F.relu6, "leaky": F.leaky_relu, "abs": torch.abs, "tanh": torch.tanh,
    "drop": lambda x: F.dropout(x, training=False), "flat": lambda x: x.flatten(2), "pad": lambda x: F.pad(x, (0, 0)),
    "shuffle": lambda x: F.channel_shuffle(x, 1), "swap": lambda x: x.transpose(1, 2), "wide": lambda x: x * 1.0,
    "split": lambda x: x.reshape(-1, 2, x.shape[1] // 2, *x.shape[2:]), "join": lambda x: x.flatten(1, 2),
    "max": lambda x: x.amax(-1, keepdim=True), "neg": lambda x: -x, "clamp": lambda x: x.clamp(-0.3, 0.8),
    "hard": lambda x: F.hardtanh(x, -0.5, 0.5), "sig": torch.sigmoid, "cut": lambda x: x[:, : x.shape[1]],
    "sum": lambda x: x + x, "square": lambda x: x**2, "exp": lambda x: torch.exp(-x.abs()),
}  # fmt: skip


class Chain(nn.Module):
    """The links that fit, one after the other; a few values are used again at the end."""

    def __init__(self, names: list[str], again: list[int], x: Tensor) -> None:
        super().__init__()
        self.links: list[Callable[[Tensor], Tensor]] = []
        values = [x]
        for name in names:
            try:
                values.append(LINKS[name](values[-1]))
                self.links.append(LINKS[name])
            except (RuntimeError, IndexError):
                continue
        self.again = {index % len(values) for index in again}

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for link in self.links:
            values.append(link(values[-1]))
        return values[-1].flatten(1).sum(1) + sum(values[index].flatten(1).mean(1) for index in sorted(self.again))


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(st.sampled_from(sorted(LINKS)), max_size=8), st.lists(st.integers(0, 8), max_size=2))
def test_drawn_chains_stay_the_same_in_float64(names: list[str], again: list[int]) -> None:
    x = image(3, 4, 4)
    model = Chain(names, again, x)
    result = eliminated(model, x, verify="off")
    assert len(operations(result.program)) <= len(operations(trace(model, x)))
    second = PassManager([EliminateIdentity()], verify="off").run(result.program)
    assert len(operations(second.program)) <= len(operations(result.program))


# the whole graph


class Block(nn.Module):
    """What a careful eye would take out of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.path = nn.Sequential(nn.Identity(), nn.Dropout(0.1))
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.pool(self.relu(self.conv(x))))
        y = y.permute(0, 2, 3, 1).permute(0, 3, 1, 2) + self.path(F.pad(y, (0, 0)))
        return self.head(torch.flatten(self.gap(self.gap(y)), 1))


def test_golden_block() -> None:
    result = PassManager("eliminate-identity").run(trace(Block().double().eval(), image()))
    text = printed(result.program)
    lines = """
        conv = Conv2d 4->4 3x3(x)
        relu = ReLU(conv)
        pool = MaxPool2d(relu)
        add = add(pool, pool)
        gap = AdaptiveAvgPool2d(add)
        flatten = flatten(gap, 1, 3)
        head = Linear 4->3(flatten)
        return head
    """
    assert text == inspect.cleandoc(lines)
    sites = result.record.passes[0].sites
    assert [site.name for site in sites] == ["relu", "permute_1", "pad", "path.1", "gap"]
    assert [site.outcome for site in sites] == ["kept"] * 5
    assert result.record.before.parameters == result.record.after.parameters
