"""A program lists its layers, their calls and what they share; a snapshot has its own graph over the same tensors."""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from forms import assert_canonical, form
from torch import Tensor, fx, nn

from fxcompile.program import (
    FEATURE,
    ORIGIN,
    Program,
    dtype_of,
    fetch,
    flatten_tensors,
    output_node,
    propagate_shapes,
    shape_of,
)
from fxcompile.rewriting import Site
from fxcompile.splice import Splicer, finish, fragment_of
from fxcompile.tracing import trace


class Model(nn.Module):
    """`again` is called twice, `first` and `tied` share a weight, `late` is declared first and `scale` is no layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.late = nn.Linear(4, 2)
        self.first, self.tied = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.tied.weight = self.first.weight
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.again = nn.Conv2d(4, 4, 1)
        self.scale = self.again.bias
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.inner(self.tied(self.first(x)))
        y = self.again(self.again(y).relu()) * self.scale.view(4, 1, 1)
        return {"logits": self.late(y.mean((2, 3))), "maps": [y, (x, {"more": y + 1})], "none": None}


def image(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def program() -> Program:
    return trace(Model(), image())


def test_layers_come_once_each_in_the_order_of_the_data(program: Program) -> None:
    assert [node.target for node, _ in program.layers(nn.Conv2d)] == ["first", "tied", "inner.0", "again"]
    assert [node.target for node, _ in program.layers(nn.Linear, nn.BatchNorm2d)] == ["inner.1", "late"]
    assert [type(layer) for _, layer in program.layers(nn.Conv1d)] == []
    nodes = list(program.graph.nodes)
    for node, layer in program.layers(nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU):
        assert program.layer(node) is layer
        assert node is next(item for item in nodes if item.target == node.target)


def test_what_calls_no_layer_has_none(program: Program) -> None:
    for node in program.graph.nodes:
        assert (program.layer(node) is None) == (node.op != "call_module")
    assert program.layer(None) is None
    assert program.layer(3) is None


def test_calls_are_all_the_nodes_of_a_layer(program: Program) -> None:
    calls = program.calls()
    again = program.module.get_submodule("again")
    assert [node.target for node in calls[id(again)]] == ["again", "again"]
    assert sorted(len(nodes) for nodes in calls.values()) == [1] * (len(calls) - 1) + [2]
    assert sum(len(nodes) for nodes in calls.values()) == sum(node.op == "call_module" for node in program.graph.nodes)
    assert all(
        program.layer(node) is not None and id(program.layer(node)) == key for key in calls for node in calls[key]
    )


def test_tied_tells_who_shares_a_tensor(program: Program) -> None:
    names = program.tied()
    first, again = program.module.get_submodule("first"), program.module.get_submodule("again")
    assert names[id(first.weight)] == {"first", "tied"}
    assert names[id(fetch(program.module, "first.bias"))] == {"first"}
    assert len(names[id(again.bias)]) == 2, "a layer and what is read as it is"
    assert "again" in names[id(again.bias)]
    assert all(len(held) == 1 for key, held in names.items() if key not in (id(first.weight), id(again.bias)))
    running = program.module.get_submodule("inner.1").running_mean
    assert names[id(running)] == {"inner.1"}


def test_layers_that_nothing_calls_are_not_there(program: Program) -> None:
    layers = ("first", "tied", "inner.0", "inner.1", "again", "late")
    expected = {f"{layer}.{name}" for layer in layers for name in ("weight", "bias")} | {"scale"}
    assert {name for name, _ in program.module.named_parameters(remove_duplicate=False)} == expected
    assert "unused" not in dict(program.module.named_modules())


def test_a_snapshot_shares_tensors_and_no_graph(program: Program) -> None:
    taken = program.snapshot()
    assert_canonical(taken)
    assert form(taken) == form(program)
    assert not set(taken.graph.nodes) & set(program.graph.nodes)
    for tensors in ("named_parameters", "named_buffers"):
        own, held = dict(getattr(program.module, tensors)()), dict(getattr(taken.module, tensors)())
        assert own.keys() == held.keys()
        assert all(held[name] is tensor for name, tensor in own.items())
    for ours, theirs in zip(taken.graph.nodes, program.graph.nodes, strict=True):
        assert (ours.name, ours.meta) == (theirs.name, theirs.meta)
        assert ours.meta is not theirs.meta
    assert taken.inputs == program.inputs
    assert taken.output_names == program.output_names
    x = image(seed=1)
    assert str(taken.module.code) == str(program.module.code)
    assert torch.equal(taken.module(x)["logits"], program.module(x)["logits"])


def test_a_rewrite_after_a_snapshot_leaves_the_snapshot_alone(program: Program) -> None:
    before, x = form(program), image(seed=1)
    expected = [tensor.clone() for tensor in program.outputs(x)]
    taken = program.snapshot()
    site = Site.of(program, next(node for node, _ in program.layers(nn.BatchNorm2d)))
    Splicer(program).replace(site, fragment_of(site, [nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)]))
    finish(program)
    assert form(taken) == before != form(program)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(taken.outputs(x), expected, strict=True))
    assert not torch.allclose(program.outputs(x)[0], expected[0], atol=1e-3)
    again = taken.snapshot()
    taken.module.delete_submodule("inner.0")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again.outputs(x), expected, strict=True))


def test_a_snapshot_keeps_the_mode(program: Program) -> None:
    assert not program.snapshot().module.training
    program.module.train()
    assert program.snapshot().module.training


def test_outputs_are_flat_and_named_in_order(program: Program) -> None:
    x = image(3, seed=1)
    nested = program(x)
    assert list(nested) == ["logits", "maps", "none"]
    flat = program.outputs(x)
    assert program.output_names == ("logits", "maps_0", "maps_1_0", "maps_1_1_more")
    expected = [nested["logits"], nested["maps"][0], x, nested["maps"][0] + 1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(flat, expected, strict=True))
    assert not any(tensor.requires_grad for tensor in flat)


def test_flattening_goes_through_every_kind_of_container() -> None:
    a, b, c, d = (torch.full((1,), float(value)) for value in range(4))
    nested = OrderedDict(
        z=[a, None, (b, "text", 3)], a={"deep": {"er": (c,)}}, more=fx.immutable_collections.immutable_list([d])
    )
    assert [float(tensor) for tensor in flatten_tensors(nested)] == [0, 1, 2, 3]
    assert flatten_tensors(a) == (a,)
    assert flatten_tensors(None) == flatten_tensors("abc") == flatten_tensors({}) == ()


def test_dtype_is_that_of_the_weights_or_else_of_the_inputs(program: Program) -> None:
    assert program.dtype == torch.float32
    assert trace(Model().double(), image().double()).dtype == torch.float64
    assert trace(nn.ReLU(), image().half()).dtype == torch.float16
    assert trace(nn.Embedding(9, 3).bfloat16(), torch.zeros(2, 4, dtype=torch.long)).dtype == torch.bfloat16
    assert trace(nn.Flatten(), torch.zeros(2, 2, 2, dtype=torch.long)).dtype == torch.float32


def test_shapes_are_those_of_the_examples_and_follow_a_new_run(program: Program) -> None:
    node = next(node for node, _ in program.layers(nn.BatchNorm2d))
    assert (shape_of(node), dtype_of(node)) == ((2, 4, 5, 5), torch.float32)
    assert shape_of(output_node(program.graph)) is None, "it is no single tensor"
    taken = program.snapshot()
    propagate_shapes(taken.module, [image(7)])
    (other,) = [item for item in taken.graph.nodes if item.name == node.name]
    assert shape_of(other) == (7, 4, 5, 5)
    assert shape_of(node) == (2, 4, 5, 5)
    program.module.double()
    propagate_shapes(program.module, [image().double()])
    assert dtype_of(node) == torch.float64


def test_nodes_keep_what_is_known_of_them_through_copies(program: Program) -> None:
    for node in copy.deepcopy(program.module).graph.nodes:
        assert node.meta[FEATURE] == node.name
        assert len(node.meta[ORIGIN]) == 1


def test_it_prints_on_one_line_without_its_tensors() -> None:
    shown = repr(trace(nn.Conv2d(3, 4, 3), image()))
    assert "\n" not in shown
    assert "name='input', shape=(2, 3, 5, 5)" in shown
    assert "tensor(" not in shown
