"""group-shuffle(style=permuted): which channels stand together, what is solved for within the groups, what is left."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from fxcompile.passes import GroupShuffle
from fxcompile.passes import _permuting as permuting
from helpers import KINDS, MODES, Net, conv, geometry, images, only_site, outputs, planted, printed, randn, relative
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompile.errors import PipelineError
from fxcompile.manager import PassManager, Result
from fxcompile.patches import patches
from fxcompile.pipeline import parse_pipeline
from fxcompile.rewriting import Site, Skip
from fxcompile.tracing import trace


def permuted(model: nn.Module, x: Tensor, calibration: Tensor | None = None, **options: Any) -> Result:
    passes = [GroupShuffle(style="permuted", **options)]
    return PassManager(passes, calibration=calibration, verify_examples=2).run(trace(model.eval(), x[:2]))


# ---- exactness -------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, int, Tensor]:
    """A layer of any geometry with planted groups, and inputs."""
    own, groups = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([2, 3, 4]))
    kernel = draw(st.sampled_from([(3, 3), (1, 1), (5, 2), (3,), (1, 3, 2)]))
    options = geometry(draw, kernel, own, MODES)
    ins, outs = (own * groups * draw(st.integers(2, 4)) for _ in range(2))
    layer = conv(ins, outs, *kernel, seed=draw(st.integers(0, 99)), **options)
    planted(layer, groups, draw(st.integers(0, 99)))
    size = [max(3, (k - 1) * d + 1) + draw(st.integers(0, 2)) for k, d in zip(kernel, options["dilation"], strict=True)]
    return layer, groups, randn(8, ins, *size, seed=1)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.booleans())
def test_blocks_in_disorder_come_out_exactly(case: tuple[Any, int, Tensor], calibrated: bool) -> None:
    layer, groups, x = case
    result = permuted(layer, x, x if calibrated else None, groups=groups)
    report = only_site(result)
    assert (report.outcome, report.after.macs * groups) == ("kept", report.before.macs)
    (made,) = (item for item in result.module.modules() if type(item) in KINDS.values())
    assert made.groups == layer.groups * groups
    wanted = outputs(layer, x)
    assert float((outputs(result.module, x) - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


def test_one_image_without_a_batch_works() -> None:
    layer, x = conv(8, 12, 3, 3, padding=1), randn(8, 8, 8)
    planted(layer, 4, 1)
    result = PassManager([GroupShuffle(style="permuted", groups=4)]).run(trace(layer, x))
    assert only_site(result).outcome == "kept"
    assert relative(outputs(result.module, x), outputs(layer, x)) < 1e-12


def test_groups_that_stand_in_order_need_no_other() -> None:
    net, x = Net(lambda m, x: m.conv(x), conv=conv(8, 12, 3, 3)), randn(4, 8, 8, 8)
    with torch.no_grad():
        net.conv.weight.mul_(torch.block_diag(*[torch.ones(6, 4)] * 2)[:, :, None, None])
    assert printed(permuted(net, x).program) == "conv = Conv2d 8->12 3x3 groups=2(x)\nreturn conv"


# ---- the search ------------------------------------------------------------------------------------------------------


def kept(energy: Tensor, inputs: Tensor, outputs_: Tensor, groups: int) -> float:
    parts = zip(outputs_.chunk(groups), inputs.chunk(groups), strict=True)
    return sum(float(energy[rows][:, columns].sum()) for rows, columns in parts)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_two_groups_keep_more(seed: int) -> None:
    energy = randn(6, 8, seed=seed).square()
    inputs, outs = permuting.arranged(energy, 2, torch.Generator().manual_seed(0))
    assert sorted(inputs.tolist()) == list(range(8))
    assert sorted(outs.tolist()) == list(range(6))
    everything = [
        float(energy[list(rows)][:, list(columns)].sum())
        + float(energy[[o for o in range(6) if o not in rows]][:, [c for c in range(8) if c not in columns]].sum())
        for rows in combinations(range(6), 3)
        for columns in combinations(range(8), 4)
    ]
    assert kept(energy, inputs, outs, 2) == pytest.approx(max(everything), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 4))
def test_no_exchange_of_two_channels_is_left_that_gains(seed: int, groups: int, each: int) -> None:
    gain, owners = randn(groups * each, groups, seed=seed), torch.arange(groups).repeat(each)
    found = permuting.assigned(gain, owners, 0.0)
    assert found.bincount(minlength=groups).tolist() == [each] * groups
    value = float(gain.gather(1, found[:, None]).sum())
    for first, second in combinations(range(len(found)), 2):
        other = found.clone()
        other[first], other[second] = found[second], found[first]
        assert float(gain.gather(1, other[:, None]).sum()) <= value + 1e-12


def test_with_data_what_the_inputs_bring_decides() -> None:
    """The largest weights are on inputs that are hardly there."""
    energy = torch.tensor([[1.0, 9, 0, 0], [9, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).double()
    weight = energy.sqrt()[None]
    gram = torch.diag(torch.tensor([1.0, 1e-4, 1e-4, 1])).double()[None]
    by_weight = permuting.searched(weight, 1, 2)
    assert sorted(map(sorted, by_weight.inputs[0].chunk(2))) == [[0, 1], [2, 3]]
    layered = permuting.searched(weight, 1, 4, gram)
    assert layered.outputs[0].tolist()[layered.inputs[0].tolist().index(0)] == 1


# ---- within the groups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [1, 2])
def test_the_weights_within_the_groups_are_the_best_there_are(own: int) -> None:
    weight, rows = randn(own, 6, 4 * 9, seed=2), randn(own, 36, 200, seed=3)
    gram = rows @ rows.mT / 200
    arrangement = permuting.searched(weight, 9, 2, gram)
    made, dense = permuting.within(weight, arrangement, 9, 2, gram)
    assert made.shape == (own, 2, 3, 18)
    free = torch.zeros_like(weight)
    for group in range(own):
        for outs, ins in zip(arrangement.outputs[group].chunk(2), arrangement.inputs[group].chunk(2), strict=True):
            for out in outs:
                for item in ins:
                    free[group, out, item * 9 : item * 9 + 9] = 1
    assert torch.equal((dense != 0).double(), free)
    left = dense.clone().requires_grad_()
    error = ((weight - left) @ gram * (weight - left)).sum()
    error.backward()
    assert left.grad is not None
    assert float((left.grad * free).abs().max()) < 1e-8 * float(left.grad.abs().max())


@pytest.mark.parametrize("seed", range(3))
def test_data_never_lose_to_the_weights_and_bring_more_than_the_order(seed: int) -> None:
    layer = conv(16, 24, 3, 3, padding=1, seed=seed)
    x, unseen = images(60, 16, 8, 8, seed=seed), images(40, 16, 8, 8, seed=50)
    wanted = outputs(layer, unseen)
    errors = [relative(outputs(permuted(layer, x, data, groups=2).module, unseen), wanted) for data in (None, x)]
    assert errors[1] < 0.6 * errors[0]


def test_what_is_fitted_to_data_keeps_the_mean_of_each_output() -> None:
    layer, x = conv(12, 12, 3, 3, padding=1), images(60, 12, 9, 9)
    wanted = outputs(layer, x)
    pass_ = GroupShuffle(style="permuted", groups=2)
    site = next(item for item in pass_.sites(trace(layer, x[:2])) if isinstance(item, Site))
    *_, fitted = pass_.candidates(site.with_pairs(((x, wanted),)))
    assert isinstance(fitted, list)
    assert relative(outputs(nn.Sequential(*fitted), x).mean((0, 2, 3)), wanted.mean((0, 2, 3))) < 1e-10


def test_what_stands_there_is_the_dense_weight_that_it_was_fitted_as() -> None:
    """Which gives the same on any inputs: rows, columns and orders belong together."""
    layer, x = conv(16, 24, 3, 3, groups=2, seed=5), images(40, 16, 8, 8)
    site = next(item for item in GroupShuffle(style="permuted").sites(trace(layer, x)) if isinstance(item, Site))
    rows = patches(layer, x).double().permute(1, 2, 0)
    for gram in (None, rows @ rows.mT / rows.shape[2]):
        drafted = GroupShuffle(style="permuted").draft(site, layer.weight.detach(), gram)
        seen = nn.functional.conv2d(x, drafted.weight, layer.bias, groups=2)
        assert relative(outputs(nn.Sequential(*drafted.layers), x), seen) < 1e-12


# ---- how it is written down ------------------------------------------------------------------------------------------


def test_golden_order_of_inputs_and_outputs() -> None:
    net = Net(lambda m, x: m.conv(x).relu(), conv=conv(8, 6, 3, 3, padding=1, stride=2))
    planted(net.conv, 2, 1)
    result = permuted(net, randn(2, 8, 9, 9))
    assert printed(result.program) == "\n".join([
        "_0_order = conv_0.order()",
        "index_select = index_select(x, 1, _0_order)",
        "conv = Conv2d 8->6 3x3 /2 groups=2(index_select)",
        "_2_order = conv_2.order()",
        "index_select_1 = index_select(conv, 1, _2_order)",
        "relu = ReLU(index_select_1)",
        "return relu",
    ])  # fmt: skip
    assert only_site(result).change == "Conv2d 8->6 3x3 /2 -> Reorder, Conv2d 8->6 3x3 /2 groups=2, Reorder"


def test_groups_are_the_fewest_that_cost_no_more_than_the_share() -> None:
    layer, x = conv(12, 24, 3, 3), randn(2, 12, 8, 8)
    for rank, groups in [(0.5, 2), (0.4, 3), (0.25, 4), (0.2, 6), (0.1, 12), (1.0, 2)]:
        report = only_site(permuted(layer, x, rank=rank))
        assert report.before.macs == groups * report.after.macs
    (skip,) = GroupShuffle(style="permuted", rank=0.05).sites(trace(layer, x))
    assert isinstance(skip, Skip)
    assert skip.reason == "its 12 inputs and 24 outputs do not fall into 20 groups or more, as rank=0.05 wants"
    (skip,) = GroupShuffle(style="permuted", groups=5).sites(trace(layer, x))
    assert isinstance(skip, Skip)
    assert skip.reason == "its 12 inputs and 24 outputs do not fall into 5"


def test_options_that_have_no_meaning_are_refused() -> None:
    for text, message in [
        ("energy=0.9", "energy has no meaning with style=permuted"),
        ("round_to=8", "round_to has no meaning with style=permuted"),
        ("rank=8", "rank as channels has no meaning with style=permuted"),
        ("rank=0.25, groups=4", "give rank or groups with style=permuted, not both"),
    ]:
        with pytest.raises(PipelineError, match=message):
            parse_pipeline(f"group-shuffle(style=permuted, {text})")
