"""group-shuffle: what stands in a layer's place, what it costs, how near it comes, and what stays."""

from __future__ import annotations

import dataclasses
import math
from itertools import accumulate
from typing import Any

import pytest
import torch
from fxcompile.passes import GroupShuffle
from fxcompile.passes import _grouping as grouping
from fxcompile.passes._stack_refining import held
from helpers import (
    MODES,
    Net,
    assert_text_means_the_same,
    conv,
    geometry,
    images,
    only_site,
    outputs,
    printed,
    randn,
    relative,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fxcompile.calibration import as_calibration
from fxcompile.errors import PipelineError
from fxcompile.manager import PassManager, Result
from fxcompile.patches import patches
from fxcompile.pipeline import parse_pipeline
from fxcompile.rewriting import Site, Skip
from fxcompile.testing import check_pass
from fxcompile.tracing import trace

PAIRS = ["pointwise", "depthwise", "shuffle-unit"]
OPTIONS: list[dict[str, Any]] = [
    {"rank": 0.9, "round_to": 1},
    {"rank": 6, "groups": 2},
    {"energy": 0.7},
    {"style": "depthwise", "rank": 0.9},
    {"style": "depthwise", "energy": 0.6},
    {"style": "shuffle-unit", "energy": 0.8},
    {"style": "shuffle-unit", "rank": 8, "groups": 2},
    {"style": "permuted"},
]


def shuffled(model: nn.Module, x: Tensor, calibration: Tensor | None = None, **options: Any) -> Result:
    passes = [GroupShuffle(**{"min_saving": None, **options})]
    return PassManager(passes, calibration=calibration, verify_examples=2).run(trace(model.eval(), x[:2]))


def layers_of(result: Result) -> list[Any]:
    return [inner for inner in result.module.modules() if isinstance(inner, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]


# ---- where it stands -------------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, Tensor]:
    """A layer of any geometry, and inputs; borders count for much of them."""
    groups = draw(st.sampled_from([1, 1, 2]))
    kernel = draw(st.sampled_from([(3, 3), (5, 2), (3,), (1, 3, 2)]))
    options = geometry(draw, kernel, groups, MODES)
    layer = conv(6 * groups, draw(st.sampled_from([6, 12])) * groups, *kernel, seed=draw(st.integers(0, 99)), **options)
    size = [max(3, (k - 1) * d + 1) + draw(st.integers(0, 2)) for k, d in zip(kernel, options["dilation"], strict=True)]
    return layer, randn(8, 6 * groups, *size, seed=1)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.sampled_from(PAIRS), st.sampled_from([None, 1, 2, 3]), st.booleans())
def test_with_all_channels_it_computes_what_the_layer_did(
    case: tuple[Any, Tensor], style: str, groups: int | None, calibrated: bool
) -> None:
    layer, x = case
    groups = None if style == "depthwise" else groups
    result = shuffled(layer, x, x if calibrated else None, rank=10**6, style=style, groups=groups)
    assert only_site(result).outcome == "kept"
    wanted = outputs(layer, x)
    assert float((outputs(result.module, x) - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


def test_same_padding_of_even_kernels_stays_uneven() -> None:
    layer, x = conv(4, 6, 4, 2, padding="same"), randn(8, 4, 9, 8)
    result = shuffled(layer, x, x, rank=10**6)
    assert relative(outputs(result.module, x), outputs(layer, x)) < 1e-12


@pytest.mark.parametrize("style", PAIRS)
def test_one_image_without_a_batch_works(style: str) -> None:
    layer, x = conv(4, 6, 3, 3, padding=1), randn(4, 8, 8)
    result = PassManager([GroupShuffle(style=style, rank=10**6, min_saving=None)]).run(trace(layer, x))
    assert only_site(result).outcome == "kept"
    assert relative(outputs(result.module, x), outputs(layer, x)) < 1e-12


@pytest.mark.parametrize("groups", [1, 2])
def test_a_shuffle_unit_over_single_pixels(groups: int) -> None:
    layer, x = conv(8 * groups, 12 * groups, 1, 1, groups=groups, stride=2), randn(8, 8 * groups, 7, 7)
    result = shuffled(layer, x, style="shuffle-unit", groups=4, rank=10**6)
    assert relative(outputs(result.module, x), outputs(layer, x)) < 1e-12
    assert [inner.groups for inner in layers_of(result)] == [4 * groups, 4 * groups]


# ---- how near --------------------------------------------------------------------------------------------------------


def planted(style: str, groups: int, width: int) -> Any:
    """A layer that is a grouped k x k layer, its channels put in order by hand, and one over single pixels."""
    ins, outs = {"pointwise": (2, 1), "depthwise": (4, 1), "shuffle-unit": (2, 2)}[style]
    layer = conv(4 * groups, 6 * groups, 3, 3, padding=1, groups=groups)
    for group in range(groups):
        weight = torch.zeros(6, 4, 3, 3, dtype=torch.float64)
        for a in range(ins):
            for b in range(outs):
                seed = 10 * (a + 9 * b + 81 * group)
                inner, outer = randn(width, 4 // ins, 3, 3, seed=seed), randn(6 // outs, width, seed=seed + 1)
                rows, columns = slice(b * 6 // outs, (b + 1) * 6 // outs), slice(a * 4 // ins, (a + 1) * 4 // ins)
                weight[rows, columns] = torch.einsum("rcij,or->ocij", inner, outer)
        layer.weight.data[6 * group : 6 * group + 6] = weight
    return layer


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("style", PAIRS)
def test_blocks_of_few_channels_are_found_out(groups: int, data: bool, style: str) -> None:
    layer, x = planted(style, groups, 2), images(24, 4 * groups, 9, 9)
    split = {} if style == "depthwise" else {"groups": 2}
    result = shuffled(layer, x, x if data else None, energy=1 - 1e-9, style=style, **split)
    assert only_site(result).error < 1e-6
    assert layers_of(result)[0].out_channels == groups * {"pointwise": 4, "depthwise": 8, "shuffle-unit": 8}[style]


@pytest.mark.parametrize("style", PAIRS)
def test_of_the_numbers_of_groups_the_right_one_is_chosen(style: str) -> None:
    """Where one of them fits the weight and others do not, at the same cost."""
    layer, x = planted(style, 1, 1), randn(8, 4, 9, 9)
    share = {"pointwise": 48 / 216, "depthwise": 60 / 216, "shuffle-unit": 84 / 216}[style]
    for data in (None, x):
        result = shuffled(layer, x, data, rank=share, round_to=1, style=style)
        assert only_site(result).error < 1e-6
        assert layers_of(result)[0].groups == (4 if style == "depthwise" else 2)


@pytest.mark.parametrize(("ins", "outs"), [(2, 1), (8, 1), (2, 3), (4, 2)])
def test_the_error_of_the_weight_is_that_of_the_singular_values_left_out(ins: int, outs: int) -> None:
    """Eckart and Young, in each block: so no other pair of so many channels is nearer."""
    weight = randn(2, 12, 8 * 9)
    for width in (1, 2, 3):
        pair = grouping.nearest_pair(weight, ins, outs, width)
        left = sum(
            float(torch.linalg.svdvals(block)[width:].square().sum())
            for rows in weight.chunk(outs, 1) for part in rows.chunk(ins, 2) for block in part
        )  # fmt: skip
        assert grouping.lost(pair, weight) == pytest.approx(left, rel=1e-9)
        values = grouping.singular_values(weight, ins, outs)
        assert float(values[:, width:].square().sum()) == pytest.approx(left, rel=1e-9)


def test_one_group_is_reduced_rank_regression() -> None:
    """The best that there is: the eigenvalues of the outputs' moments that are left out."""
    layer, x = conv(4, 6, 3, 3, bias=True), images(40, 4, 7, 7)
    site = next(iter(GroupShuffle(groups=1, rank=2, min_saving=None).sites(trace(layer, x[:2]))))
    assert isinstance(site, Site)
    y = outputs(layer, x)
    made = nn.Sequential(*GroupShuffle(groups=1, rank=2).rewrite(site.with_pairs(((x, y),))))  # type: ignore[misc]
    rows = y.movedim(1, -1).flatten(0, -2)
    values = torch.linalg.svdvals(rows - rows.mean(0))
    lost = float((outputs(made, x) - y).square().sum())
    assert lost == pytest.approx(float(values[2:].square().sum()), rel=0.02)


@pytest.mark.parametrize("style", PAIRS)
def test_no_search_on_the_outputs_finds_something_better(style: str) -> None:
    """L-BFGS from random layers, on what is minimised: the error of the outputs, held near the weight."""
    layer, x = conv(6, 8, 3, 3, padding=1, bias=False), images(24, 6, 8, 8)
    split = {} if style == "depthwise" else {"groups": 2}
    pass_ = GroupShuffle(rank=8 if style == "shuffle-unit" else 6, min_saving=None, style=style, **split)
    site = next(iter(pass_.sites(trace(layer, x[:2]))))
    assert isinstance(site, Site)
    made = nn.Sequential(*pass_.rewrite(site.with_pairs(((x, outputs(layer, x)),))))  # type: ignore[misc]
    rows = patches(layer, x).squeeze(1)
    gram = rows.T @ rows / len(rows)
    gram += 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight = layer.weight.detach()
    units = torch.eye(54, dtype=torch.float64).reshape(54, 6, 3, 3)
    layers = nn.Sequential(*(inner for inner in made))
    layers[0].padding = 0
    start = [inner.clone() for inner in layers.parameters()]

    def lost(parameters: list[Tensor]) -> Tensor:
        named = dict(zip((name for name, _ in layers.named_parameters()), parameters, strict=True))
        found = torch.func.functional_call(layers, named, (units,)).flatten(1).T
        lacks = weight.flatten(1) - found
        return (lacks @ gram * lacks).sum()

    best = math.inf
    for seed in range(4):
        free = [randn(*item.shape, seed=10 * seed + at).mul(0.3).requires_grad_() for at, item in enumerate(start)]
        search = torch.optim.LBFGS(free, max_iter=400, line_search_fn="strong_wolfe")

        def closure(free: Any = free, search: Any = search) -> float:
            search.zero_grad()
            loss = lost(free)
            loss.backward()
            return loss.item()

        search.step(closure)
        best = min(best, closure())
    assert float(lost(start).detach()) <= 1.03 * best


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_data_never_lose_to_the_weights(data: st.DataObject) -> None:
    """On correlated inputs that were held out, however few there are to fit to."""
    groups = data.draw(st.sampled_from([1, 2]))
    layer = conv(4 * groups, 4 * groups, *data.draw(st.sampled_from([(3, 3), (4, 3)])), padding=1, groups=groups,
                 seed=data.draw(st.integers(0, 99)), stride=data.draw(st.integers(1, 2)),
                 bias=data.draw(st.booleans()))  # fmt: skip
    x = images(data.draw(st.sampled_from([4, 8, 40])), 4 * groups, 8, 8, seed=data.draw(st.integers(0, 99)))
    options = data.draw(st.sampled_from(OPTIONS))
    _, held = as_calibration(x, trace(layer, x[:2]).inputs).split(seed=0)
    ((unseen,),) = held.batches(len(x))
    found = [relative(outputs(shuffled(layer, x, part, **options).module, unseen), outputs(layer, unseen))
             for part in (None, x)]  # fmt: skip
    assert found[1] <= found[0] * (1 + 1e-9)


@pytest.mark.parametrize("style", PAIRS)
def test_data_make_it_much_better_on_inputs_not_seen(style: str) -> None:
    layer, x, unseen = conv(16, 16, 3, 3, padding=1), images(120, 16, 10, 10), images(60, 16, 10, 10, seed=50)
    errors = [relative(outputs(shuffled(layer, x, data, rank=0.5, style=style).module, unseen), outputs(layer, unseen))
              for data in (None, x)]  # fmt: skip
    assert errors[1] < 0.6 * errors[0]


def test_the_joint_fit_is_nearer_than_what_it_starts_at() -> None:
    weight, x = randn(2, 8, 36), images(40, 8, 8, 8)
    rows = patches(conv(8, 16, 3, 3, groups=2), x)
    gram = held(torch.einsum("ngf,ngh->gfh", rows, rows) / len(rows))
    for ins, outs in ((2, 1), (4, 1), (2, 2)):
        start = grouping.nearest_pair(weight, ins, outs, 2, gram)
        joint = grouping.refined(start, weight, gram)
        assert grouping.lost(joint, weight, gram) < 0.9 * grouping.lost(start, weight, gram)


# ---- what it costs ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_share_of_the_cost_is_kept(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2]))
    layer = conv(16 * groups, 24 * groups, *data.draw(st.sampled_from([(3, 3), (5, 3)])), padding=1, groups=groups,
                 stride=data.draw(st.integers(1, 2)))  # fmt: skip
    rank, style = data.draw(st.sampled_from([0.1, 0.3, 0.6, 0.9])), data.draw(st.sampled_from(PAIRS))
    round_to = data.draw(st.sampled_from([None, 1, 3]))
    site = only_site(shuffled(layer, randn(2, 16 * groups, 9, 9), rank=rank, style=style, round_to=round_to))
    if site.outcome == "left":
        assert "above rank=" in site.reason
        return
    assert site.after.macs <= rank * site.before.macs
    pass_ = GroupShuffle(rank=rank, style=style, round_to=round_to, min_saving=None)
    found = next(iter(pass_.sites(trace(layer, randn(2, 16 * groups, 9, 9)))))
    assert isinstance(found, Site)
    shares = [form.share for form in pass_.forms(found)]
    assert min(abs(share - site.after.macs / site.before.macs) for share in shares) < 1e-12


@pytest.mark.parametrize(("style", "least"), [("pointwise", 0.47), ("depthwise", 0.37), ("shuffle-unit", 0.45)])
def test_a_share_is_nearly_used_up(style: str, least: float) -> None:
    site = only_site(shuffled(conv(48, 64, 3, 3, padding=1), randn(2, 48, 9, 9), rank=0.5, round_to=1, style=style))
    assert least * site.before.macs < site.after.macs <= 0.5 * site.before.macs


@pytest.mark.parametrize("style", PAIRS)
def test_energy_keeps_its_share_of_the_weight(style: str) -> None:
    layer, x = conv(8, 8, 3, 3, bias=False), randn(2, 8, 8, 8)
    result = shuffled(layer, x, energy=0.8, style=style)
    units = torch.eye(72, dtype=torch.float64).reshape(72, 8, 3, 3)
    found, wanted = outputs(result.module, units), outputs(layer, units)
    kept = 1 - float((found - wanted).square().sum() / wanted.square().sum())
    first, last = layers_of(result)
    width = first.out_channels // (first.groups * last.groups)
    values = grouping.singular_values(layer.weight.detach().flatten(1).unsqueeze(0), first.groups, last.groups)
    assert kept == pytest.approx(1 - float(values[:, width:].square().sum() / values.square().sum()))
    assert 1 - float(values[:, width - 1 :].square().sum() / values.square().sum()) < 0.8 <= kept


def test_without_a_share_the_cheapest_number_of_groups_is_taken() -> None:
    layer, x = conv(24, 24, 3, 3), randn(2, 24, 8, 8)
    assert [inner.groups for inner in layers_of(shuffled(layer, x, rank=24))] == [8, 1]
    assert [inner.out_channels for inner in layers_of(shuffled(layer, x, rank=24))] == [24, 24]
    assert [inner.groups for inner in layers_of(shuffled(layer, x, rank=24, groups=3))] == [3, 1]


# ---- what stays ------------------------------------------------------------------------------------------------------


def skips(model: nn.Module, x: Tensor, **options: Any) -> list[str]:
    found = GroupShuffle(**options).sites(trace(model.eval(), x))
    return [item.reason for item in found if isinstance(item, Skip)]


def test_layers_that_have_no_such_form_are_left_with_a_reason() -> None:
    x = randn(2, 12, 9, 9)
    assert skips(conv(12, 12, 3, 3, groups=12), x) == ["it has one input in each of its groups"]
    assert skips(conv(12, 12, 3, 3), x, groups=5) == ["its 12 inputs do not fall into 5"]
    assert skips(conv(11, 12, 3, 3), x[:, :11]) == ["its 11 inputs do not fall into any number of groups from 2 to 8"]
    assert skips(conv(12, 7, 3, 3), x, style="shuffle-unit", groups=4) == [
        "its 12 inputs and 7 outputs do not fall into 4"
    ]
    assert skips(conv(12, 4, 3, 3), x, rank=0.1)[0].startswith("one channel a group between costs")
    assert skips(conv(12, 12, 3, 3), x, rank=96) == ["it would cost 22% more MACs than it does, against min_saving=0"]
    net = Net(lambda m, x: m.first(x) + m.second(x.flip(2)), first=conv(12, 12, 3, 3), second=conv(12, 12, 3, 3))
    net.second.weight = net.first.weight
    assert skips(net, x)[0] == "it shares its weight with 'second', which would keep it"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("style", [*PAIRS, "permuted"])
def test_a_layer_without_inputs_is_left_with_a_reason(style: str) -> None:
    assert skips(nn.Conv2d(0, 4, 3).double(), randn(2, 0, 9, 9), style=style) == ["it has no input"]


@pytest.mark.parametrize("groups", [1, 2])
def test_what_was_drafted_is_pinned_by_its_number_of_groups(groups: int) -> None:
    """At a share at which 2, 3 and 4 groups of inputs may be had, each draft leaves only its own."""
    layer, x = conv(12 * groups, 24 * groups, 3, 3, groups=groups), randn(2, 12 * groups, 9, 9)
    site = next(iter(GroupShuffle(rank=0.5, round_to=1).sites(trace(layer, x))))
    assert isinstance(site, Site)
    for style, choices in (("pointwise", [2, 3, 4, 6]), ("shuffle-unit", [2, 3, 4, 6])):
        free = GroupShuffle(rank=0.5, round_to=1, style=style)
        assert [form.ins for form in free.affordable_forms(site)] == choices
        for count in choices:
            made = free.model_copy(update={"groups": count}).draft(site, layer.weight.detach()).layers
            assert free.pinned(site, made) == free.model_copy(update={"groups": count})
    whole = GroupShuffle(rank=0.5, round_to=1, style="depthwise")
    assert whole.pinned(site, whole.draft(site, layer.weight.detach()).layers) == whole


def test_layers_over_single_pixels_are_sites_of_shuffle_units_only() -> None:
    program = trace(conv(12, 12, 1, 1), randn(2, 12, 9, 9))
    found = {style: len(list(GroupShuffle(style=style).sites(program))) for style in PAIRS}
    assert found == {"pointwise": 0, "depthwise": 0, "shuffle-unit": 1}


def test_only_and_skip_and_the_largest_error_hold() -> None:
    net = Net(lambda m, x: m.second(m.first(x)), first=conv(8, 8, 3, 3), second=conv(8, 8, 3, 3, seed=5))
    outcomes = [
        {site.name: site.outcome for site in shuffled(net, randn(2, 8, 9, 9), **options).record.passes[0].sites}
        for options in ({"only": ["first"]}, {"skip": ["first"]}, {"max_error": 1e-9})
    ]
    assert outcomes == [
        {"first": "kept"},
        {"second": "kept"},
        {"first": "left", "second": "left"},
    ]


def test_options_that_do_not_go_together_are_refused() -> None:
    for text, message in [
        ("group-shuffle(rank=4, energy=0.9)", "give rank or energy, not both"),
        ("group-shuffle(style=depthwise, groups=4)", "groups has no meaning with style=depthwise"),
        ("group-shuffle(style=other)", "option 'style' of pass 'group-shuffle' cannot be other"),
    ]:
        with pytest.raises(PipelineError, match=message):
            parse_pipeline(text)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_text_with_every_option_means_the_same_pass(options: dict[str, Any]) -> None:
    assert_text_means_the_same(GroupShuffle(**options))


@pytest.mark.parametrize(
    ("options", "exact"),
    [*(({"rank": 10**6, "style": style}, True) for style in PAIRS), *((options, False) for options in OPTIONS)],
    ids=str,
)
def test_the_kit_breaks_none_of_its_promises(options: dict[str, Any], exact: bool) -> None:
    summary = check_pass(GroupShuffle(min_saving=None, **options), examples=20, seed=3, onnx_examples=1, exact=exact)
    assert summary.with_sites >= 4


# ---- in a network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("style", "groups", "width"), [("pointwise", 4, 16), ("depthwise", 8, 16)])
def test_golden_pairs(style: str, groups: int, width: int) -> None:
    split = {} if style == "depthwise" else {"groups": groups}
    result = shuffled(conv(8, 12, 3, 3, padding=1), randn(2, 8, 9, 9), rank=16, style=style, **split)
    assert printed(result.program) == "\n".join([
        f"weight.0 = Conv2d 8->{width} 3x3 groups={groups}(input)",
        f"weight.1 = Conv2d {width}->12 1x1(weight.0)",
        "return weight.1",
    ])  # fmt: skip


def test_golden_units() -> None:
    net = Net(lambda m, x: m.point(m.norm(m.conv(x)).relu()), conv=nn.Conv2d(8, 12, 3, padding=1, stride=2),
              norm=nn.BatchNorm2d(12), point=nn.Conv2d(12, 16, 1))  # fmt: skip
    result = shuffled(net, torch.randn(2, 8, 12, 12), rank=16, groups=4, style="shuffle-unit")
    assert printed(result.program) == "\n".join([
        "conv.0 = Conv2d 8->16 3x3 /2 groups=4(x)",
        "conv.1 = ChannelShuffle(conv.0)",
        "conv.2 = Conv2d 16->12 1x1 groups=4(conv.1)",
        "norm = BatchNorm2d(conv.2)",
        "relu = ReLU(norm)",
        "point.0 = Conv2d 12->16 1x1 groups=4(relu)",
        "point.1 = ChannelShuffle(point.0)",
        "point.2 = Conv2d 16->16 1x1 groups=4(point.1)",
        "return point.2",
    ])  # fmt: skip
    assert [inner.bias is None for inner in layers_of(result)] == [True, False, True, False]
    assert [inner.padding for inner in layers_of(result)[:2]] == [(1, 1), (0, 0)]


def test_a_layer_of_more_features_than_a_gram_matrix_takes_is_fitted_behind_the_first_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fxcompile.passes._chain_fitting.MOST_FEATURES", 100)
    layer, x, unseen = conv(16, 16, 3, 3, padding=1), images(60, 16, 10, 10), images(40, 16, 10, 10, seed=50)
    wanted = outputs(layer, unseen)
    errors = [relative(outputs(shuffled(layer, x, data).module, unseen), wanted) for data in (None, x)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(("bias", "grams"), [(True, 2), (False, 3)])
def test_a_fit_holds_no_gram_matrix_that_it_does_not_need(
    bias: bool, grams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums and the norm, and for a moment the sums about zero; of 4608 features each takes 170 MB."""
    monkeypatch.setattr("fxcompile.passes._chain_fitting.solve", lambda stats, weight, bias: (weight, bias))
    layer, x = conv(64, 8, 3, 3, bias=bias), images(40, 64, 8, 8)
    pass_ = GroupShuffle(groups=8)
    (site,) = pass_.sites(trace(layer, x[:2]))
    assert isinstance(site, Site)
    site = dataclasses.replace(site, pairs=((x, outputs(layer, x)),))
    site.statistics().centred()
    found = pass_.candidates(site)
    next(found)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        next(found)
    events: Any = record.profiler
    taken = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(taken, key=lambda event: event.start_ns())]
    gram = 8 * 576**2
    assert grams - 1 < max(accumulate(sizes)) / gram < grams - 0.5
