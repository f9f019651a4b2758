"""head-to-conv: the head as convolutions computes the same, or as a pooled one is the nearest there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fxcompile.passes import HeadToConv
from torch import Tensor, nn

from fxcompile.manager import PassManager, Result
from fxcompile.testing import check_pass
from fxcompile.tracing import trace

SIZES = [(5,), (4, 3), (2, 3, 2), (1, 1)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Headed(nn.Module):
    """A head on a map as it comes in."""

    def __init__(self, *layers: nn.Module, flatten: Callable[[Tensor], Tensor] = lambda x: x.flatten(1)) -> None:
        super().__init__()
        self.flatten, self.head = flatten, nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.flatten(x))


def deep_head(features: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Linear(features, 8), nn.PReLU(8), nn.Dropout(0.5), nn.Linear(8, 6, bias=False), nn.Hardswish(),
        nn.Linear(6, 4), nn.Softmax(1),
    ]  # fmt: skip


def convolved(model: nn.Module, x: Tensor, calibration: Tensor | None = None, **options: Any) -> Result:
    manager = PassManager([HeadToConv(**options)], calibration=calibration, verify_examples=2)
    return manager.run(trace(model.eval(), x))


def kinds(result: Result) -> list[str]:
    """The operations in order; layers by their class."""
    names = []
    for node in result.program.graph.nodes:
        if node.op in ("call_module", "call_function"):
            layer = result.program.layer(node)
            names.append(node.target.__name__ if layer is None else type(layer).__name__)
    return names


def reasons(result: Result) -> dict[str, str]:
    return {site.name: site.reason for site in result.record.passes[0].sites if site.outcome == "left"}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_head_of_several_layers_is_convolutions_and_one_flatten(size: tuple[int, ...]) -> None:
    x = randn(3, 2, *size)
    model = Headed(*deep_head(x[0].numel())).double().eval()
    result = convolved(model, x.double())
    conv = f"Conv{len(size)}d"
    assert kinds(result) == [conv, "PReLU", "Dropout", conv, "Hardswish", conv, "flatten", "Softmax"]
    layers = [layer for layer in result.program.module.modules() if type(layer).__name__ == conv]
    assert [tuple(layer.kernel_size) for layer in layers] == [size, (1,) * len(size), (1,) * len(size)]
    assert [layer.bias is None for layer in layers] == [False, True, False]
    with torch.no_grad():
        difference = (result.program(x.double()) - model(x.double())).abs().max()
    assert float(difference) < 1e-14


def test_on_a_larger_map_the_convolutions_give_what_the_head_gives_at_each_place() -> None:
    x = randn(2, 3, 4, 4)
    model = Headed(nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 2))
    result = convolved(model, x)
    larger = randn(2, 3, 6, 5, seed=1)
    layers = [result.program.layer(node) for node in result.program.graph.nodes if node.op == "call_module"]
    maps = larger
    with torch.no_grad():
        for layer in layers:
            assert layer is not None
            maps = layer(maps)
        assert maps.shape == (2, 2, 3, 2)
        for row in range(3):
            for column in range(2):
                window = larger[:, :, row : row + 4, column : column + 4]
                torch.testing.assert_close(maps[:, :, row, column], model(window))


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: torch.flatten(x, 1),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: x.reshape(-1, 24),
    "view of a pool": lambda x: nn.functional.adaptive_avg_pool2d(x, (4, 3)).view(len(x), -1),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_flatten_is_a_site(spelling: str) -> None:
    result = convolved(Headed(nn.Linear(24, 5), flatten=SPELLINGS[spelling]), randn(3, 2, 4, 3))
    assert kinds(result)[-2:] == ["Conv2d", "flatten"]


def test_the_chain_ends_where_a_value_or_a_layer_is_used_again() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(24, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.tied = nn.Linear(6, 6)
            self.tied.weight = self.second.weight

        def forward(self, x: Tensor) -> list[Tensor]:
            y = torch.relu(self.first(x.flatten(1)))
            return [self.third(torch.relu(self.second(y))), self.tied(y)]

    result = convolved(Twice(), randn(2, 2, 4, 3))
    assert kinds(result) == ["Conv2d", "flatten", "ReLU", "Linear", "ReLU", "Linear", "Linear"]
    direct = Headed(nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    assert kinds(convolved(direct, randn(2, 2, 4, 3))) == [
        "Conv2d", "ReLU", "Conv2d", "flatten", "BatchNorm1d", "Linear",
    ]  # fmt: skip


def test_what_stays_says_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.again, self.one = nn.Linear(12, 3), nn.Linear(24, 24), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> list[Tensor]:
            again = self.again(self.again(x.flatten(1)))
            return [self.rows(x.flatten(2)), again, self.one(x.mean((2, 3), keepdim=True).flatten(1))]

    x = randn(2, 2, 4, 3)
    left = reasons(convolved(Odd(), x))
    assert left == {
        "rows": "what is flattened ahead of it is no map [N, C, ...]",
        "again": "it is called 2 times",
    }
    left = reasons(convolved(Odd(), x, style="pool"))
    assert left["one"] == "the map has one place, and nothing to pool"


def test_frozen_weights_stay_frozen() -> None:
    model = Headed(nn.Linear(24, 5)).requires_grad_(False)
    assert not any(item.requires_grad for item in convolved(model, randn(2, 2, 4, 3)).module.parameters())


# ---- style=pool ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_weights_that_are_alike_at_all_places_lose_nothing(size: tuple[int, ...]) -> None:
    x = randn(3, 2, *size).double()
    linear = nn.Linear(x[0].numel(), 4).double()
    with torch.no_grad():
        linear.weight.copy_(randn(4, 2, 1, seed=1).expand(4, 2, x[0, 0].numel()).flatten(1))
    result = convolved(Headed(linear), x, style="pool")
    conv = f"Conv{len(size)}d"
    assert kinds(result) == [f"AdaptiveAvgPool{len(size)}d", conv, "flatten"]
    error = result.record.passes[0].sites[0].error
    assert error is not None
    assert error < 1e-15
    saved = result.record.passes[0].sites[0]
    assert saved.after.parameters == 4 * 2 + 4
    assert saved.after.macs * x[0, 0].numel() == saved.before.macs


def correlated(samples: int, seed: int) -> Tensor:
    """Maps whose places are alike but for a slope, with channels that go together."""
    mixed = randn(samples, 3, seed=seed) @ randn(3, 3, seed=99)
    slope = torch.linspace(0.5, 1.5, 12).view(1, 1, 4, 3)
    return mixed.view(samples, 3, 1, 1) * slope + 0.3 * randn(samples, 3, 4, 3, seed=seed + 1) + 0.5


@pytest.mark.parametrize("bias", [True, False])
def test_with_data_it_is_the_least_squares_solution_on_the_means(bias: bool) -> None:
    torch.manual_seed(3)
    linear = nn.Linear(36, 4, bias=bias)
    data = correlated(400, seed=5)
    result = convolved(Headed(linear), data[:2], calibration=data, style="pool")
    fit = result.program(data)
    with torch.no_grad():
        wanted = linear(data.flatten(1))
    means = data.flatten(2).mean(2).double()
    columns = torch.cat([means, torch.ones(len(means), 1)], 1) if bias else means
    best = columns @ torch.linalg.lstsq(columns, wanted.double()).solution
    lowest, ours = (best - wanted).norm(), (fit.double() - wanted).norm()
    assert float(ours) <= 1.02 * float(lowest)


def test_data_never_lose_to_the_weights_alone_on_what_was_held_out() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        data = correlated(60, seed=10 * seed)
        held = correlated(300, seed=1000 + seed)
        model = Headed(nn.Linear(36, 4)).eval()
        with torch.no_grad():
            wanted = model(held)
        alone, fitted = (
            (convolved(model, data[:2], calibration=given, style="pool").program(held) - wanted).norm()
            for given in (None, data)
        )
        assert fitted < 0.9 * alone


@pytest.mark.parametrize("style", ["exact", "pool"])
def test_the_kit_finds_nothing(style: str) -> None:
    summary = check_pass(HeadToConv(style=style), examples=80, seed=2, onnx_examples=2)  # type: ignore[arg-type]
    assert summary.with_sites > 15
    assert summary.exported == 2


def test_what_stands_between_the_nodes_of_a_site_is_computed_for_those_behind_it() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(2, 3, 1), nn.Linear(24, 4), nn.Linear(36, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            flat, other = x.flatten(1), self.conv(x)
            return self.first(flat), self.second(other.flatten(1))

    data = randn(40, 2, 4, 3, seed=1)
    result = convolved(Two(), data[:2], calibration=data, style="pool")
    assert [site.outcome for site in result.record.passes[0].sites] == ["kept", "kept"]
    assert kinds(result).count("Linear") == 0
