"""The first road goes through what a user writes, keeps what canonical form has, and notes the lines."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forms import Written
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from fxcompile.comparing import relative_maximum
from fxcompile.raw_nodes import PLACE
from fxcompile.signature import Signature
from fxcompile.symbolic import COMPOSITES, changing_line, symbolic_graph


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 7, 6)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def graph_of(model: nn.Module, x: Tensor | None = None) -> fx.GraphModule:
    return symbolic_graph(model, Signature.of(model, (image() if x is None else x,), {}))


COMPOSED: list[tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]] = [
    (F.softsign, (), {}),
    (F.tanhshrink, (), {}),
    (F.softmin, (1,), {}),
    (F.softmin, (), {"dim": -1, "dtype": torch.float32}),
    (F.normalize, (), {}),
    (F.normalize, (1.0, 2, 0.5), {}),
    (F.normalize, (), {"p": 3.0, "dim": -1}),
    (F.lp_pool2d, (2.0, 3), {}),
    (F.lp_pool2d, (1, (2, 3), 2), {"ceil_mode": True}),
    (F.lp_pool2d, (float("inf"), 2, 1), {}),
    (F.lp_pool2d, (float("-inf"), 2), {}),
    (F.lp_pool1d, (3.0, 2), {"stride": 1}),
]


@pytest.mark.parametrize("number", range(len(COMPOSED)))
def test_functions_that_are_taken_apart_compute_what_torch_does(number: int) -> None:
    function, args, kwargs = COMPOSED[number]
    x = image(2, 4, 7) if function is F.lp_pool1d else image()
    raw = graph_of(Written(lambda x: function(x, *args, **kwargs)), x)
    assert function not in {node.target for node in raw.graph.nodes}
    expected = function(x, *args, **kwargs)
    given = raw(x)
    assert given.dtype == expected.dtype
    assert relative_maximum(given, expected) <= 1e-12


def test_every_function_that_is_taken_apart_is_tried() -> None:
    assert {function for function, *_ in COMPOSED} == set(COMPOSITES)


class Own(nn.Conv2d):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


class Renamed(nn.Conv2d):
    """A subclass that computes what its base does."""


LAYERS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "plain": (lambda: nn.Conv2d(4, 2, 3), ["layer"]),
    "inherits": (lambda: Renamed(4, 2, 3), ["layer_weight", "layer_bias", "conv2d"]),
    "own forward": (lambda: Own(4, 2, 3), ["layer_weight", "layer_bias", "conv2d", "abs_1"]),
    "pads by itself": (
        lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"),
        ["layer_weight", "layer_bias", "pad", "conv2d"],
    ),
    "computed weight": (lambda: parametrizations.weight_norm(nn.Conv2d(4, 2, 3)), ["layer"]),
    "container": (lambda: nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh())), ["layer_0", "layer_1_0"]),
    "taken apart": (lambda: nn.Softsign(), ["abs_1", "add", "truediv"]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_canonical_form_has_are_kept_and_others_traced_through(name: str) -> None:
    make, expected = LAYERS[name]
    model = nn.Sequential()
    model.layer = make().double()
    raw = graph_of(model)
    names = [node.name for node in raw.graph.nodes if node.op not in ("placeholder", "output")]
    assert sorted(names) == sorted(expected)
    assert relative_maximum(raw(image()).detach(), model(image()).detach()) <= 1e-12


def test_a_forward_put_on_an_instance_is_followed() -> None:
    model = nn.Sequential(nn.Conv2d(4, 2, 3)).double()
    model[0].forward = lambda x: x * 3
    assert torch.equal(graph_of(model)(image()), image() * 3)
    model.forward = lambda x: x * 4
    assert torch.equal(graph_of(model)(image()), image() * 4)


def test_augmented_assignments_are_noted_as_what_they_are() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 1
        y += 1
        y -= 2
        y *= 3
        y /= 4
        y **= 2
        return y

    names = [getattr(node.target, "__name__", "") for node in graph_of(Written(forward)).graph.nodes]
    assert names == ["", "mul", "iadd", "isub", "imul", "itruediv", "ipow", ""]


def test_every_operation_notes_its_innermost_line() -> None:
    def helper(x: Tensor) -> Tensor:
        return x * 2

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        y = helper(y) + 1
        return y.relu()

    raw = graph_of(Written(forward, conv=nn.Conv2d(4, 2, 3).double()))
    first, inner = forward.__code__.co_firstlineno, helper.__code__.co_firstlineno
    places = {node.name: node.meta.get(PLACE) for node in raw.graph.nodes if node.op != "output"}
    lines = {"conv": first + 1, "mul": inner + 1, "add": first + 2, "relu": first + 3}
    assert {name: places[name] for name in lines} == {name: f"{__file__}:{line}" for name, line in lines.items()}


def test_the_line_that_changes_from_call_to_call_is_found() -> None:
    calls: list[int] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        calls.append(1)
        y = m.conv(x)
        y = y + x.new_tensor(1.0)
        return y * torch.tensor([float(len(calls))], dtype=x.dtype)

    model = Written(forward, conv=nn.Conv2d(4, 2, 3).double())
    signature = Signature.of(model, (image(),), {})
    line = forward.__code__.co_firstlineno + 4
    assert changing_line(model, signature, between=lambda: model(image())) == f"{__file__}:{line}"
    steady = Written(lambda m, x: m.conv(x) + 1, conv=nn.Conv2d(4, 2, 3).double())
    assert changing_line(steady, Signature.of(steady, (image(),), {}), between=lambda: None) is None
    branching = Written(lambda m, x: x if x.sum() > 0 else -x, conv=nn.Conv2d(4, 2, 3))
    assert changing_line(branching, Signature.of(branching, (image(),), {}), between=lambda: None) is None
