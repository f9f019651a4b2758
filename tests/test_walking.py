"""A walk computes each value once, in order, and holds no value that nothing needs any more."""

from __future__ import annotations

import pytest
import torch
from helpers import Net
from torch import Tensor, fx, nn

from fxcompile.program import Program
from fxcompile.tracing import trace
from fxcompile.walking import Walk, live_bytes, node_bytes


def branch(net: Net, x: Tensor) -> Tensor:
    y = net.a(x).relu()
    return net.b(y) + y


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(2, 3, 3, padding=1), "b": nn.Conv2d(3, 3, 3, padding=1)}
    return trace(Net(branch, **layers).eval(), torch.randn(2, 2, 4, 4))


@pytest.fixture
def batches() -> list[tuple[Tensor, ...]]:
    return [(torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(n)),) for n in (1, 3)]


def named(program: Program, name: str) -> fx.Node:
    return next(node for node in program.graph.nodes if str(node.target) == name or node.name == name)


def test_values_are_those_of_the_program(program: Program, batches: list[tuple[Tensor, ...]]) -> None:
    walk = Walk(program, batches)
    output = next(iter(program.graph.output_node().all_input_nodes))
    for value, (x,) in zip(walk.values_of(output), batches, strict=True):
        assert torch.equal(value, program(x))


def test_it_goes_no_further_than_asked_and_forgets_what_is_used_up(
    program: Program, batches: list[tuple[Tensor, ...]]
) -> None:
    walk = Walk(program, batches)
    relu = next(iter(named(program, "a").users))
    walk.values_of(relu)
    assert walk.next is named(program, "b")
    assert set(walk.values) == {relu}
    walk.values_of(named(program, "b"))
    assert set(walk.values) == {relu, named(program, "b")}  # the sum still needs it


def test_a_wanted_value_stays_until_it_was_taken_as_often_as_it_is_wanted(
    program: Program, batches: list[tuple[Tensor, ...]]
) -> None:
    first, last = named(program, "a"), next(iter(program.graph.output_node().all_input_nodes))
    walk = Walk(program, batches, [first, first])
    walk.values_of(last)
    once = walk.take(first)
    assert first in walk.values
    assert all(torch.equal(a, b) for a, b in zip(once, walk.take(first), strict=True))
    assert first not in walk.values
    with pytest.raises(KeyError):
        walk.values_of(first)


def test_what_is_rewritten_ahead_of_it_counts(program: Program, batches: list[tuple[Tensor, ...]]) -> None:
    walk = Walk(program, batches)
    walk.values_of(next(iter(named(program, "a").users)))
    program.module.b = nn.Conv2d(3, 3, 3, padding=1)
    assert torch.equal(walk.values_of(named(program, "b"))[0], program.module.b(program.module.a(batches[0][0]).relu()))


def test_a_node_that_is_not_ahead_is_an_error(program: Program, batches: list[tuple[Tensor, ...]]) -> None:
    walk = Walk(program, batches)
    with pytest.raises(LookupError, match="not ahead"):
        walk.values_of(program.graph.output_node())


def test_live_bytes_are_the_most_that_are_needed_at_once(program: Program) -> None:
    """x 2 channels, then conv, relu, second conv and their sum 3 channels each, of 2 samples of 4 x 4 in float32."""
    channel = 2 * 16 * 4
    assert node_bytes(named(program, "a")) == 3 * channel
    assert live_bytes(program) == 9 * channel  # the ReLU's output, the second convolution's, and their sum
