"""Networks that are drawn to try passes on: valid, varied, described well, and small when they shrink."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, settings
from torch import Tensor, nn

from fxcompile.drawing import draw
from fxcompile.layers import BATCH_NORMS, CONVOLUTIONS
from fxcompile.program import flatten_tensors
from fxcompile.testing import inputs, networks
from fxcompile.testing.features import FEATURES, statistics
from fxcompile.testing.growing import RandomPicker, grow, regrow
from fxcompile.testing.network import FILENAME, IMPORTS, Network
from fxcompile.tracing import trace

DRAWS = draw(networks(), 1000, 0)
GROWN = [grow(RandomPicker(index)) for index in range(150)]
QUICK = settings(
    max_examples=2000, database=None, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)  # fmt: skip


def test_a_thousand_draws_are_different_and_have_every_feature() -> None:
    assert len(DRAWS) == 1000
    missing = [name for name, feature in FEATURES.items() if not any(map(feature, DRAWS))]
    assert missing == []


def test_draws_are_valid_and_follow_their_inputs() -> None:
    found = statistics(DRAWS[:150])
    assert found.valid >= 0.95
    assert found.alive >= 0.9
    assert 4 <= found.steps <= 7
    common = {"convolution": 0.4, "batch norm": 0.2, "several outputs": 0.2, "add of branches": 0.15}
    assert all(found.shares[name] >= share for name, share in common.items())
    assert found.draws == 150
    assert "150 networks: 100.0% valid" in str(found)


def test_predicted_shapes_are_those_of_the_values() -> None:
    """The kit works shapes out by arithmetic of its own; here all values are returned and measured."""
    for network in GROWN:
        _, draft = regrow(network.steps)
        values = {value.name: value for value in draft.values}
        everything = replace(regrow(network.steps)[0], output=f"({', '.join(values)},)")
        if dict(network.steps[-1].choices)["sequential"]:
            continue  # what goes into an nn.Sequential has no name any more
        model, examples = everything.build()
        with torch.no_grad():
            found = dict(zip(values, model(*[x.clone() for x in examples]), strict=True))
        batch = examples[0].shape[0]
        assert {name: tuple(x.shape) for name, x in found.items()} == {
            name: (batch, *value.shape) for name, value in values.items()
        }, network.source


def test_steps_grow_the_same_network_again() -> None:
    assert all(regrow(network.steps)[0] == network for network in (*GROWN, *DRAWS[:300]))


def test_builds_are_the_same_bits_and_leave_the_generators_alone() -> None:
    state = torch.random.get_rng_state()
    for network in GROWN[:30]:
        (first, x), (second, y), (single, z) = network.build(), network.build(), network.build(torch.float32)
        for a, b, c in zip(*(model.state_dict().values() for model in (first, second, single)), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a.float() if a.is_floating_point() else a, c)
        assert all(torch.equal(a, b) and torch.equal(a.float(), c) for a, b, c in zip(x, y, z, strict=True))
        assert {a.dtype for a in x} == {torch.float64}
        assert not first.training
    assert torch.equal(state, torch.random.get_rng_state())


def test_weights_are_not_numbers_of_float32() -> None:
    """A pass that rounds to float32 on its way would go unseen otherwise."""
    rounded = [
        bool((weight.float().double() == weight).all())
        for network in GROWN[:40]
        for weight in network.build()[0].parameters()
        if weight.numel() > 1
    ]
    assert sum(rounded) < 0.05 * len(rounded)


def test_statistics_are_as_odd_as_they_say() -> None:
    limits = {
        "tiny variance": lambda norm: norm.running_var.max() < 1e-8,
        "no variance": lambda norm: norm.running_var.max() == 0,
        "large variance": lambda norm: norm.running_var.min() > 1e5,
        "large mean": lambda norm: norm.running_mean.abs().max() > 1,
        "negative gamma": lambda norm: norm.weight.min() < 0,
        "zero gamma": lambda norm: norm.weight[0] == 0,
        "dead filters": lambda layer: layer.weight[1].abs().max() == 0,
        "dead inputs": lambda layer: layer.weight[:, 1].abs().max() == 0,
        "equal filters": lambda layer: layer.weight.shape[0] > 1 and torch.equal(*layer.weight[:2]),
    }
    seen: set[str] = set()
    for network in DRAWS:
        for name, what in network.odd:
            if what not in seen or what == "negative gamma":
                seen.add(what)
                assert limits[what](network.build()[0].get_submodule(name)), (name, what)
    assert seen == set(limits)


def test_features_are_those_of_the_layers() -> None:
    """Seen in the built module, not in the source."""
    looks = {
        "depthwise": lambda layer: isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels > 1,
        "padding reflect": lambda layer: isinstance(layer, CONVOLUTIONS) and layer.padding_mode == "reflect",
        "output padding": lambda layer: max(getattr(layer, "output_padding", (0,))) > 0 and "Transpose" in str(layer),
        "ceil mode": lambda layer: getattr(layer, "ceil_mode", False),
        "batch norm without affine": lambda layer: (
            isinstance(layer, BATCH_NORMS) and not getattr(layer, "affine", True)
        ),
        "group norm": lambda layer: isinstance(layer, nn.GroupNorm),
        "nested layers": lambda layer: isinstance(layer, nn.Sequential),
    }
    functional_too = {"output padding", "ceil mode", "group norm"}
    for network in DRAWS[:400]:
        leaves = list(network.build()[0].modules())[1:]
        for name, look in looks.items():
            own = [layer for layer in leaves if isinstance(layer, nn.Sequential) == (name == "nested layers")]
            found = any(map(look, own))
            assert FEATURES[name](network) == found or (not found and name in functional_too), (name, str(network))


def test_a_line_knows_its_step() -> None:
    for network in GROWN[:40]:
        lines = (IMPORTS + "\n" + network.source).splitlines()
        for number, line in enumerate(lines, 1):
            step = network.step_of_line(number)
            assert (step is not None) == (line.strip() in [text for _, text in network.lines])
            if step is not None:
                assert (step, line.strip()) in network.lines
        assert compile("\n".join(lines), FILENAME, "exec")


def test_words_of_the_source_are_all_defined() -> None:
    """Every value that forward reads was computed before."""
    for network in GROWN:
        known = {name for name, _ in network.inputs}
        for _, line in network.lines:
            left, _, right = line.partition(" = ")
            read = set(re.findall(r"\by\d+\b", right or left))
            assert read <= known, network.source
            known |= set(re.findall(r"\by\d+\b", left))


# shrinking


def has_layer(network: Network, kind: type[nn.Module]) -> bool:
    return any(isinstance(layer, kind) for layer in network.build()[0].modules())


def test_a_network_shrinks_to_the_layer_that_matters() -> None:
    small = find(networks(), lambda network: has_layer(network, nn.MaxPool2d), settings=QUICK)
    assert len(small.steps) <= 4
    assert small.source.count("self.pool") == 2
    (shape,) = (shape for _, shape in small.inputs)
    assert max(shape) <= 2


def test_the_simplest_network_is_one_pixel_with_nothing_done() -> None:
    small = find(networks(), lambda network: True, settings=QUICK)
    assert small.inputs == (("x", (1, 1, 1, 1)),)
    assert small.lines == ()
    assert small.output == "x"


def test_inputs_shrink_to_one_sample_with_one_number() -> None:
    program = trace(nn.Conv2d(2, 3, 3).eval(), torch.randn(2, 2, 6, 6))
    small: tuple[Tensor, ...] = find(inputs(program), lambda made: bool(made[0].abs().sum() > 0), settings=QUICK)
    assert small[0].shape == (1, 2, 6, 6)
    assert small[0].count_nonzero() == 1
    assert small[0][0, 0, 0, 0] == 1


def test_inputs_take_all_batch_sizes_and_magnitudes() -> None:
    program = trace(nn.Conv2d(2, 3, 3).eval(), torch.randn(2, 2, 6, 6))
    made = [x for (x,) in draw(inputs(program), 100, 0)]
    assert {x.shape[0] for x in made} == {1, 2, 3}
    assert any(x.abs().max() > 300 for x in made)
    assert any(0 < x.abs().max() < 1e-4 for x in made)
    assert any(x.count_nonzero() == 1 for x in made)
    assert any(x.numel() == x.eq(x.flatten()[0]).sum() for x in made)


@pytest.mark.parametrize("index", range(5))
def test_a_network_is_what_its_source_says(index: int) -> None:
    """The code runs by itself, as anyone would paste it."""
    network = GROWN[index]
    namespace: dict[str, object] = {}
    exec(IMPORTS + network.source, namespace)
    model, examples = network.build()
    pasted = namespace["Network"]()  # type: ignore[operator]
    pasted.double().load_state_dict(model.state_dict())
    with torch.no_grad():
        ours = flatten_tensors(model(*[x.clone() for x in examples]))
        theirs = flatten_tensors(pasted.eval()(*[x.clone() for x in examples]))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
