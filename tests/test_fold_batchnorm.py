"""Folding batch norms: exact in float64 wherever it is done, and left with a reason wherever it would not be."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from fxcompile.passes import FoldBatchNorm
from helpers import Net, printed
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from fxcompile.layers import BATCH_NORMS
from fxcompile.manager import PassManager, Result
from fxcompile.program import shape_of
from fxcompile.tracing import trace


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode and float64, batch norms with statistics that matter and some negative gammas."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None and not hasattr(module, "drawn"):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 2)
            if module.weight is not None:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.double().eval()


def folded(model: nn.Module, x: Tensor, verify: Any = "raise") -> Result:
    """The model after the pass, which must compute the same to 1e-12 of the largest value."""
    result = PassManager([FoldBatchNorm()], verify=verify).run(trace(model, x))
    wanted, given_ = model(x), result.module(x)
    assert wanted.dtype == given_.dtype == torch.float64
    assert (given_ - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    return result


def norms(result: Result) -> int:
    return sum(1 for _ in result.program.layers(*BATCH_NORMS))


# exactness on drawn networks

NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def batch_norms(draw: st.DrawFn, channels: int, dims: int) -> nn.Module:
    """A batch norm with statistics as they are and as they should not be."""
    eps = draw(st.sampled_from([1e-5, 1e-3, 0.5, 10.0]))
    norm: Any = NORM[dims](channels, eps=eps, affine=draw(st.booleans()))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(channels, generator=generator) * (high - low) + low

    var = draw(st.sampled_from(["usual", "tiny", "zero", "large"]))
    scale = {"usual": 1.0, "tiny": 1e-8, "zero": 0.0, "large": 1e4}[var]
    norm.running_var.copy_(uniform(0.5, 2) * scale)
    norm.running_mean.copy_(uniform(-1, 1) * draw(st.sampled_from([0.0, 1.0, 30.0])))
    if norm.affine:
        gamma = uniform(-1.5, 1.5)
        norm.weight.data.copy_(gamma * (gamma.abs() > draw(st.sampled_from([0.0, 0.5]))))
        norm.bias.data.copy_(uniform(-1, 1) * draw(st.sampled_from([0.0, 1.0])))
    return norm


@st.composite
def convolutions(draw: st.DrawFn, channels: int, dims: int) -> tuple[nn.Module, int]:
    """A convolution, transposed or not, and its output channels; 2 or 4 of them, in 1 or 2 groups."""
    out = draw(st.sampled_from([2, 4]))
    kernel = draw(st.integers(1, 3))
    common: dict[str, Any] = {
        "kernel_size": kernel, "stride": draw(st.integers(1, 2)), "dilation": draw(st.integers(1, 2)),
        "groups": draw(st.sampled_from([1, 2])), "bias": draw(st.booleans()),
    }  # fmt: skip
    if draw(st.booleans()):
        padding = draw(st.integers(0, 1))
        return TRANSPOSED[dims](channels, out, padding=padding, **common), out
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(st.integers(0, 2))
    if mode == "zeros" and common["stride"] == 1 and draw(st.booleans()):
        padding = draw(st.sampled_from(["same", "valid"]))
    return CONV[dims](channels, out, padding=padding, padding_mode=mode, **common), out


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A chain of layers with batch norms anywhere in it; a shared convolution, a residual and a head at times."""
    dims = draw(st.integers(1, 3))
    channels = start = draw(st.sampled_from([2, 4]))
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(2, 5))):
        kind = draw(st.sampled_from(["conv", "conv", "norm", "norm", "norm", "relu", "pool", "pad", "drop"]))
        if kind == "conv":
            layer, channels = draw(convolutions(channels, dims))
        elif kind == "norm":
            layer = draw(batch_norms(channels, dims))
        elif kind == "pool":
            layer = getattr(nn, f"AvgPool{dims}d")(3, 1, 1, count_include_pad=draw(st.booleans()))
        elif kind == "pad":
            name = draw(st.sampled_from(["ReplicationPad", "ZeroPad", "CircularPad"]))
            layer = getattr(nn, f"{name}{dims}d")(1)
        else:
            layer = nn.ReLU() if kind == "relu" else nn.Dropout()
        layers.append(layer)
    if draw(st.booleans()):
        layers.append(layers[draw(st.integers(0, len(layers) - 1))])  # called again, or left out where it does not fit
    x = torch.randn(2, start, *[draw(st.integers(5, 6)) for _ in range(dims)])
    residual, head = draw(st.booleans()), draw(st.sampled_from(["none", "linear", "norm linear", "linear norm"]))
    model = Drawn(layers, residual, head, x)
    return model, x


class Drawn(nn.Module):
    """The layers that fit one after the other, then a residual add, then a head."""

    def __init__(self, layers: list[nn.Module], residual: bool, head: str, x: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.eval()
        y = x
        for layer in layers:
            try:
                with torch.no_grad():
                    after = layer.eval()(y)
            except (RuntimeError, ValueError):
                continue
            if after.numel() and after.abs().max() > 0:
                self.layers.append(layer)
                y = after
        self.residual = residual and len(self.layers) > 1
        features = y.flatten(1).shape[1]
        ends: list[nn.Module] = [nn.Linear(features, 6)] if head != "none" else []
        if head == "norm linear":
            ends.insert(0, settled(nn.BatchNorm1d(features)).float())
        elif head == "linear norm":
            ends.append(settled(nn.BatchNorm1d(6)).float())
        self.head = nn.Sequential(nn.Flatten(), *ends) if ends else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        if self.residual:
            x = x + self.layers[-1](x) if getattr(self.layers[-1], "num_features", 0) else x + x
        return self.head(x)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(networks())
def test_drawn_networks_stay_the_same_in_float64(drawn: tuple[nn.Module, Tensor]) -> None:
    model, x = drawn
    model, x = model.double().eval(), x.double()
    before = sum(parameter.numel() for parameter in model.parameters())
    result = folded(model, x, verify="off")
    biases = sum(getattr(layer, "out_channels", 0) for layer in model.modules())
    assert sum(parameter.numel() for parameter in result.module.parameters()) <= before + biases
    assert all(site.outcome == "kept" or site.reason for site in result.record.passes[0].sites)


# one pattern for each fold, one near miss for each reason to leave it


def shift_free(norm: Any) -> nn.Module:
    """A batch norm that only scales."""
    norm = settled(norm)
    norm.running_mean.zero_()
    nn.init.zeros_(norm.bias)
    norm.drawn = True  # `settled` leaves it so
    return norm


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 7, 7)), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


Sequential = nn.Sequential
BN = nn.BatchNorm2d

FOLDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "after a convolution": (lambda: Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2), BN(6)), ()),
    "after one without bias": (lambda: Sequential(nn.Conv2d(4, 6, 3, stride=2, bias=False), BN(6)), ()),
    "after a transposed one in groups": (
        lambda: Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), BN(6)), ()),
    "after a linear layer": (lambda: Sequential(nn.Flatten(), nn.Linear(196, 5), nn.BatchNorm1d(5)), ()),
    "after a linear layer, through a transpose": (
        lambda: Net(lambda m, x: m.bn(m.fc(x).transpose(1, 2)), fc=nn.Linear(7, 5), bn=nn.BatchNorm1d(5)), (2, 4, 7)),
    "after a convolution, through average pooling": (
        lambda: Sequential(nn.Conv2d(4, 6, 3), nn.AvgPool2d(3, 1, 1, count_include_pad=False), BN(6)), ()),
    "after a convolution, through interpolation": (
        lambda: Sequential(nn.Conv2d(4, 6, 3), nn.Upsample(scale_factor=2, mode="bilinear"), BN(6)), ()),
    "after a convolution, through the mean": (
        lambda: Net(lambda m, x: m.bn(m.c(x).mean((2, 3))), c=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm1d(6)), ()),
    "after a convolution, through the mean of one axis and a squeeze": (
        lambda: Net(lambda m, x: m.bn(m.c(x).mean(3, keepdim=True).squeeze(3)),
                    c=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm1d(6)), ()),
    "after a convolution, through the means of axes in turn": (
        lambda: Net(lambda m, x: m.bn(m.c(x).mean(-1).mean(2)), c=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm1d(6)), ()),
    "after a linear layer, through an axis that comes and goes before its channels": (
        lambda: Net(lambda m, x: m.bn(m.fc(x.flatten(1)).unsqueeze(1).squeeze(1)),
                    fc=nn.Linear(196, 5), bn=nn.BatchNorm1d(5)), ()),
    "after a linear layer, through an axis that comes after its channels": (
        lambda: Net(lambda m, x: m.bn(m.fc(x.flatten(1)).unsqueeze(2)),
                    fc=nn.Linear(196, 5), bn=nn.BatchNorm1d(5)), ()),
    "after a linear layer, through a flatten of the axes before its channels": (
        lambda: Net(lambda m, x: m.bn(m.fc(x).flatten(1, 2).transpose(1, 2)), fc=nn.Linear(7, 5), bn=nn.BatchNorm1d(5)),
        (2, 4, 3, 7)),
    "beside means of all values": (
        lambda: Net(lambda m, x: m.bn(m.c(x)) + m.d(x).mean(dim=None, keepdim=True) + m.e(x).mean(),
                    c=nn.Conv2d(4, 6, 3), bn=BN(6), d=nn.Conv2d(4, 2, 3), e=nn.Conv2d(4, 2, 3)), ()),
    "twice after a convolution": (lambda: Sequential(nn.Conv2d(4, 6, 3), BN(6), nn.Dropout(), BN(6)), ()),
    "before a convolution without padding": (lambda: Sequential(nn.ReLU(), BN(4), nn.Conv2d(4, 6, 3, groups=2)), ()),
    "before one with 'valid' padding": (lambda: Sequential(nn.ReLU(), BN(4), nn.Conv2d(4, 6, 3, padding="valid")), ()),
    "before one that pads 'same' with nothing": (
        lambda: Sequential(nn.ReLU(), BN(4), nn.Conv2d(4, 6, 1, padding="same", bias=False)), ()),
    "before one that repeats the border": (
        lambda: Sequential(nn.ReLU(), BN(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")), ()),
    "before a padding layer that repeats the border": (
        lambda: Sequential(nn.ReLU(), BN(4), nn.ReplicationPad2d(2), nn.Conv2d(4, 6, 3)), ()),
    "before zero padding, with no shift": (
        lambda: Sequential(nn.ReLU(), shift_free(BN(4)), nn.Conv2d(4, 6, 3, padding=1)), ()),
    "before a transposed one, with no shift": (
        lambda: Sequential(nn.ReLU(), shift_free(BN(4)), nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)), ()),
    "before flatten and linear": (
        lambda: Sequential(nn.ReLU(), BN(4), nn.Dropout(), nn.Flatten(), nn.Linear(196, 5)), ()),
    "before pooling, flatten and linear": (
        lambda: Sequential(nn.ReLU(), BN(4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)), ()),
    "before a transpose and linear": (
        lambda: Net(lambda m, x: m.fc(m.bn(x.relu()).transpose(1, 2)), fc=nn.Linear(4, 5), bn=nn.BatchNorm1d(4)),
        (2, 4, 7)),
    "twice before a convolution": (lambda: Sequential(nn.ReLU(), BN(4), BN(4), nn.Conv2d(4, 6, 3)), ()),
    "before and after one convolution": (lambda: Sequential(nn.ReLU(), BN(4), nn.Conv2d(4, 6, 3), BN(6)), ()),
    "before, where the layer before is shared": (
        lambda: Net(lambda m, x: m.d(m.bn(m.c(m.c(x)))), c=nn.Conv2d(4, 4, 1), bn=BN(4), d=nn.Conv2d(4, 6, 3)), ()),
    "without gamma and beta": (lambda: Sequential(nn.Conv2d(4, 6, 3), BN(6, affine=False)), ()),
    "after a transposed one that is asked for a size": (
        lambda: Net(lambda m, x: m.bn(m.c(x, output_size=[16, 16])), c=nn.ConvTranspose2d(4, 6, 3, stride=2), bn=BN(6)),
        ()),
    "of two branches": (
        lambda: Net(lambda m, x: m.a(m.p(x)) + m.b(m.q(x)),
                    p=nn.Conv2d(4, 6, 3), a=BN(6), q=nn.Conv2d(4, 6, 3), b=BN(6)), ()),
    "of a residual": (lambda: Net(lambda m, x: m.bn(m.c(x)) + x, c=nn.Conv2d(4, 4, 3, padding=1), bn=BN(4)), ()),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDS)
def test_it_folds(case: str) -> None:
    make, shape = FOLDS[case]
    result = folded(settled(make()), image(*shape))
    assert norms(result) == 0
    assert [site.outcome for site in result.record.passes[0].sites].count("left") == 0


def tie(model: Any, *others: str) -> nn.Module:
    for name in others or ("d",):
        getattr(model, name).weight = model.c.weight
    return model


def without_statistics() -> nn.Module:
    return Sequential(nn.Conv2d(4, 6, 3), BN(6, track_running_stats=False))


LEAVES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "ReLU stands between": (
        lambda: Sequential(nn.ReLU(), BN(4), nn.ReLU(), nn.Conv2d(4, 6, 3)), (),
        "into no layer before it (it normalises the output of '0') and into none after it (its output goes to '2')"),
    "max pooling stands between": (
        lambda: Sequential(nn.Conv2d(4, 6, 3), nn.MaxPool2d(2), BN(6)), (), "normalises the output of '1'"),
    "zeros are padded, with a shift": (
        lambda: Sequential(nn.ReLU(), BN(4), nn.Conv2d(4, 6, 3, padding=1)), (),
        "the zeros around the input of '2' would lack the norm's shift"),
    "zeros are padded by 'same'": (
        lambda: Sequential(nn.ReLU(), BN(4), nn.Conv2d(4, 6, 3, padding="same")), (),
        "the zeros around the input of '2'"),
    "zeros are padded by 'same' on one side": (
        lambda: Sequential(nn.ReLU(), BN(4), nn.Conv2d(4, 6, 2, padding="same")), (),
        "the zeros around the input of '2'"),
    "zeros are padded on one axis only": (
        lambda: Sequential(nn.ReLU(), BN(4), nn.Conv2d(4, 6, 3, padding=(0, 1))), (),
        "the zeros around the input of '2'"),
    "a layer pads zeros between": (
        lambda: Sequential(nn.ReLU(), BN(4), nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3)), (), "its output goes to 'pad'"),
    "zeros get into the average": (
        lambda: Sequential(nn.Conv2d(4, 6, 3), nn.AvgPool2d(3, 1, 1), BN(6)), (), "normalises the output of '1'"),
    "the pool sums": (
        lambda: Sequential(nn.Conv2d(4, 6, 3), nn.AvgPool2d(2, divisor_override=1), BN(6)), (), "the output of '1'"),
    "a transposed convolution sees different taps": (
        lambda: Sequential(nn.ReLU(), BN(4), nn.ConvTranspose2d(4, 6, 3, stride=2)), (),
        "outputs of '2' see different taps"),
    "the convolution's output is used elsewhere": (
        lambda: Net(lambda m, x: m.bn(y := m.c(x)) * y.sigmoid(), c=nn.Conv2d(4, 6, 3), bn=BN(6)), (),
        "the output of 'c' is used 2 times"),
    "two norms take the convolution's output": (
        lambda: Net(lambda m, x: m.a(y := m.c(x)).relu() + m.b(y).relu(), c=nn.Conv2d(4, 6, 3), a=BN(6), b=BN(6)), (),
        "the output of 'c' is used 2 times"),
    "the norm's output is used twice": (
        lambda: Net(lambda m, x: m.c(y := m.bn(x.relu())) + m.d(y), c=nn.Conv2d(4, 6, 3), d=nn.Conv2d(4, 6, 3),
                    bn=BN(4)),
        (), "the output of 'bn' is used 2 times"),
    "the convolution is called twice": (
        lambda: Net(lambda m, x: m.bn(m.c(m.c(x))), c=nn.Conv2d(4, 4, 3), bn=BN(4)), (), "'c' is called 2 times"),
    "the norm is called twice": (
        lambda: Net(lambda m, x: m.bn(m.c(x)) + m.bn(m.d(x)), c=nn.Conv2d(4, 4, 3), d=nn.Conv2d(4, 4, 3), bn=BN(4)), (),
        "it is called 2 times"),
    "layer and norm are called twice together": (
        lambda: Net(lambda m, x: m.bn(m.c(x)) + m.bn(m.c(-x)), c=nn.Conv2d(4, 4, 3), bn=BN(4)), (),
        "it is called 2 times, and only norms called once fold"),
    "the weight is tied": (
        lambda: tie(Net(lambda m, x: m.bn(m.c(x)) + m.d(x), c=nn.Conv2d(4, 4, 3), d=nn.Conv2d(4, 4, 3), bn=BN(4))), (),
        "'c' shares its weight with 'd'"),
    "the weight is tied to two others": (
        lambda: tie(Net(lambda m, x: m.bn(m.c(x)) + m.d(x) + m.e(x), c=nn.Conv2d(4, 4, 3), d=nn.Conv2d(4, 4, 3),
                        e=nn.Conv2d(4, 4, 3), bn=BN(4)), "d", "e"), (), "'c' shares its weight with 'd', 'e'"),
    "the layer after it is called twice": (
        lambda: Net(lambda m, x: m.c(m.bn(x.relu())) + m.c(x), c=nn.Conv2d(4, 4, 3), bn=BN(4)), (),
        "into none after it ('c' is called 2 times)"),
    "the layer after it shares its weight": (
        lambda: tie(Net(lambda m, x: m.c(m.bn(x.relu())) + m.d(x), c=nn.Conv2d(4, 4, 3), d=nn.Conv2d(4, 4, 3),
                        bn=BN(4))), (), "into none after it ('c' shares its weight with 'd')"),
    "it keeps no statistics": (without_statistics, (), "normalises by the batch"),
    "linear works on another axis": (
        lambda: Sequential(nn.Linear(7, 5), nn.BatchNorm1d(4)), (2, 4, 7), "gives its channels on axis 2"),
    "linear takes another axis": (
        lambda: Sequential(nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(7, 5)), (2, 4, 7), "takes its channels on axis 2"),
    "the norm has a scale for each pixel": (
        lambda: Sequential(nn.Conv2d(4, 6, 7), nn.Flatten(1), nn.Unflatten(1, (3, 2)), nn.BatchNorm1d(3)), (),
        "normalises the output of"),
    "the flattened norm has a scale for each pixel": (
        lambda: Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.BatchNorm1d(150)), (), "has several values"),
    "a sum comes before": (
        lambda: Net(lambda m, x: m.bn(m.c(x) + x), c=nn.Conv2d(4, 4, 1), bn=BN(4)), (), "the output of 'add'"),
    "it ends the network, after its input": (lambda: Sequential(BN(4)), (), "(its output is the network's)"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEAVES)
def test_it_leaves(case: str) -> None:
    make, shape, reason = LEAVES[case]
    model = settled(make())
    result = folded(model, image(*shape))
    assert norms(result) == sum(isinstance(module, BATCH_NORMS) for module in model.modules())
    reasons = [site.reason for site in result.record.passes[0].sites if site.outcome == "left"]
    assert reasons
    assert reason in reasons[0]
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.endswith("tracked")}
    given_ = {name: tensor.shape for name, tensor in result.program.module.state_dict(keep_vars=True).items()}
    assert {name: shape for name, shape in given_.items() if not name.endswith("tracked")}.items() <= wanted.items()


def test_statistics_that_are_not_finite_are_left() -> None:
    model = settled(Sequential(nn.Conv2d(4, 6, 3), BN(6, eps=0.0)))
    model[1].running_var[2] = 0
    result = PassManager([FoldBatchNorm()], verify="off").run(trace(model, image()))
    assert result.record.passes[0].sites[0].reason == "its scale or shift is not finite"


@pytest.mark.parametrize("gammas", [(1e4,), (10.0, 10.0)])
def test_a_fold_that_would_overflow_half_precision_is_left(gammas: tuple[float, ...]) -> None:
    """Each norm for itself, or both together: the network itself stays finite on small inputs."""
    model: Any = settled(Sequential(nn.Conv2d(4, 6, 3), *[BN(6) for _ in gammas]))
    nn.init.ones_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    for norm, gamma in zip(model[1:], gammas, strict=True):
        norm.running_var.fill_(1e-3)
        norm.running_mean.zero_()
        nn.init.constant_(norm.weight, gamma)
        nn.init.zeros_(norm.bias)
    x = 1e-3 * image().half()
    result = PassManager([FoldBatchNorm()]).run(trace(model.half(), x))
    assert norms(result) == len(gammas)
    assert "its new weight has numbers that float16 cannot hold" in result.record.passes[0].sites[0].reason
    assert torch.equal(result.module(x), model(x))


# what the folded layer is


def test_the_folded_weight_is_the_formula() -> None:
    """Against the definition, channel by channel: y = gamma (conv(x) - mean) / sqrt(var + eps) + beta."""
    model: Any = settled(Sequential(nn.Conv2d(4, 6, 3), BN(6, eps=0.1)))
    conv, norm = model
    layer: Any = folded(model, image()).program.module.get_submodule("0")
    for o in range(6):
        factor = float(norm.weight.detach()[o]) / math.sqrt(float(norm.running_var[o]) + 0.1)
        assert torch.allclose(layer.weight[o], conv.weight[o] * factor, rtol=1e-14, atol=0)
        bias = (conv.bias.detach()[o] - norm.running_mean[o]) * factor + norm.bias.detach()[o]
        assert float(layer.bias.detach()[o]) == pytest.approx(float(bias), rel=1e-12)


def test_float32_weights_are_rounded_once() -> None:
    model = settled(Sequential(nn.ReLU(), BN(4), nn.Conv2d(4, 6, 3), BN(6), BN(6))).float()
    result = PassManager([FoldBatchNorm()]).run(trace(model, image().float()))
    exact = PassManager([FoldBatchNorm()]).run(trace(model.double(), image()))
    rounded: Any = result.program.module.get_submodule("2")
    wide: Any = exact.program.module.get_submodule("2")
    assert torch.equal(rounded.weight, wide.weight.float())
    assert torch.equal(rounded.bias, wide.bias.float())


def test_no_bias_is_made_where_there_is_no_shift() -> None:
    model = settled(Sequential(nn.ReLU(), shift_free(BN(4)), nn.Conv2d(4, 6, 3, padding=1, bias=False)))
    assert list(folded(model, image()).program.module.state_dict()) == ["2.weight"]


@pytest.mark.parametrize(("weight", "bias"), [(True, True), (False, False), (True, False), (False, None), (True, None)])
def test_what_trained_still_trains_and_what_was_frozen_stays_so(weight: bool, bias: bool | None) -> None:
    model = settled(Sequential(nn.Conv2d(4, 6, 3, bias=bias is not None), BN(6)))
    model[0].weight.requires_grad_(weight)
    if bias is not None:
        model[0].bias.requires_grad_(bias)
    module = folded(model, image()).module
    given_ = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    assert given_ == {"0.weight": weight, "0.bias": weight if bias is None else bias}
    assert model[0].weight.requires_grad is weight


def test_gradients_reach_every_parameter_and_the_original_is_untouched() -> None:
    model = settled(Sequential(nn.Conv2d(4, 6, 3), BN(6), nn.ReLU(), BN(6), nn.Flatten(), nn.Linear(150, 3)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    module = folded(model, image()).module.train()
    module(image()).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("case", FOLDS)
def test_state_dict_names_are_kept(case: str) -> None:
    make, shape = FOLDS[case]
    model = settled(make())
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *CONV.values(), *TRANSPOSED.values()))
    }
    names = set(folded(model, image(*shape)).program.module.state_dict())
    assert {name.rpartition(".")[0] for name in names} == set(layers)


# structure


class Block(nn.Module):
    """A residual block whose shortcut is a norm, then pooling, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = BN(4)
        self.shortcut = BN(4)
        self.last = BN(4)
        self.head = nn.Linear(4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)) + self.shortcut(x))
        y = F.adaptive_avg_pool2d(self.last(y), 2)
        return self.head(torch.flatten(y, 1))


def test_golden_residual_block() -> None:
    result = PassManager("fold-batchnorm").run(trace(settled(Block()), image()))
    text = printed(result.program)
    lines = """
        conv = Conv2d 4->4 3x3(x)
        shortcut = BatchNorm2d(x)
        add = add(conv, shortcut)
        relu = ReLU(add)
        adaptive_avg_pool2d = AdaptiveAvgPool2d(relu)
        flatten_1 = flatten(adaptive_avg_pool2d, 1, 3)
        head = Linear 16->3(flatten_1)
        return head
    """
    assert text == inspect.cleandoc(lines)
    assert [(site.name, site.outcome, site.change) for site in result.record.passes[0].sites] == [
        ("conv", "kept", "Conv2d 4->4 3x3 + BatchNorm2d -> Conv2d 4->4 3x3"),
        ("shortcut", "left", ""),
        ("head", "kept", result.record.passes[0].sites[2].change),
    ]
    assert shape_of(next(node for node in result.program.graph.nodes if node.name == "flatten_1")) == (2, 16)
    before, after = result.record.before, result.record.after
    assert before.parameters - after.parameters == 2 * 2 * 4 - 4  # two norms go, one bias comes
    assert before.bytes - after.bytes == 8 * (2 * 4 * 4 - 4) + 2 * 8  # and their statistics, and two counters
    assert before.macs == after.macs


def test_only_and_skip_go_by_the_layer_that_takes_the_norm_in() -> None:
    model = settled(Sequential(nn.Conv2d(4, 4, 3), BN(4), nn.ReLU(), nn.Conv2d(4, 4, 3), BN(4)))
    result = PassManager("fold-batchnorm(skip=0)").run(trace(model, image()))
    assert [site.name for site in result.record.passes[0].sites] == ["3"]
    assert norms(result) == 1
