"""What is planted for a pass: what matters to a site stays, and whatever does not is drawn anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

from explicit_padding import ExplicitPadding
from torch import nn

from fxcompile.program import Program
from fxcompile.rewriting import Site, Skip
from fxcompile.testing.growing import RandomPicker, Recipe, grow
from fxcompile.testing.learning import learn, traced
from fxcompile.testing.loosening import alone, loosened
from fxcompile.testing.network import Network, Step


class Pointwise(ExplicitPadding):
    """Its sites are convolutions of one pixel on maps with two axes."""

    name: ClassVar[str] = "pointwise"

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        for node, conv in program.layers(nn.Conv2d):
            if conv.kernel_size == (1, 1):
                yield Site.of(program, node)


def sites_in(network: Network) -> list[Any]:
    found = traced(network)
    items = Pointwise().sites(found[1]) if found is not None else ()
    return [item.layer for item in items if isinstance(item, Site)]


RECIPES = learn([Pointwise()])
GROWN = [grow(RandomPicker(seed), RECIPES) for seed in range(300)]


def test_sites_are_seen_with_every_setting_that_they_may_have() -> None:
    seen: Counter[str] = Counter()
    for network in GROWN:
        settings: set[str] = set()
        for conv in sites_in(network):
            settings |= {"site", "bias" if conv.bias is not None else "no bias"}
            for name, values in (("stride", conv.stride), ("padding", conv.padding)):
                if max(values) > (name == "stride"):
                    settings.add(f"{name} {'even' if len({*values}) == 1 else 'uneven'}")
            settings |= {"groups"} if conv.groups > 1 else set()
        seen.update(settings)
    assert seen["site"] >= 150
    for setting in ("stride even", "stride uneven", "padding even", "padding uneven", "groups"):
        assert seen[setting] >= 10, (setting, seen)
    assert min(seen["bias"], seen["no bias"]) >= 50


def test_networks_have_the_axes_that_sites_need() -> None:
    assert {recipe.dims for recipe in RECIPES} == {2}
    assert sum(network.steps[0]["dims"] == 2 for network in GROWN) >= 270


CONV = Step(
    "convolution",
    (
        ("spelling", "layer"),
        ("kernel", 1),
        ("kernel elsewhere", None),
        ("stride", 2),
        ("padding", "one"),
        ("bias", True),
    ),
    ((-2, 0),),
)
INPUTS = Step("inputs", (("dims", 2), ("channels", 3), ("size 0", 6), ("size 1", 6)))


def test_a_recipe_keeps_what_matters_and_no_more() -> None:
    free = loosened(
        Recipe((CONV, Step("activation", (("function", "tanh"),), ((0, 0),)))), INPUTS, lambda n: bool(sites_in(n))
    )
    assert free is not None
    assert [dict(step.choices) for step in free.steps] == [{"kernel": 1, "kernel elsewhere": None}, {}]
    assert free.dims == 2


def test_what_does_not_hold_by_itself_is_not_loosened() -> None:
    assert loosened(Recipe((CONV,)), INPUTS, lambda network: False) is None


def test_a_recipe_by_itself_is_its_steps_on_the_inputs() -> None:
    network = alone(Recipe((CONV,)), INPUTS, 0)
    assert [step.kind for step in network.steps] == ["inputs", "convolution", "output"]
    (conv,) = sites_in(network)
    assert (conv.stride[0], conv.padding, conv.bias is not None) == (2, (1, 1), True)
