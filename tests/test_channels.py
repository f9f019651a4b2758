"""Where an operation is said to carry channels, a scale and a shift for each give the same before and after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fxcompile.passes._channels import Way, carry, follow
from helpers import Net
from torch import Tensor, fx, nn

from fxcompile.program import Program
from fxcompile.tracing import trace

Case = tuple[Callable[[Tensor], Tensor], tuple[int, ...], list[int | None]]

MAPS, LONG, SOLID = (2, 3, 4, 5), (2, 3, 5), (2, 3, 4, 5, 4)
NEVER = [None] * 4

# an operation, the shape of its input, and for each axis of it the one on which channels are afterwards
CASES: dict[str, Case] = {
    "dropout": (lambda x: F.dropout(x, training=False), MAPS, [0, 1, 2, 3]),
    "dropout of channels": (lambda x: F.dropout2d(x, training=False), MAPS, [0, 1, 2, 3]),
    "alpha dropout": (lambda x: F.alpha_dropout(x, training=False), MAPS, [0, 1, 2, 3]),
    "average": (lambda x: F.avg_pool2d(x, 2), MAPS, [0, 1, None, None]),
    "average of a line": (lambda x: F.avg_pool1d(x, 2), LONG, [0, 1, None]),
    "average of a volume": (lambda x: F.avg_pool3d(x, 2), SOLID, [0, 1, None, None, None]),
    "average with zeros outside": (lambda x: F.avg_pool2d(x, 3, 1, 1), MAPS, NEVER),
    "average of a line with zeros outside": (lambda x: F.avg_pool1d(x, 3, 1, 1), LONG, NEVER[1:]),
    "average with zeros outside on one axis": (lambda x: F.avg_pool2d(x, 3, 1, (0, 1)), MAPS, NEVER),
    "average of what is inside": (
        lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), MAPS, [0, 1, None, None]),
    "average by another number": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), MAPS, NEVER),
    "adaptive average": (lambda x: F.adaptive_avg_pool2d(x, 2), MAPS, [0, 1, None, None]),
    "adaptive average of a line": (lambda x: F.adaptive_avg_pool1d(x, 2), LONG, [0, 1, None]),
    "padding of a volume that repeats": (
        lambda x: F.pad(x, (1, 1, 1, 1, 1, 1), mode="replicate"), SOLID, [0, 1, None, None, None]),
    "maximum": (lambda x: F.max_pool2d(x, 2), MAPS, NEVER),
    "ReLU": (F.relu, MAPS, NEVER),
    "flatten of the last axes": (lambda x: x.flatten(1), MAPS, [0, 1, None, None]),
    "flatten of the first axes": (lambda x: x.flatten(0, 1), MAPS, [0, None, 1, 2]),
    "flatten of the middle": (lambda x: x.flatten(1, 2), MAPS, [0, 1, None, 2]),
    "permute": (lambda x: x.permute(0, 2, 3, 1), MAPS, [0, 3, 1, 2]),
    "mean": (lambda x: x.mean((1, 3)), MAPS, [0, None, 1, None]),
    "mean that keeps its axes": (lambda x: x.mean((1, 3), keepdim=True), MAPS, [0, None, 2, None]),
    "mean of all": (lambda x: x.mean() + x.mean(None, keepdim=True), MAPS, NEVER),
    "sum": (lambda x: x.sum(3), MAPS, NEVER),
    "squeeze": (lambda x: x.squeeze(1), (2, 1, 4, 5), [0, None, 1, 2]),
    "squeeze of two axes": (lambda x: x.squeeze((0, 2)), (1, 3, 1, 5), [None, 0, None, 1]),
    "squeeze of all axes": (lambda x: x.squeeze(), (2, 1, 4, 5), NEVER),
    "unsqueeze at the front": (lambda x: x.unsqueeze(0), MAPS, [1, 2, 3, 4]),
    "unsqueeze in the middle": (lambda x: x.unsqueeze(2), MAPS, [0, 1, 3, 4]),
    "unsqueeze at the end": (lambda x: x.unsqueeze(4), MAPS, [0, 1, 2, 3]),
    "padding that repeats": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), MAPS, [0, 1, None, None]),
    "padding of a line that repeats": (lambda x: F.pad(x, (1, 2), mode="circular"), LONG, [0, 1, None]),
    "padding by a number": (lambda x: F.pad(x, (1, 1), value=0.5), MAPS, NEVER),
    "interpolation": (
        lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), MAPS, [None, 1, None, None]),
    "a sum of two": (lambda x: x + x.flip(1), MAPS, NEVER),
    "a slice": (lambda x: x[:, 1:], MAPS, NEVER),
}  # fmt: skip


def traced(function: Callable[..., Any], *shape: int, **layers: nn.Module) -> Program:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return trace(Net(lambda m, x: function(m, x), **layers).double().eval(), x)


def called(program: Program, name: str) -> fx.Node:
    return next(node for node in program.graph.nodes if name in (node.name, node.target))


@pytest.mark.parametrize("name", CASES)
def test_the_axis_after_an_operation(name: str) -> None:
    function, shape, wanted = CASES[name]
    program = traced(lambda m, x: function(x), *shape)
    (source,) = (node for node in program.graph.nodes if node.op == "placeholder")
    for node in source.users:
        assert [carry(program, node, axis) for axis in range(len(shape))] == wanted


def broadcast(values: Tensor, axis: int, like: Tensor) -> Tensor:
    """A number for each channel, or for each of the values that a flatten makes of it, along an axis."""
    repeated = values.repeat_interleave(like.shape[axis] // len(values))
    return repeated.view([-1 if at == axis else 1 for at in range(like.dim())])


@pytest.mark.parametrize("name", CASES)
def test_a_scale_and_a_shift_are_the_same_before_and_after(name: str) -> None:
    function, shape, wanted = CASES[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    for axis, after in enumerate(wanted):
        if after is None:
            continue
        scale, shift = torch.randn(2, shape[axis], generator=generator, dtype=torch.float64)
        ours = function(x * broadcast(scale, axis, x) + broadcast(shift, axis, x))
        y = function(x)
        theirs = y * broadcast(scale, after, y) + broadcast(shift, after, y)
        assert float((ours - theirs).abs().max()) < 1e-12


def test_channels_are_followed_to_the_first_operation_that_mixes_them() -> None:
    program = traced(
        lambda m, x: m.relu(m.drop(x).permute(0, 2, 3, 1).mean(1)), *MAPS, drop=nn.Dropout(), relu=nn.ReLU()
    )
    nodes = [called(program, name) for name in ("x", "drop", "permute", "mean", "relu")]
    assert follow(program, nodes[0], 1) == Way(tuple(nodes[1:4]), nodes[4], 2)
    assert follow(program, nodes[2], 1) == Way((), nodes[3], 1)


def test_channels_that_are_used_twice_have_no_end() -> None:
    program = traced(lambda m, x: (y := m.drop(x).unsqueeze(1)) + y.relu(), *MAPS, drop=nn.Dropout())
    nodes = [called(program, name) for name in ("x", "drop", "unsqueeze")]
    assert follow(program, nodes[0], 1) == Way(tuple(nodes[1:]), None, 2, "the output of 'unsqueeze' is used 2 times")


def test_a_layer_with_more_than_its_input_carries_nothing() -> None:
    program = traced(lambda m, x: m.drop(x), *MAPS, drop=nn.Dropout())
    node = called(program, "drop")
    assert carry(program, node, 1) == 1
    node.kwargs = {"mode": 1}
    assert carry(program, node, 1) is None
    node.kwargs, node.args = {}, (*node.args, 1)
    assert carry(program, node, 1) is None


def test_an_operation_on_several_values_carries_nothing() -> None:
    program = traced(lambda m, x: x.flip(0).reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3]), *MAPS)
    assert all(carry(program, node, 1) is None for node in program.graph.nodes if node.op == "call_function")
