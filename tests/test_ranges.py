"""Ranges that values are said to lie in hold for large inputs, and what is said to change nothing changes nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fxcompile.passes._ranges import BOUNDED, UNCHANGED, evidence, lookup
from helpers import Net
from torch import Tensor, fx

from fxcompile.program import Program
from fxcompile.tracing import trace

Function = Callable[[Tensor], Tensor]
SHAPE = (2, 4, 6, 6)

# a function, the range of its values, and that on which it changes nothing
RANGES: dict[str, tuple[Function, tuple[float, float] | None, tuple[float, float] | None]] = {
    "ReLU": (F.relu, (0, math.inf), (0, math.inf)),
    "ReLU6": (F.relu6, (0, 6), (0, 6)),
    "hardtanh": (lambda x: F.hardtanh(x, -2, 3), (-2, 3), (-2, 3)),
    "clamp": (lambda x: x.clamp(-2, 3.5), (-2, 3.5), (-2, 3.5)),
    "clamp from below": (lambda x: x.clamp(min=-1), (-1, math.inf), (-1, math.inf)),
    "clamp from above": (lambda x: x.clamp(max=0.0), (-math.inf, 0), (-math.inf, 0)),
    "clamp by a tensor": (lambda x: x.clamp(max=x.mean()), None, None),
    "leaky ReLU": (F.leaky_relu, None, (0, math.inf)),
    "randomised ReLU": (lambda x: F.rrelu(x, training=False), None, (0, math.inf)),
    "ELU": (F.elu, None, (0, math.inf)),
    "CELU": (F.celu, None, (0, math.inf)),
    "absolute value": (torch.abs, (0, math.inf), (0, math.inf)),
    "sigmoid": (torch.sigmoid, (0, 1), None),
    "hard sigmoid": (F.hardsigmoid, (0, 1), None),
    "softmax": (lambda x: x.softmax(1), (0, 1), None),
    "softmin": (lambda x: F.softmin(x, 1), (0, 1), None),
    "tanh": (torch.tanh, (-1, 1), None),
    "softplus": (F.softplus, (0, math.inf), None),
    "exponential": (torch.exp, (0, math.inf), None),
    "square root": (lambda x: torch.sqrt(x), (0, math.inf), None),
    "square": (lambda x: x**2, (0, math.inf), None),
    "zeroth power": (lambda x: x**0, (0, math.inf), None),
    "cube": (lambda x: x**3, None, None),
    "inverse square": (lambda x: x**-2, None, None),
    "root by a power": (lambda x: x**0.5, None, None),
    "GELU": (F.gelu, None, None),
    "SELU": (F.selu, None, None),
}


def traced(function: Callable[[Tensor], Any], shape: tuple[int, ...] = SHAPE) -> tuple[Program, fx.Node]:
    """The program of one function, and the node that gives its value."""
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    program = trace(Net(lambda m, x: function(x)).double().eval(), x)
    (node,) = next(node for node in program.graph.nodes if node.op == "output").all_input_nodes
    return program, node


@pytest.mark.parametrize("name", RANGES)
def test_the_range_of_a_function_and_that_on_which_it_changes_nothing(name: str) -> None:
    function, values, unchanged = RANGES[name]
    program, node = traced(function)
    assert lookup(BOUNDED, program, node) == values
    assert lookup(UNCHANGED, program, node) == unchanged


@pytest.mark.parametrize("name", RANGES)
def test_the_ranges_hold(name: str) -> None:
    function, values, unchanged = RANGES[name]
    x = torch.linspace(-30, 30, 144, dtype=torch.float64).view(1, 4, 6, 6)
    y = function(x).nan_to_num(1.0)  # the roots of negative numbers
    if values is not None:
        assert values[0] <= float(y.min())
        assert float(y.max()) <= values[1]
    if unchanged is not None:
        inside = (x >= unchanged[0]) & (x <= unchanged[1])
        assert torch.equal(y[inside], x[inside])
        assert not torch.equal(y, x)


UNIT, AWAY, BELOW = (0.0, 1.0), (1.0, 2.0), (-2.0, -1.0)


def inside(function: Function, limits: tuple[float, float] = UNIT) -> Function:
    """The function of values that lie within limits."""
    return lambda x: function(x.clamp(*limits))


# what keeps values within limits, and those
STAYS: dict[str, tuple[Function, tuple[float, float]]] = {
    "the same": (lambda x: x, UNIT),
    "max pool": (lambda x: F.max_pool2d(x, 3, 1, 1), AWAY),
    "average": (lambda x: F.avg_pool2d(x, 3, 1, 1), UNIT),
    "average up to zero": (lambda x: F.avg_pool2d(x, 3, 1, 1), (-1.0, 0.0)),
    "average of a line": (lambda x: F.avg_pool1d(x.flatten(2), 3, 1, 1), UNIT),
    "average of a volume": (lambda x: F.avg_pool3d(x, 3, 1, 1), UNIT),
    "adaptive average": (lambda x: F.adaptive_avg_pool2d(x, 2), AWAY),
    "padding by a number inside": (lambda x: F.pad(x, (1, 1), value=0.5), UNIT),
    "padding by the lower limit": (lambda x: F.pad(x, (1, 1)), UNIT),
    "padding by the upper limit": (lambda x: F.pad(x, (1, 1), value=1.0), UNIT),
    "padding that repeats": (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), AWAY),
    "nearest interpolation": (lambda x: F.interpolate(x, scale_factor=2), AWAY),
    "linear interpolation": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), AWAY),
    "moved, dropped, averaged": (lambda x: x.flatten(2)[:, :2].permute(0, 2, 1).mean(1).unsqueeze(1).squeeze(1), AWAY),
    "reshaped and repeated": (lambda x: x.reshape(-1, 2, 2, 36)[:, :1].expand(-1, 3, -1, -1), AWAY),
    "largest and smallest": (lambda x: x.amax(3).amin(2), AWAY),
    "pixels shuffled": (lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 3), AWAY),
    "channels shuffled": (lambda x: F.channel_shuffle(x, 2), AWAY),
    "dropout": (lambda x: F.dropout(x, training=False), AWAY),
}

# what may leave limits, and those
LEAVES: dict[str, tuple[Function, tuple[float, float]]] = {
    "an average with zeros outside, above zero": (lambda x: F.avg_pool2d(x, 3, 1, 1), AWAY),
    "an average with zeros outside, below zero": (lambda x: F.avg_pool2d(x, 3, 1, 1), BELOW),
    "a sum by a pool": (lambda x: F.avg_pool2d(x, 2, divisor_override=1), UNIT),
    "padding by a number below": (lambda x: F.pad(x, (1, 1), value=-0.5), UNIT),
    "padding by a number above": (lambda x: F.pad(x, (1, 1), value=1.5), UNIT),
    "padding by zero, above zero": (lambda x: F.pad(x, (1, 1)), AWAY),
    "cubic interpolation": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), UNIT),
    "a sum": (lambda x: x.sum(1), UNIT),
    "twice": (lambda x: x + x, UNIT),
    "the negative": (torch.neg, UNIT),
}


@pytest.mark.parametrize("name", STAYS)
def test_values_stay_within_limits(name: str) -> None:
    function, limits = STAYS[name]
    program, node = traced(inside(function, limits))
    found = evidence(program, node, limits)
    assert found is not None
    assert found[0].name == "clamp"
    assert found[-1] is node
    assert all(later.all_input_nodes == [earlier] for earlier, later in itertools.pairwise(found))
    y = inside(function, limits)(torch.linspace(-30, 30, 288, dtype=torch.float64).view(SHAPE))
    assert limits[0] <= float(y.min())
    assert float(y.max()) <= limits[1]


@pytest.mark.parametrize("name", LEAVES)
def test_values_may_leave_limits(name: str) -> None:
    function, limits = LEAVES[name]
    program, node = traced(inside(function, limits))
    assert evidence(program, node, limits) is None
    constant = [torch.full(SHAPE, value, dtype=torch.float64) for value in limits]
    drawn = torch.linspace(-30, 30, 288, dtype=torch.float64).view(SHAPE)
    ys = [inside(function, limits)(x) for x in (*constant, drawn)]
    assert any(float(y.min()) < limits[0] or float(y.max()) > limits[1] for y in ys)


def test_wider_limits_hold_and_narrower_ones_do_not() -> None:
    program, node = traced(lambda x: F.max_pool2d(x.clamp(-1, 1), 2))
    for limits in ((-1.0, 1.0), (-2.0, 1.0), (-1.0, 3.0), (-math.inf, math.inf)):
        assert evidence(program, node, limits) is not None
    for limits in ((-0.5, 1.0), (-1.0, 0.5), (0.0, 0.5)):
        assert evidence(program, node, limits) is None


def test_of_an_input_and_of_several_values_nothing_follows() -> None:
    program, node = traced(lambda x: x.flatten(2))
    assert evidence(program, node, (-1e9, 1e9)) is None
    program, node = traced(lambda x: x.clamp(0, 1).reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3]))
    assert len(node.all_input_nodes) > 1
    assert evidence(program, node, UNIT) is None
