"""absorb-shuffles: which orders go where, that nothing else changes, and what stays for which reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fxcompile.passes import AbsorbShuffles
from helpers import KINDS, Net, conv, images, outputs, planted, printed, randn, relative
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompile.manager import PassManager, Result
from fxcompile.rewriting import Skip
from fxcompile.testing import Recipe, Step, check_pass
from fxcompile.tracing import trace


class Order(nn.Module):
    """Channels in another order, as passes leave it."""

    def __init__(self, order: Tensor, axis: int = 1) -> None:
        super().__init__()
        self.register_buffer("order", order)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.axis, self.order)


def order(count: int, seed: int = 0, axis: int = 1) -> Order:
    return Order(torch.randperm(count, generator=torch.Generator().manual_seed(seed)), axis)


def norm(channels: int, dims: int = 2, seed: int = 0, kind: str = "Batch") -> Any:
    """A norm with numbers from a seed."""
    options = {"affine": True, "track_running_stats": True} if kind == "Instance" else {}
    layer = getattr(nn, f"{kind}Norm{dims}d")(channels, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        for index, values in enumerate((layer.weight, layer.bias, layer.running_mean, layer.running_var)):
            values.copy_(randn(channels, seed=seed + index).abs() + 0.1)
    return layer


def prelu(channels: int) -> nn.PReLU:
    layer = nn.PReLU(channels, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(randn(channels, seed=9))
    return layer


def absorbed(model: nn.Module, x: Tensor, **options: Any) -> Result:
    result = PassManager([AbsorbShuffles(**options)], verify_examples=2).run(trace(model.eval(), x))
    wanted = outputs(model, x)
    assert float((outputs(result.module, x) - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())
    return result


def orders_in(result: Result) -> int:
    nodes = result.program.graph.nodes
    shuffles = sum(isinstance(result.program.layer(node), nn.ChannelShuffle) for node in nodes)
    return shuffles + sum(node.target is torch.index_select for node in nodes)


def reason(model: nn.Module, x: Tensor) -> str:
    (skip,) = AbsorbShuffles().sites(trace(model.eval(), x))
    assert isinstance(skip, Skip)
    return skip.reason


# ---- exactness -------------------------------------------------------------------------------------------------------


@st.composite
def chains(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """Layers in a row with orders between, each of which can go into a layer; the layers have no groups."""
    dims, channels = draw(st.integers(1, 3)), draw(st.sampled_from([4, 6]))
    maps = (3,) * dims
    seeds = iter(range(1, 100))

    def linear(inputs: int, outs: int) -> nn.Module:
        seed = next(seeds)
        if draw(st.integers(0, 3)):
            return conv(inputs, outs, *maps, padding=1, seed=seed, bias=draw(st.booleans()))
        layer = getattr(nn, f"ConvTranspose{dims}d")(inputs, outs, 3, padding=1, dtype=torch.float64)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(randn(*parameter.shape, seed=seed) / 5)
        return layer

    def between() -> list[nn.Module]:
        kinds = {
            "relu": nn.ReLU, "tanh": nn.Tanh, "hardswish": nn.Hardswish,
            "batch": lambda: norm(channels, dims, next(seeds)),
            "instance": lambda: norm(channels, dims, next(seeds), "Instance"),
            "prelu": lambda: prelu(channels),
            "pool": lambda: getattr(nn, f"MaxPool{dims}d")(2, 1, 1),
            "average": lambda: getattr(nn, f"AvgPool{dims}d")(3, 1, 1),
            "depthwise": lambda: conv(channels, channels, *maps, padding=1, groups=channels, seed=next(seeds)),
            "shuffle": lambda: nn.ChannelShuffle(2) if dims > 1 else order(channels, next(seeds)),
            "order": lambda: order(channels, next(seeds)),
        }  # fmt: skip
        drawn = draw(st.lists(st.sampled_from(sorted(kinds)), max_size=5))
        return [kinds[name]() for name in drawn]

    rows = [[linear(3, channels), *between()], [linear(channels, channels), *between()], [linear(channels, 5)]]
    front = draw(st.lists(st.sampled_from(["order", "relu"]), max_size=3))
    rows.insert(0, [order(3, next(seeds)) if name == "order" else nn.ReLU() for name in front])
    return nn.Sequential(*(layer for row in rows for layer in row)), randn(2, 3, *[5] * dims, seed=3)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(chains())
def test_between_dense_layers_no_order_is_left(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    result = absorbed(model, x)
    assert orders_in(result) == 0
    made = [type(layer) for layer in result.module.modules() if not list(layer.children())]
    old = [type(layer) for layer in model.modules() if not list(layer.children())]
    gone = (Order, nn.ChannelShuffle)
    assert sorted(map(str, made)) == sorted(str(kind) for kind in old if kind not in gone)


def test_the_kit_breaks_none_of_its_promises() -> None:
    planted = Recipe((Step("convolution"), Step("channel shuffle", (), ((0, 0),))))
    assert check_pass(AbsorbShuffles(), examples=100, seed=1, onnx_examples=1, sites=[planted]).with_sites >= 10


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_orders_within_groups_go_into_layers_with_groups(groups: int, transposed: bool) -> None:
    each = torch.tensor([2, 0, 1, 3])
    inside = Order(torch.cat([4 * group + each for group in range(groups)]))
    layer: Any = conv(4 * groups, 4 * groups, 3, 3, groups=groups)
    if transposed:
        layer = nn.ConvTranspose2d(4 * groups, 4 * groups, 3, groups=groups, dtype=torch.float64)
    x = randn(2, 4 * groups, 6, 6)
    for net in (nn.Sequential(inside, layer), nn.Sequential(layer, inside)):
        assert orders_in(absorbed(net, x)) == 0
    mixed = nn.Sequential(layer, order(4 * groups), layer.__class__(4 * groups, 4, 3, groups=2, dtype=torch.float64))
    assert "the groups of '0' would be mixed" in reason(mixed, x)
    assert "the groups of '2' would be mixed" in reason(mixed, x)


def test_orders_behind_a_flatten_move_the_pixels_of_a_channel_together() -> None:
    last = nn.Linear(6 * 16, 5, dtype=torch.float64)
    net = Net(lambda m, x: m.last(m.norm(torch.flatten(m.order(x), 1))), order=order(6), last=last, norm=norm(96, 1))
    assert printed(absorbed(net, randn(3, 6, 4, 4)).program) == "\n".join([
        "flatten_1 = flatten(x, 1, 3)",
        "last.1 = BatchNorm1d(flatten_1)",
        "last.2 = Linear 96->5(last.1)",
        "return last.2",
    ])  # fmt: skip


MEANS: dict[str, Any] = {
    "means": lambda y: y.mean((2, 3)),
    "means that keep axes, squeezed": lambda y: y.mean((2, 3), keepdim=True).squeeze(3).squeeze(2),
    "means of rows, and a flatten of what is behind": lambda y: y.mean(2).unsqueeze(2).flatten(2).mean(2),
    "other axes exchanged": lambda y: y.permute(0, 1, 3, 2).mean((2, 3)),
}


@pytest.mark.parametrize("name", MEANS)
def test_orders_go_through_what_leaves_channels_on_their_axis(name: str) -> None:
    x, between = randn(2, 3, 8, 8), MEANS[name]
    last, kept = nn.Linear(6, 4).double(), conv(6, 6, 3, 3, groups=3, bias=False)
    front = Net(lambda m, x: m.last(between(m.order(m.first(x)))), first=conv(3, 6, 3, 3), order=order(6), last=last)
    assert orders_in(absorbed(front, x)) == 0
    front = Net(lambda m, x: m.order(between(m.first(x))), first=conv(3, 6, 3, 3), order=order(6))
    assert orders_in(absorbed(front, x)) == 0
    y = randn(2, 6, 8, 8)
    behind = Net(lambda m, x: m.last(between(m.order(m.kept(x)))), kept=kept, order=order(6), last=last)
    assert orders_in(absorbed(behind, y)) == 0


def test_an_order_of_flattened_pixels_stays_where_it_mixes_channels() -> None:
    net = Net(lambda m, x: m.order(m.first(x).flatten(1)).relu(), first=conv(3, 4, 3, 3), order=order(16))
    assert "('flatten' is no layer that takes it)" in reason(net, randn(2, 3, 4, 4))
    rows = Net(lambda m, x: m.last(m.order(x).flatten(1, 2)), order=order(4), last=conv(12, 5, 3))
    assert orders_in(absorbed(rows, randn(2, 4, 3, 6))) == 1
    steps = Net(lambda m, x: m.last(m.order(m.first(x)).flatten(2)), first=nn.Linear(5, 6).double(),
                order=order(6, axis=2), last=nn.Linear(6, 4).double())  # fmt: skip
    assert orders_in(absorbed(steps, randn(2, 3, 5))) == 0


def test_linear_layers_take_orders_of_their_last_axis() -> None:
    first, last = nn.Linear(3, 6, dtype=torch.float64), nn.Linear(6, 4, dtype=torch.float64)
    assert orders_in(absorbed(nn.Sequential(first, nn.GELU(), order(6, 0, 2), last), randn(2, 5, 3))) == 0
    assert orders_in(absorbed(nn.Sequential(order(3, 0, -1), last.__class__(3, 4).double()), randn(2, 3))) == 0
    assert "has its channels on another axis" in reason(nn.Sequential(first, order(5, 0, 1)), randn(2, 5, 3))


def test_one_image_without_a_batch_works() -> None:
    net = nn.Sequential(conv(3, 4, 3, 3), nn.ReLU(), order(4, 1, 0), nn.MaxPool2d(2), conv(4, 2, 1, 1))
    assert orders_in(absorbed(net, randn(3, 9, 9))) == 0


# ---- with what leaves them -------------------------------------------------------------------------------------------


def test_no_order_is_left_of_permuted_groups_between_dense_layers() -> None:
    net = Net(lambda m, x: m.c(m.norm(m.b(m.a(x).relu())).relu()), a=conv(3, 8, 3, 3), b=conv(8, 12, 3, 3, seed=4),
              norm=norm(12), c=conv(12, 4, 1, 1))  # fmt: skip
    planted(net.b, 2, 1)
    x = randn(2, 3, 9, 9)
    text = "group-shuffle(style=permuted, only=b)"
    before = PassManager(text, verify_examples=2).run(trace(net.eval(), x))
    result = PassManager(f"{text}, absorb-shuffles", verify_examples=2).run(trace(net, x))
    assert (orders_in(before), orders_in(result)) == (2, 0)
    assert relative(outputs(result.module, x), outputs(before.module, x)) < 1e-12
    assert [layer.groups for layer in result.module.modules() if type(layer) in KINDS.values()] == [1, 2, 1]


def test_of_two_orders_between_layers_with_groups_one_is_left() -> None:
    net = nn.Sequential(conv(4, 8, 3, 3, groups=2), order(8, 1), norm(8), nn.ReLU(), order(8, 2),
                        conv(8, 4, 3, 3, groups=2))  # fmt: skip
    x = randn(2, 4, 8, 8)
    assert orders_in(absorbed(net, x)) == 1
    undone = Order(net[1].order.argsort())
    assert orders_in(absorbed(nn.Sequential(*net[:4], undone, net[5]), x)) == 0


def test_branches_of_split_kernels_are_put_in_order_by_the_layer_behind() -> None:
    net = nn.Sequential(conv(4, 8, 3, 3, padding=1, seed=3), nn.ReLU(), conv(8, 5, 1, 1)).float()
    x = images(24, 4, 9, 9).float()
    text = "split-kernels(arrangement=parallel, merge=concat)"
    before = PassManager(text, calibration=x, verify_examples=2).run(trace(net.eval(), x))
    result = PassManager(f"{text}, absorb-shuffles", calibration=x, verify_examples=2).run(trace(net, x))
    assert (orders_in(before), orders_in(result)) == (1, 0)


# ---- what stays ------------------------------------------------------------------------------------------------------


def test_what_stays_says_why() -> None:
    x, first, last = randn(2, 3, 8, 8), conv(3, 4, 3, 3), conv(4, 2, 1, 1)
    neither = "it goes neither into what is before it ({}) nor after it ({})"
    one, net = order(4), nn.Sequential
    assert reason(Net(lambda m, x: m.order(x), order=order(3)), x) == neither.format(
        "'x' is no layer that takes it", "'output' is no layer that takes it"
    )
    double = Net(lambda m, x: (lambda y: (m.last(m.order(y)), y))(m.first(x)), first=first, order=one, last=last)
    assert orders_in(absorbed_many(double, x)) == 0
    assert reason(
        Net(lambda m, x: (lambda y: m.order(y) + y)(m.first(x)), first=first, order=one), x
    ) == neither.format("the output of 'first' is used 2 times", "'add' is no layer that takes it")
    assert reason(net(nn.Softmax(1), order(3), nn.Softmax(1)), x) == neither.format(
        "'0' is no layer that takes it", "'2' is no layer that takes it"
    )
    again = Net(lambda m, x: m.order(m.same(m.same(x))), same=conv(3, 3, 3, 3), order=order(3))
    assert reason(again, x) == neither.format("'same' is called 2 times", "'output' is no layer that takes it")
    tied = Net(lambda m, x: m.other(m.order(m.one(x))), one=conv(3, 3, 1, 1), order=order(3), other=nn.ReLU())
    tied.twin = conv(3, 3, 1, 1)
    tied.twin.weight = tied.one.weight
    tied.function = lambda m, x: m.order(m.one(x)) + m.twin(x)
    assert reason(tied, x) == neither.format("'one' shares its weight", "'add' is no layer that takes it")


def absorbed_many(model: nn.Module, x: Tensor) -> Result:
    """The same for several outputs."""
    result = PassManager([AbsorbShuffles()], verify_examples=2).run(trace(model.eval(), x))
    with torch.no_grad():
        for ours, wanted in zip(result.module(x), model(x), strict=True):
            assert float((ours - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())
    return result


def test_a_choice_of_channels_is_no_order() -> None:
    for chosen in (torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 2, 3, 0])):
        net = nn.Sequential(conv(3, 4, 3, 3), Order(chosen))
        assert list(AbsorbShuffles().sites(trace(net.eval(), randn(2, 3, 8, 8)))) == []


def test_an_order_of_something_else_than_channels_stays() -> None:
    net = nn.Sequential(conv(3, 4, 3, 3), order(6, 1, 2), conv(4, 2, 1, 1))
    assert reason(net, randn(2, 3, 8, 8)).count("has its channels on another axis") == 2


def test_what_trains_goes_on_and_what_is_frozen_stays_frozen() -> None:
    net = nn.Sequential(conv(3, 4, 3, 3), norm(4), order(4, 1))
    net[0].weight.requires_grad_(False)
    net[1].bias.requires_grad_(False)
    made = {name: values.requires_grad for name, values in absorbed(net, randn(2, 3, 8, 8)).module.named_parameters()}
    assert made == {"0.0.weight": False, "0.0.bias": True, "0.1.weight": True, "0.1.bias": False}
