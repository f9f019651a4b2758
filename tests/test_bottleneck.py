"""bottleneck: what stands in a layer's place, what it costs, how near it comes, and what stays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fxcompile.passes import Bottleneck
from fxcompile.passes._bottleneck_work import Work
from fxcompile.passes._tucker import reduced_both
from fxcompile.passes._vbmf import evidence_rank
from helpers import (
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

from fxcompile.calibration import as_calibration
from fxcompile.contracts import Approximate, Trained
from fxcompile.errors import PipelineError
from fxcompile.manager import PassManager, Result
from fxcompile.patches import patches
from fxcompile.pipeline import parse_pipeline
from fxcompile.rewriting import Site, Skip
from fxcompile.testing import check_pass
from fxcompile.tracing import trace

OPTIONS: list[dict[str, Any]] = [
    {"rank": 0.5, "round_to": 1},
    {"rank": 3},
    {"rank": 3, "style": "inception"},
    {"energy": 0.7},
    {"energy": 0.7, "style": "inception"},
    {"vbmf": True},
    {"rank": 4, "activation": "relu"},
    {"rank": 6, "style": "cp"},
    {"rank": 4, "style": "cp", "activation": "relu"},
]
STYLES = ["tucker", "inception", "cp"]


def narrowed(model: nn.Module, x: Tensor, calibration: Tensor | None = None, **options: Any) -> Result:
    passes = [Bottleneck(**{"min_saving": None, **options})]
    return PassManager(passes, calibration=calibration, verify_examples=2).run(trace(model.eval(), x[:2]))


def layers_of(result: Result) -> list[Any]:
    return [inner for inner in result.module.modules() if isinstance(inner, (nn.Conv2d, nn.Conv3d, nn.Linear))]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, Tensor]:
    """A layer of any geometry, and inputs; borders count for much of them."""
    groups = draw(st.sampled_from([1, 1, 2]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (5, 2), (3,), (1, 3, 2)]))
    options = geometry(draw, kernel, groups, ("zeros", "zeros", "circular", "replicate"))
    layer = conv(3 * groups, draw(st.sampled_from([2, 4])) * groups, *kernel, seed=draw(st.integers(0, 99)), **options)
    size = [max(3, (k - 1) * d + 1) + draw(st.integers(0, 2)) for k, d in zip(kernel, options["dilation"], strict=True)]
    return layer, randn(8, 3 * groups, *size, seed=1)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.sampled_from(STYLES), st.booleans())
def test_with_all_channels_it_computes_what_the_layer_did(
    case: tuple[Any, Tensor], style: str, calibrated: bool
) -> None:
    layer, x = case
    result = narrowed(layer, x, x if calibrated else None, rank=10**6, style=style)
    assert only_site(result).outcome == "kept"
    wanted = outputs(layer, x)
    assert float((outputs(result.module, x) - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.sampled_from(STYLES))
def test_a_relu_is_the_identity_at_every_pixel(case: tuple[Any, Tensor], style: str) -> None:
    """On what it was calibrated on, borders included: all padding stands ahead of the first bias."""
    layer, x = case
    layer.padding_mode = "zeros"
    passes = [Bottleneck(rank=4, style=style, activation=kind) for kind in ("none", "relu")]
    site = next(iter(Bottleneck(rank=4, min_saving=None).sites(trace(layer, x[:2]))))
    assert isinstance(site, Site)
    site = site.with_pairs(((x, outputs(layer, x)),))
    linear, curved = (nn.Sequential(*item.rewrite(site)) for item in passes)
    wanted = outputs(linear, x)
    assert sum(isinstance(inner, nn.ReLU) for inner in curved) == len(linear) - 1
    assert float((outputs(curved, x) - wanted).abs().max()) <= 1e-11 * float(wanted.abs().max())


def test_a_relu_between_two_linear_layers_changes_nothing_and_trains() -> None:
    layer, x = linear(8, 6), images(60, 8, 4, 4).movedim(1, -1)
    results = [narrowed(layer, x, x, rank=4, activation=kind) for kind in ("none", "relu")]
    assert [type(inner).__name__ for inner in results[1].module.modules()][-3:] == ["Linear", "ReLU", "Linear"]
    errors = [relative(outputs(result.module, x), outputs(layer, x)) for result in results]
    assert errors[1] <= errors[0] + 0.02
    module = results[1].module.train()
    module(x).square().mean().backward()
    assert all(float(item.grad.abs().max()) > 0 for item in module.parameters())


def linear(inputs: int, outputs: int, seed: int = 0, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias).double()
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed + index))
    return layer.eval()


# ---- how near --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("style", ["tucker", "inception"])
def test_a_kernel_that_is_narrow_is_found_out(groups: int, data: bool, style: str) -> None:
    layer = conv(6 * groups, 8 * groups, 3, 3, padding=1, groups=groups)
    core = randn(groups, 8 if style == "inception" else 3, 2, 3, 3, seed=1)
    weight = torch.einsum("gsrij,grc->gscij", core, randn(groups, 2, 6, seed=2))
    if style == "tucker":
        weight = torch.einsum("gscij,gos->gocij", weight, randn(groups, 8, 3, seed=3))
    layer.weight.data = weight.flatten(0, 1)
    x = images(24, 6 * groups, 9, 9)
    result = narrowed(layer, x, x if data else None, energy=1.0 - 1e-9, style=style)
    assert only_site(result).error < 1e-6
    between = [2, 3] if style == "tucker" else [2]
    assert [inner.out_channels for inner in layers_of(result)][:-1] == [groups * width for width in between]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["pixels", "linear"])
def test_over_single_pixels_it_is_reduced_rank_regression(kind: str, bias: bool) -> None:
    """The best that there is: the eigenvalues of the outputs' moments that are left out."""
    layer: Any = conv(6, 5, 1, 1, bias=bias) if kind == "pixels" else linear(6, 5, bias=bias)
    x = images(40, 6, 5, 5) if kind == "pixels" else images(400, 6, 1, 1)[:, :, 0, 0]
    site = next(iter(Bottleneck(rank=2, min_saving=None).sites(trace(layer, x[:2]))))
    assert isinstance(site, Site)
    y = outputs(layer, x)
    made = nn.Sequential(*Bottleneck(rank=2, min_saving=None).rewrite(site.with_pairs(((x, y),))))
    rows = y.movedim(1, -1).flatten(0, -2)
    values = torch.linalg.svdvals(rows - rows.mean(0) if bias else rows)
    lost = float((outputs(made, x) - y).square().sum())
    assert lost == pytest.approx(float(values[2:].square().sum()), rel=0.02)


@pytest.mark.parametrize("style", ["tucker", "inception"])
def test_no_search_on_the_outputs_finds_something_better(style: str) -> None:
    """L-BFGS from random layers, on what is minimised: the error of the outputs, held near the weight."""
    layer = conv(6, 7, 3, 3, padding=1, bias=False)
    x = images(24, 6, 8, 8)
    pass_ = Bottleneck(rank=3, min_saving=None, style=style)
    site = next(iter(pass_.sites(trace(layer, x[:2]))))
    assert isinstance(site, Site)
    made: Sequence[Any] = pass_.rewrite(site.with_pairs(((x, outputs(layer, x)),)))  # type: ignore[assignment]
    rows = patches(layer, x).squeeze(1)
    gram = rows.T @ rows / len(rows)
    gram += 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight = layer.weight.detach()

    def lost(stages: Sequence[Tensor]) -> Tensor:
        found = torch.einsum("orij,rc->ocij", stages[1], stages[0].flatten(1))
        if len(stages) == 3:
            found = torch.einsum("scij,os->ocij", found, stages[2].flatten(1))
        lacks = (weight - found).flatten(1)
        return (lacks @ gram * lacks).sum()

    best = math.inf
    for start in range(4):
        free = [randn(*inner.weight.shape, seed=10 * start + at).mul(0.3).requires_grad_()
                for at, inner in enumerate(made)]  # fmt: skip
        search = torch.optim.LBFGS(free, max_iter=400, line_search_fn="strong_wolfe")

        def closure(free: Any = free, search: Any = search) -> float:
            search.zero_grad()
            loss = lost(free)
            loss.backward()
            return loss.item()

        search.step(closure)
        best = min(best, closure())
    assert float(lost([inner.weight.detach() for inner in made])) <= 1.03 * best


def test_alternation_ends_where_no_search_finds_something_nearer() -> None:
    weight = randn(1, 7, 6, 3, 3)
    stages = reduced_both(weight, 3, 4)
    found = torch.einsum("gsrij,grc,gos->gocij", stages[1], stages[0].flatten(2), stages[2].flatten(2))
    best = math.inf
    for start in range(3):
        inner, outer = (torch.linalg.qr(randn(n, r, seed=start + n))[0] for n, r in ((6, 3), (7, 4)))
        for _ in range(200):
            outer = torch.linalg.svd(torch.einsum("ocij,cr->orij", weight[0], inner).flatten(1))[0][:, :4]
            inner = torch.linalg.svd(torch.einsum("ocij,os->csij", weight[0], outer).flatten(1))[0][:, :3]
        kept = torch.einsum("ocij,cr,os->srij", weight[0], inner, outer)
        best = min(best, float(weight.square().sum() - kept.square().sum()))
    assert float((found - weight).square().sum()) <= 1.02 * best


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_data_never_lose_to_the_weights(data: st.DataObject) -> None:
    """On correlated inputs that were held out, however few there are to fit to."""
    groups = data.draw(st.sampled_from([1, 2]))
    kernel = data.draw(st.sampled_from([(3, 3), (1, 1), (4, 3)]))
    layer = conv(4 * groups, 4 * groups, *kernel, seed=data.draw(st.integers(0, 99)), padding=kernel[0] // 2,
                 groups=groups, stride=data.draw(st.integers(1, 2)), bias=data.draw(st.booleans()))  # fmt: skip
    x = images(data.draw(st.sampled_from([4, 8, 40])), 4 * groups, 8, 8, seed=data.draw(st.integers(0, 99)))
    options = data.draw(st.sampled_from(OPTIONS))
    _, held = as_calibration(x, trace(layer, x[:2]).inputs).split(seed=0)
    ((unseen,),) = held.batches(len(x))
    found = [relative(outputs(narrowed(layer, x, part, **options).module, unseen), outputs(layer, unseen))
             for part in (None, x)]  # fmt: skip
    assert found[1] <= found[0] * (1 + 1e-9)


@pytest.mark.parametrize(
    "options", [{"rank": 0.4, "round_to": 1}, {"rank": 5, "style": "inception"}, {"rank": 20, "style": "cp"}], ids=str
)
def test_data_make_it_much_better_on_inputs_not_seen(options: dict[str, Any]) -> None:
    layer = conv(16, 16, 3, 3, padding=1)
    x, unseen = images(120, 16, 10, 10), images(60, 16, 10, 10, seed=50)
    errors = [relative(outputs(narrowed(layer, x, data, **options).module, unseen), outputs(layer, unseen))
              for data in (None, x)]  # fmt: skip
    assert errors[1] < 0.8 * errors[0]


# ---- what it costs ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_share_of_the_cost_is_kept(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2, 4]))
    kernel = data.draw(st.sampled_from([(1, 1), (3, 3), (5, 3), (1, 3), (3, 1)]))
    stride = (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)))
    layer = conv(16 * groups, 24 * groups, *kernel, padding=kernel[0] // 2, stride=stride,
                 groups=groups)  # fmt: skip
    rank = data.draw(st.sampled_from([0.1, 0.3, 0.6, 0.9]))
    options = {"round_to": data.draw(st.sampled_from([None, 1, 3])), "style": data.draw(st.sampled_from(STYLES)),
               "activation": data.draw(st.sampled_from(["none", "relu"]))}  # fmt: skip
    pass_ = Bottleneck(rank=rank, min_saving=None, **options)
    site = only_site(narrowed(layer, x := randn(2, 16 * groups, 9, 9), rank=rank, **options))
    if site.outcome == "left":
        assert "above rank=" in site.reason
        return
    assert site.after.macs <= rank * site.before.macs
    found = next(iter(pass_.sites(trace(layer, x))))
    assert isinstance(found, Site)
    work = pass_.work(found)
    assert work.macs(pass_.ranks(found, work)) == site.after.macs
    assert work.dense == site.before.macs


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_pair_of_widths_within_the_share_is_more_even_or_as_even_and_dearer(data: st.DataObject) -> None:
    """Against every pair of multiples, of numbers below them, and of all channels that there are."""
    groups, inputs, outputs = (data.draw(st.integers(1, most)) for most in (3, 40, 40))
    taps = data.draw(st.sampled_from([2, 3, 9]))
    work = Work(groups, inputs, outputs, taps, *(data.draw(st.integers(1, 30)) for _ in range(2)))
    share, round_to = data.draw(st.floats(0.01, 1)), data.draw(st.sampled_from([1, 3, 8]))
    inner, outer = work.widths(share, round_to)

    def allowed(most: int) -> list[int]:
        fewest = next(each for each in range(1, round_to + 1) if each * groups % round_to == 0)
        return [each for each in range(1, most + 1) if each in (*range(fewest), most) or each % fewest == 0]

    def rating(pair: tuple[int, int]) -> tuple[float, float]:
        return min(pair[0] / inputs, pair[1] / outputs), work.macs(pair)

    pairs = itertools.product(allowed(min(inputs, taps * outputs)), allowed(min(outputs, taps * inputs)))
    affordable = [pair for pair in pairs if work.macs(pair) <= share * work.dense * (1 + 1e-9)]
    if not affordable:
        assert (inner, outer) == (1, 1)
        return
    assert (inner, outer) in affordable
    assert rating((inner, outer)) == max(map(rating, affordable))


@pytest.mark.parametrize(
    ("channels", "ranks", "share"), [(16, (8, 8), 0.36), (24, (24, 8), 0.48), (64, (40, 32), 0.44)]
)
def test_narrow_layers_spend_what_multiples_of_eight_allow(channels: int, ranks: tuple[int, int], share: float) -> None:
    result = narrowed(conv(channels, channels, 3, 3, padding=1), randn(2, channels, 7, 7))
    assert tuple(inner.out_channels for inner in layers_of(result)[:2]) == ranks
    site = only_site(result)
    assert site.after.macs / site.before.macs == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("style", STYLES)
def test_a_share_is_nearly_used_up(style: str) -> None:
    site = only_site(narrowed(conv(64, 96, 3, 3, padding=1), randn(2, 64, 9, 9), rank=0.5, round_to=1, style=style))
    assert 0.48 * site.before.macs < site.after.macs <= 0.5 * site.before.macs


@pytest.mark.parametrize("style", ["tucker", "inception"])
def test_energy_keeps_its_share_of_the_weight(style: str) -> None:
    layer = conv(8, 10, 3, 3, padding=1, bias=False)
    stages = [inner.weight.detach() for inner in layers_of(narrowed(layer, randn(2, 8, 8, 8), energy=0.8, style=style))]
    found = torch.einsum("orij,rc->ocij", stages[1], stages[0].flatten(1))
    found = torch.einsum("scij,os->ocij", found, stages[2].flatten(1)) if style == "tucker" else found
    kept = 1 - float((found - layer.weight.detach()).square().sum() / layer.weight.detach().square().sum())
    assert kept >= 0.8
    assert stages[0].shape[0] < 8


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("noise", [1e-6, 0.1])
@pytest.mark.parametrize("shape", [(30, 90), (80, 40)])
def test_variational_bayes_finds_the_rank_that_was_planted(rank: int, noise: float, shape: tuple[int, int]) -> None:
    rows, columns = shape
    matrix = randn(rows, rank) @ randn(rank, columns, seed=1) + noise * randn(rows, columns, seed=2)
    assert evidence_rank(matrix) == rank
    assert evidence_rank(1e3 * matrix.T) == rank


def test_of_noise_and_of_nothing_one_channel_is_left() -> None:
    assert evidence_rank(randn(40, 60)) == 1
    assert evidence_rank(torch.zeros(4, 6)) == 1
    assert evidence_rank(torch.ones(1, 1)) == 1


def test_ranks_by_variational_bayes() -> None:
    layer = conv(12, 16, 3, 3, padding=1)
    weight = torch.einsum("srij,rc,os->ocij", randn(4, 3, 3, 3), randn(3, 12, seed=1), randn(16, 4, seed=2))
    layer.weight.data = weight + 0.05 * randn(*weight.shape, seed=3)
    made = layers_of(narrowed(layer, randn(2, 12, 8, 8), vbmf=True))
    assert [inner.out_channels for inner in made] == [3, 4, 16]


# ---- what stays ------------------------------------------------------------------------------------------------------


def skips(model: nn.Module, x: Tensor, **options: Any) -> list[str]:
    found = Bottleneck(**options).sites(trace(model.eval(), x))
    return [item.reason for item in found if isinstance(item, Skip)]


def test_layers_that_have_no_such_form_are_left_with_a_reason() -> None:
    x = randn(2, 4, 9, 9)
    assert skips(conv(4, 4, 2, 2, padding="same"), x, activation="relu", rank=1)[0].startswith("it pads unevenly")
    assert skips(conv(4, 4, 3, 3, groups=4), x)[0].startswith("one channel a group between costs")
    assert skips(conv(4, 4, 3, 3), x, rank=4) == ["it would cost 29% more MACs than it does, against min_saving=0"]
    net = Net(lambda m, x: m.first(x) + m.second(x.flip(2)), first=conv(4, 4, 3, 3), second=conv(4, 4, 3, 3))
    net.second.weight = net.first.weight
    assert skips(net, x, rank=1)[0] == "it shares its weight with 'second', which would keep it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bottleneck(rank=4, energy=0.9)", "give rank or energy, not both"),
        ("bottleneck(rank=4, vbmf=true)", "give vbmf, or one of rank and energy, not both"),
        ("bottleneck(energy=0.4, vbmf=true)", "give vbmf, or one of rank and energy, not both"),
        ("bottleneck(style=cp, energy=0.4)", "with style=cp only rank says how many channels there are"),
        ("bottleneck(style=cp, vbmf=true)", "with style=cp only rank says how many channels there are"),
        ("bottleneck(style=other)", "option 'style' of pass 'bottleneck' cannot be other"),
    ],
)
def test_options_that_do_not_go_together_are_refused(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        parse_pipeline(text)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_text_with_every_option_means_the_same_pass(options: dict[str, Any]) -> None:
    assert_text_means_the_same(Bottleneck(**options))


def test_the_contract_follows_the_activation() -> None:
    assert isinstance(Bottleneck().promise, Approximate)
    assert isinstance(Bottleneck(activation="relu").promise, Trained)


@pytest.mark.parametrize(
    ("options", "exact"), [({"rank": 10**6}, True), *((options, False) for options in OPTIONS)], ids=str
)
def test_the_kit_breaks_none_of_its_promises(options: dict[str, Any], exact: bool) -> None:
    summary = check_pass(Bottleneck(min_saving=None, **options), examples=20, seed=3, onnx_examples=1, exact=exact)
    assert summary.with_sites >= 5


def test_golden_bottleneck() -> None:
    net = Net(lambda m, x: m.fc(m.point(m.norm(m.conv(x)).relu()).mean((2, 3))),
              conv=nn.Conv2d(8, 12, 3, padding=1, stride=2), norm=nn.BatchNorm2d(12), point=nn.Conv2d(12, 16, 1),
              fc=nn.Linear(16, 10))  # fmt: skip
    result = narrowed(net, torch.randn(2, 8, 12, 12), rank=4)
    assert printed(result.program) == "\n".join([
        "conv.0 = Conv2d 8->4 1x1(x)",
        "conv.1 = Conv2d 4->4 3x3 /2(conv.0)",
        "conv.2 = Conv2d 4->12 1x1(conv.1)",
        "norm = BatchNorm2d(conv.2)",
        "relu = ReLU(norm)",
        "point.0 = Conv2d 12->4 1x1(relu)",
        "point.1 = Conv2d 4->16 1x1(point.0)",
        "mean = mean(point.1, [2, 3])",
        "fc.0 = Linear 16->4(mean)",
        "fc.1 = Linear 4->10(fc.0)",
        "return fc.1",
    ])  # fmt: skip
    assert [inner.bias is None for inner in layers_of(result)] == [True, True, False, True, False, True, False]
    assert [inner.padding for inner in layers_of(result)[:3]] == [(0, 0), (1, 1), (0, 0)]


def test_a_layer_of_more_features_than_a_gram_matrix_takes_is_fitted_behind_the_first_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fxcompile.passes._chain_fitting.MOST_FEATURES", 100)
    layer, x, unseen = conv(16, 16, 3, 3, padding=1), images(60, 16, 10, 10), images(40, 16, 10, 10, seed=50)
    wanted = outputs(layer, unseen)
    errors = [relative(outputs(narrowed(layer, x, data, rank=6).module, unseen), wanted) for data in (None, x)]
    assert errors[1] < 0.9 * errors[0]


def test_golden_polyadic() -> None:
    """Each axis of the kernel in a layer of its own, with the stride and the padding of that axis."""
    layer = conv(8, 12, 3, 5, padding=(1, 2), stride=(2, 1), groups=2)
    result = narrowed(layer, randn(2, 8, 12, 12), rank=6, style="cp")
    assert printed(result.program) == "\n".join([
        "weight.0 = Conv2d 8->6 1x1 groups=2(input)",
        "weight.1 = Conv2d 6->6 3x1 /2x1 groups=6(weight.0)",
        "weight.2 = Conv2d 6->6 1x5 groups=6(weight.1)",
        "weight.3 = Conv2d 6->12 1x1 groups=2(weight.2)",
        "return weight.3",
    ])  # fmt: skip
    made = layers_of(result)
    assert [inner.padding for inner in made] == [(0, 0), (1, 0), (0, 2), (0, 0)]
    assert [inner.bias is None for inner in made] == [True, True, True, False]


@pytest.mark.parametrize(("kernel", "rank"), [((5,), 4), ((3, 3), 6), ((3, 5), 6), ((3, 1), 3), ((3, 2, 3), 5)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("data", [False, True])
def test_terms_that_a_kernel_is_a_sum_of_are_found_out(
    kernel: tuple[int, ...], rank: int, groups: int, data: bool
) -> None:
    layer = conv(6 * groups, 8 * groups, *kernel, padding=kernel[0] // 2, groups=groups)
    layer.weight.data = torch.stack(
        [
            sum((one_term([8, 6, *kernel], seed=100 * group + term) for term in range(rank)), start=torch.zeros(()))
            for group in range(groups)
        ]
    ).flatten(0, 1)
    x = images(30, 6 * groups, *[9] * len(kernel))
    result = narrowed(layer, x, x if data else None, rank=rank * groups, style="cp")
    assert only_site(result).error < 1e-6


def one_term(shape: Sequence[int], seed: int) -> Tensor:
    """The outer product of a vector for each axis."""
    term = torch.ones((), dtype=torch.float64)
    for axis, size in enumerate(shape):
        term = term.unsqueeze(-1) * randn(size, seed=10 * seed + axis)
    return term


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_what_trains_still_does_whichever_of_weight_and_bias_is_frozen(frozen: str) -> None:
    layer, x = conv(8, 8, 3, 3), images(16, 8, 9, 9)
    getattr(layer, frozen).requires_grad_(False)
    result = narrowed(layer, x, x, rank=0.5)
    trains = {name.rpartition(".")[2]: item.requires_grad for name, item in result.program.module.named_parameters()}
    assert trains == {"weight": frozen == "bias", "bias": frozen == "weight"}
