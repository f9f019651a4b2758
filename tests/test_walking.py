"""A walk computes each value once, in order, and holds no value that nothing needs any more."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from helpers import Net
from torch import Tensor, fx, nn
from zoo import ARCHITECTURES, example_inputs

from fxcompile.program import Program
from fxcompile.rewriting import Site
from fxcompile.splice import Splicer, fragment_of
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


def joined(net: Net, x: Tensor, y: Tensor) -> list[Tensor]:
    """Two inputs, a residual, a concatenation, an input that is needed late, and a value that nothing needs."""
    a = net.a(x)
    b = net.b(a.relu()) + a
    halves = torch.cat([b, a.sigmoid()], 1).chunk(2, 1)
    return [net.b(halves[0]) * net.scale, y + x.mean()]


class Joined(Net):
    def __init__(self) -> None:
        super().__init__(joined, a=nn.Conv2d(2, 3, 3, padding=1), b=nn.Conv2d(3, 3, 3, padding=1))
        self.scale = nn.Parameter(torch.full((3, 1, 1), 0.5))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return joined(self, x, y)


@pytest.fixture
def branching() -> tuple[Program, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(n, 2, 4, 4, generator=draw), torch.randn(n, 5, generator=draw)) for n in (2, 1, 3)]
    return trace(Joined().eval(), pairs[0]), pairs


def test_the_outputs_of_a_branching_program_are_its_own_batch_by_batch(
    branching: tuple[Program, list[tuple[Tensor, ...]]],
) -> None:
    program, pairs = branching
    for given, inputs in zip(Walk(program, pairs).outputs(), pairs, strict=True):
        for ours, theirs in zip(given, program.outputs(*inputs), strict=True):
            assert torch.equal(ours, theirs)


def test_it_goes_on_through_what_was_spliced_in(branching: tuple[Program, list[tuple[Tensor, ...]]]) -> None:
    """Each call of a layer is replaced when the walk stands before the first: both then give what the new layers do."""
    program, pairs = branching
    old = program.snapshot()
    walk, node = Walk(program, pairs), named(program, "b")
    before = walk.values_of(node.all_input_nodes[0])
    site = Site.of(program, node)
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)]
    made = Splicer(program).replace(site, fragment_of(site, layers))
    walk.resume_at(made[0])
    assert walk.values_of(made[0])[0].shape == (2, 4, 4, 4)
    assert torch.equal(walk.values_of(made[0])[2], layers[0](before[2]))
    for given, inputs in zip(walk.outputs(), pairs, strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(given, program.outputs(*inputs), strict=True))
        assert not torch.allclose(given[0], old.outputs(*inputs)[0], atol=1e-3)


def test_a_fork_goes_on_by_itself(branching: tuple[Program, list[tuple[Tensor, ...]]]) -> None:
    program, pairs = branching
    walk, node = Walk(program, pairs), named(program, "a")
    values = walk.values_of(node)
    fork = walk.fork(node, [torch.zeros_like(value) for value in values])
    relu = next(iter(node.users))
    assert fork.values_of(relu)[1].abs().max() == 0
    assert torch.equal(walk.values_of(relu)[1], values[1].relu())
    bias = program.module.b(torch.zeros(2, 3, 4, 4))
    assert torch.equal(fork.values_of(named(program, "b"))[0], bias)


class Counted(Walk):
    """Notes the most bytes of tensors computed by the walk that were alive at once."""

    most = 0

    def _compute(self, node: fx.Node, index: int) -> Any:
        value = super()._compute(node, index)
        if node.op not in ("placeholder", "get_attr") and isinstance(value, Tensor):
            self.alive = [*getattr(self, "alive", []), weakref.ref(value)]
        held = [tensor for tensor in (ref() for ref in getattr(self, "alive", [])) if tensor is not None]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
        self.most = max(self.most, sum(storages.values()))
        return value


@pytest.mark.parametrize("name", ["resnet", "densenet", "inception_v3", "unet"])
def test_no_tensor_outlives_its_last_use(name: str) -> None:
    """Counted from outside: what the walk computed and anything still refers to is within what `live_bytes` says."""
    args, kwargs = example_inputs(name)
    program = trace(ARCHITECTURES[name]().eval(), args, kwargs)
    inputs = program.examples
    walk = Counted(program, [inputs])
    outputs = walk.outputs()[0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, program.outputs(*inputs), strict=True))
    total = sum(node_bytes(node) for node in program.graph.nodes)
    assert walk.most <= live_bytes(program) < total / 2
    assert set(walk.values) == set(program.graph.output_node().all_input_nodes)
