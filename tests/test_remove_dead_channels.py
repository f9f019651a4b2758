"""remove-dead-channels: what is constant or unused goes, borders included, and nothing else does."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from fxcompile.passes import RemoveDeadChannels, _constants, _dead_channels
from helpers import MODES, Net, conv, geometry, outputs, randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompile.errors import ContractError
from fxcompile.layers import TRANSPOSED, as_double
from fxcompile.manager import PassManager, Result
from fxcompile.program import Program
from fxcompile.rewriting import Skip
from fxcompile.testing import Network, PassFailure, Recipe, Step, check_pass
from fxcompile.testing.growing import RandomPicker, grow
from fxcompile.tracing import trace


def then(*steps: Step) -> Recipe:
    """Steps, each on what the one before gives."""
    return Recipe(tuple(replace(step, sources=((at - 1, 0),) if at else ()) for at, step in enumerate(steps)))


FIRST = Step("convolution", (("bias", True), ("spelling", "layer")))
PADDED = Step("convolution", (("padding", "half"), ("padding mode", "zeros"), ("spelling", "layer")))
PLAIN, NORM, ACTIVATION = Step("convolution"), Step("batch norm"), Step("activation")
RECIPES = [
    then(FIRST, NORM, ACTIVATION, PADDED),
    then(PLAIN, NORM, ACTIVATION, PLAIN),
    then(PLAIN, ACTIVATION, PLAIN, PLAIN),
    then(PLAIN, Step("pool"), PLAIN),
    then(PLAIN, ACTIVATION, Step("flatten"), Step("linear"), Step("linear")),
    then(Step("residual"), PLAIN, Step("residual"), PLAIN),
]


def deadened(network: Network) -> Network:
    """The same network with zeros for every other filter, or every other input, of most of its layers."""
    choice = random.Random(network.seed)
    odd = {
        name: choice.choice(["dead filters", "dead filters", "dead inputs"])
        for name, _ in network.names
        if name.startswith(("conv", "fc")) and choice.random() < 0.6
    }
    return replace(network, odd=tuple({**dict(network.odd), **odd}.items()))


DRAWN = st.integers(0, 10**6).map(lambda seed: deadened(grow(RandomPicker(seed), RECIPES, most=12, habit=6)))


@pytest.mark.parametrize("seed", [0, 1])
def test_it_holds_on_drawn_networks(seed: int) -> None:
    summary = check_pass(RemoveDeadChannels(), examples=80, seed=seed, onnx_examples=1, networks=DRAWN)
    assert summary.with_sites >= 12


def test_it_holds_on_what_it_learns() -> None:
    check_pass(RemoveDeadChannels(), examples=60, seed=0, onnx_examples=1)


def test_a_fold_that_forgets_the_border_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dead_channels, "has_border", lambda layer: isinstance(layer, TRANSPOSED))
    with pytest.raises(PassFailure, match="differs by"):
        check_pass(RemoveDeadChannels(), examples=100, seed=0, onnx_examples=0, networks=DRAWN)
    model, x = nn.Sequential(*block(dead=[1, 2]), conv(6, 3, 3, 3, padding=1)), randn(2, 3, 6, 6)
    with pytest.raises(ContractError, match="remove-dead-channels"):
        cleaned(model, x)


def block(dead: Sequence[int] = (), channels: int = 6, inputs: int = 3, seed: int = 1) -> list[nn.Module]:
    """A convolution with filters of zeros, a batch norm that makes them positive, and a ReLU."""
    first = conv(inputs, channels, 3, 3, seed=seed)
    norm = nn.BatchNorm2d(channels, dtype=torch.float64)
    with torch.no_grad():
        first.weight[list(dead)] = 0
        norm.bias.copy_(randn(channels, seed=seed).abs() + 0.1)
        norm.running_mean.copy_(first.bias)
        norm.running_var.copy_(randn(channels, seed=seed + 1).abs() + 0.5)
    return [first, norm, nn.ReLU()]


def silent(layer: Any, dead: Sequence[int]) -> Any:
    """A layer whose filters of these numbers give zero."""
    with torch.no_grad():
        layer.weight[list(dead)] = 0
        if layer.bias is not None:
            layer.bias[list(dead)] = 0
    return layer


def cleaned(model: nn.Module, x: Tensor, **options: Any) -> Result:
    """What the pass makes of a model, which gives the same on inputs of this and of another size."""
    result = PassManager([RemoveDeadChannels(**options)], verify_examples=4).run(trace(model.double().eval(), (x,)))
    for seed in range(2):
        other = randn(*x.shape, seed=seed)
        wanted = outputs(model, other)
        assert float((outputs(result.module, other) - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())
    return result


def width(result: Result, name: str) -> int:
    layer: Any = result.program.module.get_submodule(name)
    return int(layer.weight.shape[0])


def reasons(result: Result) -> dict[str, str]:
    return {site.name: site.reason for site in result.record.passes[0].sites if site.outcome == "left"}


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_pixel_is_right_whatever_the_padding(data: st.DataObject) -> None:
    """One channel stays for all that are not zero, where zeros pad them; none does elsewhere."""
    draw = data.draw
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    groups = draw(st.sampled_from([1, 2]))
    options = geometry(draw, kernel, groups, MODES, 1)
    sizes = [draw(st.integers(5, 9)) for _ in kernel]
    dead = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True))
    # the same channel of each group goes as one
    first = block([channel + 4 * group for channel in dead for group in range(groups)], 4 * groups)
    second = conv(4 * groups, 2 * groups, *kernel, seed=3, **options)
    model = nn.Sequential(*first, second, nn.Conv2d(2 * groups, 2, 1))
    result = cleaned(model, randn(2, 3, *(size + 2 for size in sizes)))
    stays = options["padding_mode"] == "zeros" and any(options["padding"])
    assert width(result, "0") == groups * (4 - len(dead) + stays)
    assert (result.program.module.get_submodule("3").bias is not None) == (options["bias"] or not stays)


def test_channels_of_zeros_go_whatever_the_padding() -> None:
    model = nn.Sequential(silent(conv(3, 6, 3, 3), [0, 4]), nn.ReLU(), conv(6, 3, 3, 3, padding=1, bias=False))
    result = cleaned(model, randn(2, 3, 6, 6))
    assert width(result, "0") == 4
    assert result.program.module.get_submodule("2").bias is None


def test_what_no_layer_has_a_weight_for_goes_and_what_only_that_needs() -> None:
    """From the back to the front: the second layer's filter is unused, and the first one's only use was there."""
    first, second, third = conv(3, 4, 3, 3), conv(4, 4, 3, 3), conv(4, 2, 3, 3)
    with torch.no_grad():
        third.weight[:, 1] = 0
        second.weight[[0, 2, 3], 2] = 0
    result = cleaned(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third), randn(1, 3, 9, 9))
    assert [width(result, name) for name in "024"] == [3, 3, 2]


def test_what_is_dropped_goes() -> None:
    net = Net(lambda self, x: self.last(self.first(x)[:, 2:].relu()), first=conv(3, 6, 3, 3), last=conv(4, 2, 3, 3))
    assert width(cleaned(net, randn(2, 3, 7, 7)), "first") == 5  # of two that nothing takes, one stays

    def parts(self: Any, x: Tensor) -> Tensor:
        kept, _ = self.first(x).split((2, 4), 1)
        return self.last(kept)  # type: ignore[no-any-return]

    net = Net(parts, first=conv(3, 6, 3, 3), last=conv(2, 2, 3, 3))
    assert width(cleaned(net, randn(2, 3, 7, 7)), "first") == 3


def test_a_residual_stream_loses_what_is_constant_on_all_of_it() -> None:
    """Channel 1 is silent in all layers that make the stream, channel 2 in one of two."""

    def run(self: Any, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.b(self.a(y).relu())
        return self.head(y.relu())  # type: ignore[no-any-return]

    layers = {
        "stem": silent(conv(3, 5, 3, 3), [1, 2]),
        "a": conv(5, 4, 3, 3, padding=1),
        "b": silent(conv(4, 5, 3, 3, padding=1), [1]),
        "head": conv(5, 2, 3, 3, padding=1),
    }
    result = cleaned(Net(run, **layers), randn(2, 3, 8, 8))
    assert [width(result, name) for name in layers] == [4, 4, 4, 2]
    layers["b"].bias.data[1] = (
        0.5  # the sum is 0.5 for the head, and zero for the other branch: one channel, which stays
    )
    assert width(cleaned(Net(run, **layers), randn(2, 3, 8, 8)), "stem") == 5
    layers["head"] = conv(5, 2, 3, 3)
    assert width(cleaned(Net(run, **layers), randn(2, 3, 8, 8)), "stem") == 4


def test_both_sides_of_a_concatenation_lose_what_is_theirs() -> None:
    """What two groups give to one bias, and to one weight, adds up."""
    for padding, widths in ((0, [4, 3]), (1, [5, 4])):
        net = Net(
            lambda self, x: self.last(torch.cat([self.a(x), self.b(x)], 1)),
            a=nn.Sequential(*block([0, 3])),
            b=nn.Sequential(*block([1, 2], 5, seed=4)),
            last=conv(11, 3, 3, 3, padding=padding, bias=False),
        )
        result = cleaned(net, randn(2, 3, 8, 8))
        assert [width(result, "a.0"), width(result, "b.0")] == widths


def test_depthwise_convolutions_pass_constants_on_but_for_their_border() -> None:
    for padding, left in ((0, 3), (1, 6)):
        body = [*block([0, 2, 5]), conv(6, 6, 3, 3, groups=6, padding=padding), nn.ReLU6(), conv(6, 4, 1, 1)]
        assert width(cleaned(nn.Sequential(*body), randn(2, 3, 8, 8)), "0") == left
    body = [silent(conv(3, 6, 3, 3), [0, 2]), nn.ReLU(), conv(6, 6, 3, 3, groups=6, padding=1), conv(6, 4, 1, 1)]
    result = cleaned(nn.Sequential(*body), randn(2, 3, 8, 8))
    assert (width(result, "0"), width(result, "2")) == (4, 4)  # its bias is what is left, without a border


def test_one_channel_stays_for_two_layers_of_which_one_pads() -> None:
    """Behind zero padding they merge, and what goes there adds to the bias of the other."""
    net = Net(
        lambda self, x: self.one(self.body(x)).mean() + self.two(self.body(x).sigmoid()).mean((2, 3)),
        body=nn.Sequential(*block([0, 1, 2])),
        one=conv(6, 3, 3, 3, padding=1),
        two=conv(6, 3, 3, 3, bias=False),
    )
    result = cleaned(net, randn(2, 3, 8, 8))
    assert width(result, "body.0") == 4
    assert result.program.module.get_submodule("two").bias is not None


def test_each_place_has_an_heir_of_its_own() -> None:
    """Two channels are zero for the one padded layer, two for the other: neither can stand in for the other two."""
    first = silent(conv(3, 6, 1, 1), [0, 1, 2, 3])
    with torch.no_grad():
        first.bias[:4] = torch.tensor([1.0, 2.0, -1.0, -3.0])
    net = Net(
        lambda self, x: self.one(self.first(x).relu()) + self.two((-self.first(x)).relu()),
        first=first,
        one=conv(6, 3, 3, 3, padding=1),
        two=conv(6, 3, 3, 3, padding=1),
    )
    assert width(cleaned(net, randn(2, 3, 6, 6)), "first") == 4


def test_flattened_maps_give_to_the_bias_of_a_linear_layer() -> None:
    pooled = [*block([2, 4]), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Flatten()]
    result = cleaned(nn.Sequential(*pooled, nn.Linear(6 * 9, 4)), randn(2, 3, 8, 8))
    assert (width(result, "0"), result.program.module.get_submodule("5").in_features) == (4, 4 * 9)


@pytest.mark.parametrize(
    ("between", "left"),
    [
        (nn.MaxPool2d(3, 2, 1), 4),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), 4),
        (nn.AvgPool2d(3, 2, 0, ceil_mode=True), 4),
        (nn.AvgPool2d(3, 2, 1), 6),
        (nn.AvgPool2d(2, divisor_override=3), 6),
        (nn.AdaptiveAvgPool2d((3, 2)), 4),
        (nn.Upsample(scale_factor=2, mode="bilinear"), 4),
        (nn.ReflectionPad2d((1, 2, 0, 1)), 4),
        (nn.CircularPad2d(1), 4),
        (nn.ReplicationPad2d(2), 4),
        (nn.ZeroPad2d((1, 0, 0, 0)), 6),
        (nn.ConstantPad2d(1, 0.25), 6),
        (nn.PReLU(6), 4),
        (nn.Hardswish(), 4),
        (nn.Dropout(), 4),
        (nn.ChannelShuffle(2), 4),
        (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), 4),
        (nn.InstanceNorm2d(6), 4),
        (nn.InstanceNorm2d(6, eps=1e-9), 6),
        (nn.BatchNorm2d(6, track_running_stats=False), 4),
        (nn.GroupNorm(6, 6), 6),
        (nn.Softmax(2), 6),
        (nn.Identity(), 4),
    ],
    ids=str,
)
def test_constants_are_followed_through_what_keeps_them(between: nn.Module, left: int) -> None:
    body = nn.Sequential(*block([1, 4]), between, conv(6, 3, 2, 2), nn.ReLU())
    assert width(cleaned(body, randn(2, 3, 8, 8)), "0") == left


@pytest.mark.parametrize(
    "follows",
    [
        lambda y: 0.5 * y + 2,
        lambda y: y.clamp(0.1, 0.3) / 4,
        lambda y: -y.sigmoid(),
        lambda y: torch.maximum(y, 0.2 * y) ** 2,
        lambda y: F.pad(y, (1, 1), value=0.5).sigmoid()[..., 1:-1],
        lambda y: torch.cat(y.chunk(2, 1)[::-1], 1),
        lambda y: y.flip(1),
        lambda y: y.reshape(2, 2, 3, 6, 6).transpose(1, 2).reshape(2, 6, 6, 6),
        lambda y: y.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4),
        lambda y: y.amax(3, keepdim=True) + y,
        lambda y: y.flatten(2).unsqueeze(-1),
    ],
)
def test_constants_are_followed_through_functions(follows: Callable[[Tensor], Tensor]) -> None:
    net = Net(
        lambda self, x: self.last(follows(self.body(x))), body=nn.Sequential(*block([1, 4])), last=conv(6, 3, 1, 1)
    )
    assert width(cleaned(net, randn(2, 3, 8, 8)), "body.0") == 4


def test_numbers_that_are_stored_beside_are_constants_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = conv(3, 6, 3, 3), conv(6, 2, 1, 1)
            scale = randn(1, 6, 1, 1)
            scale[:, [0, 5]] = 0
            self.scale, self.shift = nn.Parameter(scale), nn.Parameter(randn(1, 6, 1, 1, seed=1))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) * self.scale + self.shift)  # type: ignore[no-any-return]

    result = cleaned(Scaled(), randn(2, 3, 7, 7))
    assert width(result, "first") == 4
    assert result.program.module.scale.shape == (1, 4, 1, 1)


def test_a_gate_on_silent_channels_goes_with_them() -> None:
    """Zero times anything is zero: squeeze and excitation loses rows and columns."""

    def run(self: Any, x: Tensor) -> Tensor:
        y = self.body(x).relu()
        return self.last(y * self.up(self.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid())  # type: ignore[no-any-return]

    layers = {
        "body": silent(conv(3, 8, 3, 3), [1, 5, 6]),
        "down": conv(8, 2, 1, 1),
        "up": conv(2, 8, 1, 1),
        "last": conv(8, 3, 3, 3, padding=1),
    }
    result = cleaned(Net(run, **layers), randn(2, 3, 8, 8))
    assert [width(result, name) for name in layers] == [5, 2, 5, 3]
    layers["body"].bias.data[1] = 1.0  # times a gate that nobody knows
    assert width(cleaned(Net(run, **layers), randn(2, 3, 8, 8)), "body") == 6


def test_queries_that_are_zero_go_with_their_keys_and_the_scale_stays() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = silent(nn.Linear(5, 4), [2]), nn.Linear(5, 4)
            self.v, self.out = nn.Linear(5, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    result = cleaned(Attention(), randn(2, 7, 5))
    assert [width(result, name) for name in ("q", "k", "v", "out")] == [3, 3, 3, 2]
    model = Attention()
    model.q.bias.data[2] = 1.0  # constant, but summed with what the keys hold
    assert width(cleaned(model, randn(2, 7, 5)), "q") == 4


def test_transposed_and_recurrent_layers_take_constants_as_they_can() -> None:
    """A transposed convolution has a border of its own; a recurrent layer loses zeros only."""
    up = nn.ConvTranspose2d(6, 4, 3, 2, 1, groups=2)
    assert width(cleaned(nn.Sequential(*block([0, 1, 3, 4]), up), randn(2, 3, 7, 7)), "0") == 4

    class Reads(nn.Module):
        def __init__(self, first: nn.Module) -> None:
            super().__init__()
            self.first, self.rnn = first, nn.GRU(5, 3, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(self.first(x))[0]  # type: ignore[no-any-return]

    torch.manual_seed(0)
    assert width(cleaned(Reads(silent(nn.Linear(4, 5), [0, 3])), randn(2, 6, 4)), "first") == 3
    first = silent(nn.Linear(4, 5), [0, 3])
    first.bias.data[[0, 3]] = 1.0
    result = cleaned(Reads(first), randn(2, 6, 4))
    assert (width(result, "first"), list(reasons(result))) == (5, ["first"])


def test_a_layer_that_is_called_twice_is_given_what_both_calls_agree_on() -> None:
    """Zero at both calls goes; what is one number at one and another number at the other stays."""

    def run(self: Any, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y.relu()) + self.last(2 * y.relu())  # type: ignore[no-any-return]

    first = silent(conv(3, 6, 3, 3), [0, 2, 3])
    first.bias.data[3] = 1.0
    assert width(cleaned(Net(run, first=first, last=conv(6, 2, 3, 3)), randn(2, 3, 8, 8)), "first") == 4


def test_layers_that_share_a_weight_get_biases_of_their_own_and_no_columns() -> None:
    class Tied(nn.Module):
        def __init__(self, padding: int, bias: bool) -> None:
            super().__init__()
            self.body = nn.Sequential(*block([0, 2, 3]))
            self.a, self.b = (conv(6, 2, 3, 3, seed=7, bias=bias, padding=padding) for _ in range(2))
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.a(y) + self.b(y.sigmoid())  # type: ignore[no-any-return]

    for bias in (False, True):
        result = cleaned(Tied(0, bias), randn(2, 3, 8, 8))
        assert width(result, "body.0") == 3
        a, b = (result.program.module.get_submodule(name) for name in "ab")
        assert a.weight is b.weight
        assert float((a.bias - b.bias).detach().abs().max()) > 0.01
    assert width(cleaned(Tied(1, True), randn(2, 3, 8, 8)), "body.0") == 6


def test_what_trains_and_what_is_frozen_stays_so() -> None:
    first = block([0, 2])
    last = conv(6, 3, 3, 3, bias=False)
    last.weight.requires_grad_(False)
    module = cleaned(nn.Sequential(*first, last, conv(3, 2, 1, 1)), randn(2, 3, 8, 8)).program.module
    flags = {name: item.requires_grad for name, item in module.named_parameters()}
    assert flags == dict.fromkeys(("0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"), True) | {
        "3.weight": False,
        "3.bias": False,
    }


def test_one_channel_is_always_left() -> None:
    model = nn.Sequential(silent(conv(3, 4, 3, 3), range(4)), nn.ReLU(), conv(4, 2, 3, 3))
    result = cleaned(model, randn(2, 3, 7, 7))
    assert width(result, "0") == 1
    again = PassManager([RemoveDeadChannels()]).run(result.program)
    assert [(site.outcome, site.reason) for site in again.record.passes[0].sites] == [
        ("left", "no other channel would be left")
    ]


def test_what_stays_says_why() -> None:
    result = cleaned(nn.Sequential(*block([2]), conv(6, 2, 3, 3, padding=1)), randn(2, 3, 7, 7))
    assert reasons(result) == {"0": "it is not constant where zeros pad it"}
    net = Net(
        lambda self, x: (self.body(x), self.last(self.body(x)))[1],
        body=silent(conv(3, 4, 1, 1), [1]),
        last=conv(4, 2, 1, 1),
    )
    assert reasons(cleaned(net, randn(2, 3, 7, 7))) == {}
    both = Net(
        lambda self, x: self.last(self.body(x)) + self.body(x).cumsum(1)[:, :2],
        body=silent(conv(3, 4, 1, 1), [1]),
        last=conv(4, 2, 1, 1),
    )
    assert reasons(cleaned(both, randn(2, 3, 7, 7))) == {"body:0": "'cumsum' takes the cumsum along them"}


def test_nothing_is_looked_for_where_nothing_is_dead() -> None:
    result = cleaned(nn.Sequential(*block(), conv(6, 2, 3, 3, padding=1)), randn(2, 3, 7, 7))
    assert result.record.passes[0].sites == []


def test_sites_can_be_left_out() -> None:
    model = nn.Sequential(*block([1, 2]), *block([0, 3], inputs=6), conv(6, 2, 3, 3))
    result = cleaned(model, randn(2, 3, 9, 9), skip="0")
    assert (width(result, "0"), width(result, "3")) == (6, 4)
    result = cleaned(model, randn(2, 3, 9, 9), only="0")
    assert (width(result, "0"), width(result, "3")) == (4, 6)


@pytest.mark.parametrize("kind", ["zero gamma", "zero variance"])
def test_a_norm_without_a_scale_gives_its_shift(kind: str) -> None:
    body = block()
    norm: Any = body[1]
    if kind == "zero gamma":
        norm.weight.data[[0, 4]] = 0
    else:
        norm.running_var[[0, 4]] = 0  # alone it says nothing: the filter may still vary
    assert width(cleaned(nn.Sequential(*body, conv(6, 2, 3, 3)), randn(2, 3, 7, 7)), "0") == (
        4 if kind == "zero gamma" else 6
    )


def test_a_weight_that_its_dtype_cannot_hold_is_not_made() -> None:
    first = silent(conv(3, 6, 3, 3), [0, 2])
    first.bias.data[[0, 2]] = 6e4
    model = nn.Sequential(first, conv(6, 2, 3, 3)).half()
    model[1].weight.data[:, [0, 2]] = 1.0
    sites = list(RemoveDeadChannels().sites(trace(model.eval(), (randn(1, 3, 7, 7, dtype=torch.float16),))))
    assert sites == [Skip("0", "'1' would have a number that float16 cannot hold")]


def run(program: Program, seed: int) -> dict[str, Any]:
    """The values of all nodes for a random input."""
    found: dict[str, Any] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            found[n.name] = super().run_node(n)
            return found[n.name]

    inputs = [3 * randn(*item.shape, seed=seed) if item.is_floating_point() else item for item in program.examples]
    with torch.no_grad():
        Recorder(program.module).run(*inputs, enable_io_processing=False)
    return found


def test_constants_are_those_that_networks_have() -> None:
    """Held against runs: whatever is said to be constant is so, at every pixel of two inputs."""
    count = 0
    for seed in range(100):
        program = trace(*deadened(grow(RandomPicker(seed), RECIPES, most=14, habit=4)).build())
        known = _constants.constants(program)
        for values in (run(program, 0), run(program, 1)):
            for node, found in known.items():
                value = values[node.name]
                several = zip(found, value, strict=True) if isinstance(found, list) else [(found, value)]
                for constant, value in several:
                    if constant is None:
                        continue
                    whole = constant.expand(value.shape)
                    sure = ~whole.isnan()
                    count += int(sure.any())
                    assert torch.allclose(value[sure].double(), whole[sure], rtol=1e-11, atol=1e-11), (seed, node)
    assert count >= 300


@pytest.mark.parametrize("name", [*zoo.ARCHITECTURES, "ghostnet", "style_transfer", "pix2pix", "mobilevit", "yolov8"])
def test_dead_channels_of_networks_as_people_build_them_go(name: str) -> None:
    args, kwargs = zoo.example_inputs(name)
    model = {**zoo.ARCHITECTURES, **zoo.FAMILIES}[name]().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.bias.add_(0.3)
            if isinstance(layer, (nn.BatchNorm2d, nn.Conv2d, nn.Linear)):
                layer.weight[torch.rand(len(layer.weight), generator=generator) < 0.2] = 0
    program = trace(model, args, kwargs).snapshot()
    program.module.double()
    program = replace(program, examples=tuple(map(as_double, program.examples)))
    result = PassManager([RemoveDeadChannels()], verify="off").run(program)
    for ours, theirs in zip(*(item.outputs(*program.examples) for item in (result.program, program)), strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-12 * float(theirs.abs().max())
    assert result.record.after.parameters < 0.92 * result.record.before.parameters
