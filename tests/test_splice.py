"""Replacements take a site's place in the graph: wired, named, described and cleaned up, at every call of the site."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import Net, printed
from torch import Tensor, fx, nn

from fxcompile.errors import RewriteError
from fxcompile.program import FEATURE, ORIGIN, Program, dtype_of, output_node, propagate_shapes, shape_of
from fxcompile.regions import region_inputs, run_region, run_replacement
from fxcompile.rewriting import Replacement, Site
from fxcompile.splice import Splicer, finish, fragment_of
from fxcompile.tracing import trace


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 6, 6)), generator=torch.Generator().manual_seed(1))


def program_of(model: nn.Module, *inputs: Tensor) -> Program:
    return trace(model.eval(), inputs or (image(),))


def site_of(program: Program, *names: str) -> Site:
    """A site of the nodes that call these layers, or have these names; first calls."""
    found = [next(node for node in program.graph.nodes if name in (str(node.target), node.name)) for name in names]
    return Site.of(program, *found)


def splice(program: Program, site: Site, replacement: Replacement) -> list[fx.Node]:
    """Replace one site, and finish."""
    made = Splicer(program).replace(site, fragment_of(site, replacement))
    finish(program)
    return made


def assert_same(program: Program, expected: Tensor, *inputs: Tensor) -> None:
    given = program(*inputs)
    assert given.shape == expected.shape
    assert torch.allclose(given, expected, atol=1e-5)
    assert torch.allclose(program.module(*inputs), expected, atol=1e-5)


def simple() -> Net:
    torch.manual_seed(0)
    return Net(
        lambda m, x: m.head(torch.relu(m.conv(x)) + x), conv=nn.Conv2d(4, 4, 3, padding=1), head=nn.Conv2d(4, 2, 1)
    )


# one site, one replacement


def test_one_layer_keeps_the_name_and_replaces_the_weights() -> None:
    model, new = simple(), nn.Conv2d(4, 4, 1)
    program = program_of(model)
    (node,) = splice(program, site_of(program, "conv"), [new])
    assert (node.op, node.target) == ("call_module", "conv")
    assert program.module.conv is new
    assert_same(program, model.head(torch.relu(new(image())) + image()), image())


def test_a_chain_goes_under_the_sites_name() -> None:
    model = simple()
    program = program_of(model)
    chain = [nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    made = splice(program, site_of(program, "conv"), chain)
    assert printed(program).splitlines() == [
        "conv.0 = Conv2d 4->8 3x3(x)",
        "conv.1 = ReLU(conv.0)",
        "conv.2 = Conv2d 8->4 1x1(conv.1)",
        "relu = ReLU(conv.2)",
        "add = add(relu, x)",
        "head = Conv2d 4->2 1x1(add)",
        "return head",
    ]
    assert [shape_of(node) for node in made] == [(2, 8, 6, 6), (2, 8, 6, 6), (2, 4, 6, 6)]
    assert {dtype_of(node) for node in made} == {torch.float32}
    names = ["conv.0.weight", "conv.2.bias", "conv.2.weight", "head.bias", "head.weight"]
    assert sorted(program.module.state_dict()) == names
    assert_same(program, model.head(torch.relu(chain[2](torch.relu(chain[0](image())))) + image()), image())


def test_nothing_leaves_the_sites_input() -> None:
    model = simple()
    program = program_of(model)
    assert splice(program, site_of(program, "conv", "relu"), []) == []
    assert printed(program).splitlines() == ["add = add(x, x)", "head = Conv2d 4->2 1x1(add)", "return head"]
    assert sorted(program.module.state_dict()) == ["head.bias", "head.weight"]
    assert not hasattr(program.module, "conv")
    assert_same(program, model.head(2 * image()), image())


def test_several_nodes_become_one_layer() -> None:
    program = program_of(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    new = nn.Conv2d(4, 6, 3)
    splice(program, site_of(program, "0", "1", "2"), [new])
    assert printed(program) == "0 = Conv2d 4->6 3x3(input)\nreturn 0"
    assert_same(program, new(image()), image())


class Branches(nn.Module):
    """Two branches and a concatenation, with a parameter of its own and a layer in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(4, 2, 1)
        self.right = nn.Sequential(nn.Conv2d(4, 2, 3, padding=1), nn.ReLU())
        self.scale = nn.Parameter(torch.full((4, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1) * self.scale


def test_a_module_with_branches_is_spelt_out() -> None:
    model, new = simple(), Branches()
    program = program_of(model)
    splice(program, site_of(program, "conv"), new)
    assert [line.partition(" = ")[2] for line in printed(program).splitlines()[:6]] == [
        "Conv2d 4->2 1x1(x)",
        "Conv2d 4->2 3x3(x)",
        "ReLU(conv.right.0)",
        "cat([conv.left, conv.right.1], 1)",
        "conv.scale()",
        "mul(cat, scale)",
    ]
    own = {f"conv.{name}" for name in new.state_dict()}
    assert own <= set(program.module.state_dict())
    assert_same(program, model.head(torch.relu(new(image())) + image()), image())


class Joint(nn.Module):
    """Takes two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(8, 4, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.mix(torch.cat([first, second], 1))


def test_a_site_of_several_inputs_takes_a_module_of_as_many() -> None:
    torch.manual_seed(0)
    layers = {name: nn.Conv2d(4, 4, 1) for name in ("a", "b")}
    model = Net(lambda m, x: m.a(x) * 2 + m.b(torch.relu(x)), **layers)
    program, new = program_of(model), Joint()
    site = site_of(program, "a", "mul", "b", "add")
    assert [node.name for node in region_inputs(site.nodes)] == ["x", "relu"]
    splice(program, site, new)
    assert sorted(program.module.state_dict()) == ["a.bias", "a.weight"]
    assert_same(program, new(image(), torch.relu(image())), image())


def test_a_layer_called_several_times_is_replaced_at_every_call_by_shared_weights() -> None:
    torch.manual_seed(0)
    model = Net(lambda m, x: m.conv(torch.relu(m.conv(m.conv(x) + 1))), conv=nn.Conv2d(4, 4, 3, padding=1))
    program = program_of(model)
    first, second = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 3, padding=1)
    made = splice(program, site_of(program, "conv"), [first, second])
    assert [str(node.target) for node in made] == ["conv.0", "conv.1"] * 3
    assert sum(parameter.numel() for parameter in program.module.parameters()) == sum(
        parameter.numel() for layer in (first, second) for parameter in layer.parameters()
    )
    new = nn.Sequential(first, second)
    assert_same(program, new(torch.relu(new(new(image()) + 1))), image())


def test_a_layer_without_weights_is_replaced_at_the_one_call() -> None:
    model = Net(lambda m, x: m.relu(m.conv(m.relu(x))), relu=nn.ReLU(), conv=nn.Conv2d(4, 4, 1))
    program = program_of(model)
    splice(program, site_of(program, "relu"), [nn.Sigmoid()])
    lines = printed(program).splitlines()
    assert [line.partition(" = ")[2] for line in lines[:3]] == [
        "Sigmoid(x)", f"Conv2d 4->4 1x1({lines[0].partition(' ')[0]})", "ReLU(conv)"]  # fmt: skip
    assert_same(program, torch.relu(model.conv(torch.sigmoid(image()))), image())


def test_sites_can_be_replaced_one_after_the_other_with_one_splicer() -> None:
    torch.manual_seed(0)
    program = program_of(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()))
    splicer = Splicer(program)
    new = []
    for name in ("0", "2"):
        new.append([nn.Conv2d(4, 3, 1), nn.Conv2d(3, 4, 1)])
        site = site_of(program, name)
        assert splicer.obstacle(site) is None
        splicer.replace(site, fragment_of(site, new[-1]))
    finish(program)
    expected = torch.relu(nn.Sequential(*new[1])(torch.relu(nn.Sequential(*new[0])(image()))))
    assert_same(program, expected, image())


# names


def test_names_stay_unique_when_a_replacement_is_replaced() -> None:
    program = program_of(simple())
    splice(program, site_of(program, "conv"), [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
    splice(program, site_of(program, "conv.0"), [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_module"]
    assert called == ["conv.0.0", "conv.0.1", "conv.1", "relu", "head"]


def test_a_name_that_is_taken_gets_a_number() -> None:
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.conv(self.relu(x)))

    program = program_of(Taken())
    splice(program, site_of(program, "relu"), [nn.Conv2d(4, 4, 1)])
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_module"]
    assert len(set(called)) == 3
    assert {"conv", "relu"} <= set(called)
    assert len({id(program.module.get_submodule(name)) for name in called}) == 3


def test_the_weights_of_a_folded_layer_keep_their_names() -> None:
    program = program_of(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()))
    splice(program, site_of(program, "0", "1"), [nn.Conv2d(4, 6, 3)])
    assert sorted(program.module.state_dict()) == ["0.bias", "0.weight"]


def test_the_only_layer_with_weights_takes_the_sites_name_and_kept_layers_their_own() -> None:
    program = program_of(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Dropout(), nn.BatchNorm2d(6), nn.ReLU()))
    site = site_of(program, "0", "1", "2")
    splice(program, site, [nn.Conv2d(4, 6, 3), site.layers[1], nn.ReLU()])
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_module"]
    assert called[:2] == ["0", "1"]
    assert sorted(program.module.state_dict()) == ["0.bias", "0.weight"]


# what is carried over, what goes


def test_origins_are_united_and_the_last_node_computes_the_sites_feature() -> None:
    program = program_of(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    feature = next(node for node in program.graph.nodes if node.target == "1").meta[FEATURE]
    made = splice(program, site_of(program, "0", "1"), [nn.Conv2d(4, 5, 3), nn.Conv2d(5, 6, 1)])
    assert [node.meta[ORIGIN] for node in made] == [("0", "1")] * 2
    assert FEATURE not in made[0].meta
    assert made[1].meta[FEATURE] == feature
    again = splice(program, site_of(program, str(made[0].target)), [nn.Conv2d(4, 5, 3)])
    assert again[0].meta[ORIGIN] == ("0", "1")


def test_layers_buffers_and_containers_that_nothing_uses_go() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 1), "bn": nn.BatchNorm2d(4)})
            self.register_buffer("offset", torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.block["bn"](self.block["conv"](x)) + self.offset)

    program = program_of(Nested())
    names = [node.name for node in program.graph.nodes if node.op in ("call_module", "call_function")][:3]
    splice(program, site_of(program, *names[:2]), [])
    assert sorted(program.module.state_dict()) == ["offset"]
    assert [name for name, _ in program.module.named_modules()] == ["", "relu"]


def test_the_graph_is_linted_and_compiled() -> None:
    program = program_of(simple())
    before = program.module.code
    splice(program, site_of(program, "conv"), [nn.Conv2d(4, 4, 1), nn.ReLU()])
    program.graph.lint()
    assert program.module.code != before
    assert output_node(program.graph).args[0].meta["tensor_meta"].shape == (2, 2, 6, 6)  # type: ignore[union-attr]


def test_a_snapshot_taken_before_is_untouched() -> None:
    model = simple()
    program = program_of(model)
    snapshot = program.snapshot()
    splice(program, site_of(program, "conv"), [])
    assert_same(snapshot, model(image()), image())


# what does not fit


class Returns(nn.Module):
    """Returns two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


WRONG: dict[str, tuple[Sequence[str], Replacement, str]] = {
    "other channels": (["conv"], [nn.Conv2d(4, 5, 3, padding=1)], "gives (2, 5, 6, 6) torch.float32, and the"),
    "another map": (["conv"], [nn.Conv2d(4, 4, 3)], "gives (2, 4, 4, 4)"),
    "another rank": (["conv"], [nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1)], "gives (2, 4, 1, 1)"),
    "nothing, where the shape changes": (["head"], [], "gives (2, 4, 6, 6)"),
    "another dtype": (["conv"], Net(lambda m, x: x.double()), "torch.float64, and the site (2, 4, 6, 6) torch.float32"),
    "several outputs": (["conv"], Returns(), "its replacement does not return one tensor"),
    "too few input channels": (["conv"], [nn.Conv2d(3, 4, 3, padding=1)], "does not take what the site takes"),
    "too few inputs": (["conv", "relu", "add"], Net(lambda m, x: x), "gives"),
    "two inputs for one": (["conv"], Joint(), "does not take what the site takes"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_by_the_sites_name(name: str) -> None:
    names, replacement, message = WRONG[name]
    if name == "too few inputs":
        names, replacement, message = (
            ["relu", "add"],
            [nn.ReLU()],
            "the site has 2 inputs and its replacement takes one",
        )
    program = program_of(simple())
    before = printed(program)
    with pytest.raises(RewriteError) as caught:
        splice(program, site_of(program, *names), replacement)
    assert str(caught.value).startswith(f"layer '{names[0]}': ")
    assert message in str(caught.value)
    assert caught.value.mend
    assert printed(program) == before


def test_obstacles_are_found_before_anything_is_touched() -> None:
    layers = {"conv": nn.Conv2d(4, 4, 1), "bn": nn.BatchNorm2d(4), "relu": nn.ReLU()}
    model = Net(lambda m, x: m.bn(y := m.conv(x)) + y + m.conv(m.relu(x)), **layers)
    program = program_of(model)
    splicer = Splicer(program)
    assert splicer.obstacle(site_of(program, "conv")) is None
    assert splicer.obstacle(site_of(program, "conv", "bn")) == "layer 'conv' is called 2 times"
    shared = program_of(Net(lambda m, x: m.b(y := m.a(x)) + y, a=nn.Conv2d(4, 4, 1), b=nn.ReLU()))
    splicer = Splicer(shared)
    assert splicer.obstacle(site_of(shared, "a", "b")) == "the value of 'a' is used elsewhere too"
    site = site_of(shared, "a")
    both = Site.of(shared, *site.nodes, site_of(shared, "b").node)
    splicer.replace(site, fragment_of(site, [nn.Conv2d(4, 4, 1)]))
    assert splicer.obstacle(both) == "an earlier site took part of it"


# running a site and its replacement


def test_a_region_runs_as_in_the_program() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda m, x: torch.tanh(m.b(torch.relu(m.a(x)).flatten(2)) + 1), a=nn.Conv2d(4, 3, 1), b=nn.Linear(36, 5)
    )
    program = program_of(model)
    site = site_of(program, "a", "relu", "flatten", "b")
    x = image()
    assert torch.equal(run_region(site, (x,)), model.b(torch.relu(model.a(x)).flatten(2)))
    assert torch.equal(run_replacement([], (x,)), x)
    assert torch.equal(run_replacement(model, (x,)), model(x))
    with pytest.raises(ValueError, match="argument 2 is longer"):
        run_region(site, (x, x))


# time


def chain_of(count: int) -> Program:
    """So many convolutions one after the other, made without tracing a model."""
    root = nn.Module()
    graph = fx.Graph()
    node = graph.placeholder("x")
    for index in range(count):
        root.add_module(f"conv{index}", nn.Conv2d(1, 1, 1))
        node = graph.call_module(f"conv{index}", (node,))
    graph.output(node)
    base: Any = trace(nn.Conv2d(1, 1, 1).eval(), image(1, 1, 2, 2))
    meta = next(item for item in base.graph.nodes if item.op == "call_module").meta["tensor_meta"]
    for item in graph.nodes:
        item.meta["tensor_meta"] = meta
    return Program(fx.GraphModule(root, graph), base.examples, base.inputs, base.output_names)


def steps(count: int) -> int:
    """How many Python functions are called while each of so many layers is replaced by two."""
    program = chain_of(count)
    called = 0

    def notice(frame: object, event: str, argument: object) -> None:
        nonlocal called
        called += event in ("call", "c_call")

    splicer = Splicer(program)
    sys.setprofile(notice)
    try:
        for node in [node for node in program.graph.nodes if node.op == "call_module"]:
            site = Site.of(program, node)
            assert splicer.obstacle(site) is None
            splicer.replace(site, fragment_of(site, [nn.Conv2d(1, 1, 1, device="meta") for _ in range(2)]))
        finish(program)
    finally:
        sys.setprofile(None)
    assert len(program.graph.nodes) == 2 * count + 2
    return called


def test_the_work_grows_with_the_number_of_sites_and_no_faster() -> None:
    assert steps(400) < 4.5 * steps(100)


def test_several_layers_in_place_of_one_call_of_a_shared_layer_lie_beside_it() -> None:
    act = nn.ReLU()
    program = program_of(Net(lambda m, x: m.act(m.act(x) - 0.5), act=act))
    expected = torch.relu(torch.relu(image() * 1) - 0.5)
    made = splice(program, site_of(program, "act"), [nn.ReLU(), nn.ReLU()])
    assert [str(node.target) for node in made] == ["act_1", "act_2"]
    assert_same(program, expected, image())


# a layer that is called on maps of several sizes


class Pyramid(nn.Module):
    """A head that several levels share, as in RetinaNet."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.head(x), self.head(torch.nn.functional.max_pool2d(x, 2))]


def test_each_caller_of_a_shared_layer_gets_the_shapes_of_its_own_map() -> None:
    program = program_of(Pyramid())
    splice(program, site_of(program, "head"), [nn.Conv2d(4, 5, 1), nn.Conv2d(5, 6, 3, padding=1)])
    recorded = {node: shape_of(node) for node in program.graph.nodes if node.op == "call_module"}
    assert len(set(recorded.values())) == 5
    propagate_shapes(program.module, program.examples)
    assert recorded == {node: shape_of(node) for node in recorded}


def test_a_replacement_that_fits_one_caller_only_is_refused_before_anything_changes() -> None:
    program = program_of(Pyramid())
    before = printed(program)
    resized = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Upsample((6, 6)))
    with pytest.raises(RewriteError, match=r"layer 'head': its replacement gives \(2, 6, 6, 6\).*\(2, 6, 3, 3\).* at"):
        splice(program, site_of(program, "head"), resized)
    assert printed(program) == before
