"""Layers are fitted towards what is seen of them: sums that they are added to, and what ReLUs leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fxcompile.passes import PruneFilters
from helpers import Net, images, randn
from torch import Tensor, nn

from fxcompile.fitting import LayerStats, collect, refitted
from fxcompile.manager import PassManager
from fxcompile.program import FEATURE, Program
from fxcompile.rectified import Behind, Sample, error_behind, rectified
from fxcompile.tracing import trace


def traced(function: Any, **layers: nn.Module) -> Program:
    torch.manual_seed(0)
    program = trace(Net(function, **layers).double().eval(), (images(2, 3, 8, 8),))
    for node in program.graph.nodes:
        node.meta[FEATURE] = node.name
    return program


def behind(function: Any) -> Behind:
    program = traced(function, a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1))
    node = next(node for node in program.graph.nodes if str(node.target) == "b")
    return Behind.of(program, program, node)


def test_a_sum_with_what_is_known_before_is_found_and_the_relu_behind_it() -> None:
    found = behind(lambda net, x: (net.a(x) + net.b(x)).relu())
    assert found.total is not None
    assert str(found.beside) == "a"
    assert found.rectified
    found = behind(lambda net, x: net.b(x.relu()) + x)
    assert str(found.beside) == "x"
    assert not found.rectified


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: net.b(x) + net.a(x),  # computed after it
        lambda net, x: net.a(x) - net.b(x),
        lambda net, x: net.a(x) + 2 * net.b(x),
        lambda net, x: (y := net.b(x)) + y,
        lambda net, x: net.a(x) + (y := net.b(x)) * y,
        lambda net, x: net.a(x).mean((2, 3), keepdim=True) + net.b(x),
    ],
)
def test_other_sums_are_none(function: Any) -> None:
    assert behind(function) == Behind(None, None, False)


def test_a_relu_is_found_where_it_might_as_well_stand_before() -> None:
    pool = torch.nn.functional.max_pool2d
    assert behind(lambda net, x: net.b(x).relu()).rectified
    assert behind(lambda net, x: torch.cat([net.a(x), pool(net.b(x), 2, 1, 1)[:, :, 1:, 1:]], 1)).rectified is False
    assert behind(lambda net, x: torch.cat([x, pool(net.b(x), 3, 1, 1)], 1).relu()).rectified
    assert not behind(lambda net, x: torch.nn.functional.avg_pool2d(net.b(x), 2).relu()).rectified
    assert not behind(lambda net, x: (y := net.b(x)).relu() + y.mean()).rectified


def test_a_sum_that_the_original_does_not_have_is_none() -> None:
    program = traced(lambda net, x: net.a(x) + net.b(x), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1))
    node = next(node for node in program.graph.nodes if str(node.target) == "b")
    other = traced(lambda net, x: net.a(x), a=nn.Conv2d(3, 3, 1))
    assert Behind.of(program, other, node) == Behind(None, None, False)


LAYERS = {
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 6, 6)),
    "without bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (4, 6, 6)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (4, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 6, 6)),
    "linear": (lambda: nn.Linear(4, 6), (4,)),
}


def loss(layer: Any, samples: list[Sample]) -> float:
    """The sum that is descended on, by its definition."""
    total = 0.0
    for sample in samples:
        seen = sample.seen(layer).detach()
        total += float(torch.where(sample.total > 0, seen - sample.total, seen.relu()).square().sum())
    return total


@pytest.mark.parametrize("kind", LAYERS)
def test_what_a_relu_cuts_off_need_not_be_met(kind: str) -> None:
    """From least squares, the sum of what remains falls towards what L-BFGS finds, and by most of that at once."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, teacher = make().double(), make().double()
    x = randn(64, *shape)
    y = teacher(x).detach()
    total = y.sign() * y.square() - 0.2  # nothing that the layer could give
    beside = 0.3 * randn(*y.shape, seed=1)
    samples = [Sample(x[part], total[part], beside[part]) for part in (slice(0, 40), slice(40, 64))]
    stats = collect(layer, [(item.x, item.total - item.beside) for item in samples if item.beside is not None])
    start = refitted(layer, stats)
    found = rectified(start, stats, samples)
    best = refitted(layer, stats).requires_grad_()
    optimiser = torch.optim.LBFGS(best.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = sum(
            torch.where(item.total > 0, (s := item.seen(best)) - item.total, s.relu()).square().sum()
            for item in samples
        )
        assert isinstance(value, Tensor)
        value.backward()
        return value

    optimiser.step(closure)
    least, squares, ours = loss(best, samples), loss(start, samples), loss(found, samples)
    assert squares - ours > 0.8 * (squares - least)
    to_the_end = loss(rectified(start, stats, samples, steps=200), samples)
    assert squares - to_the_end > 0.98 * (squares - least)


def test_a_layer_that_nothing_is_cut_off_of_stays_at_least_squares() -> None:
    layer = nn.Linear(4, 6).double()
    x = randn(400, 4)
    total = (x @ randn(4, 6, seed=1)).exp() + 50
    stats = collect(layer, [(x, total)])
    start = refitted(layer, stats)
    errors = [
        error_behind(item, [Sample(x, total, None)], True)
        for item in (start, rectified(start, stats, [Sample(x, total, None)]))
    ]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_inputs_that_never_vary_do_no_harm() -> None:
    layer = nn.Linear(3, 2).double()
    x = torch.zeros(50, 3).double()
    stats = collect(layer, [(x, torch.ones(50, 2).double())])
    found = rectified(layer, stats, [Sample(x, torch.ones(50, 2).double(), None)])
    assert torch.equal(found.weight, layer.weight)
    assert torch.allclose(found.bias, torch.ones(2).double())
    assert isinstance(stats, LayerStats)


def test_a_branch_gives_back_what_its_stream_has_lost() -> None:
    """Half of the eight channels hold all three of the input, two of four do not."""

    def run(net: Any, x: Tensor) -> Tensor:
        stream = net.few_behind(net.few(x))
        return net.head(stream + net.many_behind(net.many(x)))

    torch.manual_seed(0)
    ends = {"few": (3, 4), "few_behind": (4, 4), "many": (3, 8), "many_behind": (8, 4), "head": (4, 2)}
    net = Net(run, **{name: nn.Conv2d(*of_one, 1) for name, of_one in ends.items()}).double().eval()
    x = randn(64, 3, 6, 6)
    result = PassManager([PruneFilters(ratio=0.5, only=["few", "many"])], calibration=x).run(trace(net, (x[:2],)))
    errors = {site.name: site.error for site in result.record.passes[0].sites if site.outcome == "kept"}
    assert errors["few"] > 0.1
    assert errors["many"] < 0.02
    assert result.record.passes[0].error < 0.02
