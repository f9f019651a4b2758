"""reduce-grid: what stands beside what, that sizes agree, how near the branches come, and what stays."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from fxcompile.passes import ReduceGrid, reduce_grid
from fxcompile.passes import _grid as algebra
from fxcompile.passes._assignment import assignment
from fxcompile.passes._grid_fitting import steps_for
from fxcompile.passes._grid_layers import averaged, middle_window
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
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompile.calibration import as_calibration
from fxcompile.errors import FitError, PipelineError
from fxcompile.layer_stats import LayerStats
from fxcompile.manager import PassManager, Result
from fxcompile.pipeline import format_pipeline, parse_pipeline
from fxcompile.rewriting import Site, Skip
from fxcompile.testing import Recipe, Step, check_pass
from fxcompile.tracing import trace

POOLS: dict[str, Any] = {
    "max": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    "avg": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
}
MIXES = ("none", "pooled", "all")


def reduced(model: nn.Module, x: Tensor, calibration: Tensor | None = None, **options: Any) -> Result:
    options = {"min_saving": None, **options}
    passes = [ReduceGrid(**options)]
    return PassManager(passes, calibration=calibration, verify_examples=2).run(trace(model.eval(), x[:2]))


def replacement(model: nn.Module, x: Tensor, **options: Any) -> Any:
    """What takes the place of the only site."""
    pass_ = ReduceGrid(min_saving=None, **options)
    (site,) = pass_.sites(trace(model.eval(), x))
    assert isinstance(site, Site), site
    made = pass_.rewrite(site)
    return made if isinstance(made, nn.Module) else nn.Sequential(*made)


def normed(channels: int, dims: int = 2) -> Any:
    """A batch norm with statistics as if it had been trained."""
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](channels).double().eval()
    with torch.no_grad():
        for index, tensor in enumerate([norm.weight, norm.bias, norm.running_mean, norm.running_var]):
            tensor.copy_(randn(channels, seed=index) if 0 < index < 3 else randn(channels, seed=index).abs() + 0.2)
    return norm


# ---- sizes -----------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_maps_of_every_size_become_as_small_as_they_did(data: st.DataObject) -> None:
    """Sizes from 3 to 9, any stride, dilation, padding and groups; with a pooling its kernel, padding and ceil mode."""
    dims = data.draw(st.sampled_from([1, 2, 2, 3]))
    kernel = tuple(data.draw(st.integers(1, 4)) for _ in range(dims))
    groups = data.draw(st.sampled_from([1, 1, 2]))
    options = geometry(data.draw, kernel, groups, MODES if dims < 3 else ("zeros",))
    stride = tuple(data.draw(st.integers(1, 3)) for _ in kernel)
    assume(max(stride) > 1)
    follows = data.draw(st.booleans())
    options["stride"] = (1,) * dims if follows else stride
    layer = conv(2 * groups, 3 * groups, *kernel, **options)
    layers: list[nn.Module] = [layer]
    if follows:
        size = tuple(data.draw(st.integers(1, 3)) for _ in kernel)
        kind = data.draw(st.sampled_from(["max", "avg"]))
        more = {"dilation": data.draw(st.integers(1, 2))} if kind == "max" else {}
        padding = tuple(data.draw(st.integers(0, item // 2)) for item in size)
        layers += [
            nn.ReLU(),
            POOLS[kind][dims - 1](size, stride, padding, ceil_mode=data.draw(st.booleans()), **more),
        ]
    model = nn.Sequential(*layers).eval()
    choice: dict[str, Any] = {
        "mix": data.draw(st.sampled_from(MIXES)),
        "pool": data.draw(st.sampled_from(["max", "avg"])),
        "kernel": data.draw(st.sampled_from(["own", "whole"])) if follows else "own",
    }
    pass_ = ReduceGrid(rank=2 * groups, min_saving=None, **choice)
    (site,) = pass_.sites(trace(model, randn(1, 2 * groups, *[14] * dims)))
    if isinstance(site, Skip):
        assert "windows that begin behind the map" in site.reason
        return
    made = nn.Sequential(*pass_.rewrite(site))
    tried = 0
    for side in range(3, 10):
        x = randn(1, 2 * groups, *[side] * (dims - 1), data.draw(st.integers(3, 9)))
        if layer.padding_mode != "zeros":  # it is padded ahead of the site
            x = nn.functional.pad(x, layer._reversed_padding_repeated_twice) if min(x.shape[2:]) > 2 else x
            bare = conv(2 * groups, 3 * groups, *kernel, **{**options, "padding": 0, "padding_mode": "zeros"})
            model = nn.Sequential(bare, *layers[1:])
        try:
            wanted = outputs(model, x)
        except RuntimeError:
            continue
        assert outputs(made, x).shape == wanted.shape
        tried += 1
    assert tried or min(options["padding"]) < 2


def test_windows_of_poolings_are_in_the_middle() -> None:
    for whole, step in itertools.product(range(1, 12), range(1, 5)):
        start, size = middle_window(whole, step)
        assert size in (step, step + 1)
        assert start == whole - size - start


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize(("groups", "kernel", "padding"), [(1, 3, 1), (2, 3, 0), (1, 5, 2), (2, 4, 1)])
def test_outputs_that_are_pooled_inputs_are_found_out(
    mix: str, data: bool, groups: int, kernel: int, padding: int
) -> None:
    """Some outputs of a convolution are means of an input channel, scaled: they are the ones that the pooling gives."""
    layer = conv(4 * groups, 6 * groups, kernel, kernel, stride=2, padding=padding, groups=groups)
    start, size = middle_window(kernel, 2)
    for group, (output, channel) in itertools.product(range(groups), [(4, 1), (1, 3), (2, 0)]):
        row = layer.weight.data[6 * group + output]
        row.zero_()
        row[channel, start : start + size, start : start + size] = output - 2.5
    x = images(60, 4 * groups, 9, 11)
    result = reduced(layer, x, x if data else None, mix=mix, rank=3 * groups)
    assert relative(outputs(result.module, x), outputs(layer, x)) < 1e-6
    strided = next(inner for inner in result.module.modules() if isinstance(inner, nn.Conv2d) and inner.stride[0] == 2)
    assert strided.out_channels == 3 * groups


@pytest.mark.parametrize("dilation", [1, 2])
def test_an_average_pooling_behind_is_part_of_the_convolution(dilation: int) -> None:
    """Two linear layers are one, over all that they see; the norm between, the divisor and borders without padding."""
    layers = [conv(4, 6, 3, 3, dilation=dilation), normed(6), nn.AvgPool2d(3, 2, divisor_override=5)]
    x = images(60, 4, 12, 13)
    for data in (None, x):
        result = reduced(nn.Sequential(*layers), x, data, mix="all", rank=6, kernel="whole")
        assert relative(outputs(result.module, x), outputs(nn.Sequential(*layers).eval(), x)) < 1e-6


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_kernel_over_all_that_both_saw_is_their_composition(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    each = [tuple(data.draw(st.integers(1, 3)) for _ in range(dims)) for _ in range(4)]
    kernel, dilation, size, _ = each
    layer = conv(2, 3, *kernel, dilation=dilation, bias=False)
    whole = averaged(layer.weight.detach(), dilation, size, (1,) * dims)
    x = randn(2, 2, *[span + 3 for span in whole.shape[2:]])
    pooled = POOLS["avg"][dims - 1](size, 1)(outputs(layer, x))
    composed = conv(2, 3, *whole.shape[2:], bias=False)
    composed.weight.data = whole
    assert relative(outputs(composed, x), pooled) < 1e-12


# ---- the best there is -----------------------------------------------------------------------------------------------


def moments(features: int, pooled: int, count: int, groups: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows z [g, n, F + P] and y [g, n, o] with G and C of them."""
    z = randn(groups, 200, features + pooled) @ randn(groups, features + pooled, features + pooled, seed=1)
    y = z @ randn(groups, features + pooled, count, seed=2) + randn(groups, 200, count, seed=3)
    return z, y, z.mT @ z / 200, z.mT @ y / 200


def lost(parts: algebra.Parts, z: Tensor, y: Tensor) -> float:
    return float((z @ parts.dense.mT - y).square().sum())


def best_fit(z: Tensor, y: Tensor) -> float:
    return float((z @ torch.linalg.lstsq(z, y).solution - y).square().sum())


def test_pooled_channels_that_say_all_of_the_patches_leave_nothing_to_fail_on() -> None:
    """Inputs so strongly correlated that little but rounding is left of a patch; in one group they are all zero."""
    features, pooled, count = 12, 4, 6
    common = randn(3, 200, 3)
    z = common @ randn(3, 3, features + pooled, seed=1) + 1e-7 * randn(3, 200, features + pooled, seed=3)
    z[1] = 0
    y = z @ randn(3, features + pooled, count, seed=2)
    gram, cross = ((z.mT @ other / 200).float().double() for other in (z, y))
    parts = algebra.Moments(gram, features).parts(cross, 3, "all")
    assert float(parts.dense[1].abs().max()) == 0
    assert lost(parts, z, y) < 1e-6 * float(y.square().sum())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mix", ["none", "pooled"])
def test_outputs_are_shared_out_as_well_as_they_can_be(mix: Any, groups: int) -> None:
    """Against every choice of outputs, and of channels for them."""
    features, pooled, count, width = 6, 3, 4, 2
    z, y, gram, cross = moments(features, pooled, count, groups)
    found = lost(algebra.Moments(gram, features).parts(cross, width, mix), z, y)
    best = 0.0
    for rows, wanted in zip(z, y, strict=True):
        x, p = rows[:, :features], rows[:, features:]
        by_conv = [best_fit(x, wanted[:, [output]]) for output in range(count)]
        tried = []
        for given_away in itertools.combinations(range(count), count - width):
            kept = sum(by_conv[output] for output in range(count) if output not in given_away)
            if mix == "pooled":
                tried.append(kept + sum(best_fit(p, wanted[:, [output]]) for output in given_away))
                continue
            for channels in itertools.permutations(range(pooled), len(given_away)):
                passed = zip(given_away, channels, strict=True)
                tried.append(kept + sum(best_fit(p[:, [channel]], wanted[:, [output]]) for output, channel in passed))
        best += min(tried)
    assert found == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("width", [1, 3])
def test_no_search_finds_a_better_mixture_of_both_branches(width: int) -> None:
    """Reduced-rank regression with regressors that are free, against L-BFGS from random starts."""
    features, pooled, count = 8, 3, 5
    z, y, gram, cross = moments(features, pooled, count)
    found = lost(algebra.Moments(gram, features).parts(cross, width, "all"), z, y)
    best = math.inf
    for seed in range(6):
        free = [
            randn(*shape, seed=seed + 20).requires_grad_() for shape in ((features, width), (width + pooled, count))
        ]
        search = torch.optim.LBFGS(free, max_iter=500, line_search_fn="strong_wolfe")

        def closure(free: Any = free, search: Any = search) -> float:
            search.zero_grad()
            mixed = torch.cat([z[0, :, :features] @ free[0], z[0, :, features:]], 1) @ free[1]
            loss = (mixed - y[0]).square().sum()
            loss.backward()
            return loss.item()

        search.step(closure)
        best = min(best, closure())
    assert found <= best * (1 + 1e-6)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.integers(0, 5), more=st.integers(0, 2), seed=st.integers(0, 999), whole=st.booleans())
def test_an_assignment_costs_the_least(rows: int, more: int, seed: int, whole: bool) -> None:
    cost = randn(rows, rows + more, seed=seed)
    cost = (2 * cost).round() if whole else cost
    columns = assignment(cost).tolist()
    assert len(set(columns)) == rows
    found = sum(float(cost[row, column]) for row, column in enumerate(columns))
    every = itertools.permutations(range(rows + more), rows)
    assert found == pytest.approx(
        min(sum(float(cost[row, column]) for row, column in enumerate(item)) for item in every)
    )


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_assignment_of_costs_that_are_no_numbers_is_refused(wrong: float) -> None:
    cost = randn(3, 4)
    cost[1, 2] = wrong
    with pytest.raises(FitError, match="1 of 12 costs of an assignment are NaN or infinite"):
        assignment(cost)


def test_a_pooled_channel_that_never_varies_passes_nothing_on() -> None:
    """It is the last choice, and the others are shared out as if it were not there."""
    features, pooled, count, width = 6, 3, 4, 2
    z, y, gram, cross = moments(features, pooled, count, 1)
    z[:, :, features + 1] = 0
    gram[:, features + 1], gram[:, :, features + 1], cross[:, features + 1] = 0, 0, 0
    parts = algebra.Moments(gram, features).parts(cross, width, "none")
    assert parts.channels is not None
    assert 1 not in parts.channels
    others = [number for number in range(features + pooled) if number != features + 1]
    left = algebra.Moments(gram[:, others][:, :, others], features).parts(cross[:, others], width, "none")
    assert torch.equal(parts.dense[:, :, others], left.dense)
    forced = algebra.Moments(gram, features).parts(cross, 1, "none")
    assert forced.channels is not None
    assert forced.pooled is not None
    place = forced.channels[0].tolist().index(1)
    assert float(forced.mixed[0, forced.pooled[0, place], 1 + 1]) == 0
    assert lost(forced, z, y) < float(y.square().sum())


def test_the_branches_are_the_least_squares_ones() -> None:
    """Outputs one by one against the normal equations of their patches, or of the pooled channels, with an offset."""
    layer = conv(3, 6, 3, 3, stride=2, padding=1)
    x = images(60, 3, 10, 10)
    made = replacement(layer, x, rank=3, mix="pooled", pool="max")
    site = next(iter(ReduceGrid(rank=3).sites(trace(layer, x))))
    assert isinstance(site, Site)
    wanted = outputs(layer, x)
    made = ReduceGrid(rank=3, mix="pooled", pool="max").rewrite(site.with_pairs(((x, wanted),)))
    found = outputs(nn.Sequential(*made), x)
    p = nn.MaxPool2d(3, 2, 1)(x).movedim(1, -1).flatten(0, -2)
    design = torch.cat([p, torch.ones(len(p), 1, dtype=torch.float64)], 1)
    rows, given = (item.movedim(1, -1).flatten(0, -2) for item in (wanted, found))
    errors = (given - rows).square().sum(0)
    pooled = (errors > 1e-9 * rows.square().sum(0)).nonzero().flatten()
    every = torch.stack([(design @ torch.linalg.lstsq(design, rows[:, [o]]).solution - rows[:, [o]]).square().sum()
                         for o in range(6)])  # fmt: skip
    assert set(pooled.tolist()) == set(every.argsort()[:3].tolist())
    assert float(errors.sum()) <= 1.02 * float(every[pooled].sum())


def test_what_an_activation_hides_is_filled_in_less_often_where_it_takes_seconds() -> None:
    """Two products of all rows with features and outputs each time: 4e11 operations in all, but two to eight times."""
    stats = LayerStats.of(nn.Conv1d(300, 200, 1))
    for rows, times in ((1_000, 8), (200_000, 8), (400_000, 4), (550_000, 3), (10_000_000, 2)):
        stats.rows = rows
        assert steps_for(stats) == times


@pytest.mark.parametrize("high", [math.inf, 0.4])
def test_what_an_activation_hides_is_left_free(high: float) -> None:
    """The error behind the activation, against a search for it on the same branches."""
    last: nn.Module = nn.ReLU() if high == math.inf else nn.Hardtanh(0.0, high)
    model = nn.Sequential(conv(4, 6, 3, 3, padding=1), last, nn.MaxPool2d(2)).eval()
    x = images(80, 4, 10, 10)
    pass_ = ReduceGrid(rank=4, mix="pooled", pool="max", kernel="own")
    (site,) = pass_.sites(trace(model, x))
    assert isinstance(site, Site)
    wanted = outputs(model, x)
    made = nn.Sequential(*pass_.rewrite(site.with_pairs(((x, wanted),))))
    found = float((outputs(made, x) - wanted).square().sum())
    search = torch.optim.LBFGS(made.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss: Tensor = (made(x) - wanted).square().sum()
        loss.backward()
        return loss

    search.step(closure)
    assert found <= 1.04 * float(closure().detach())


# ---- data ------------------------------------------------------------------------------------------------------------


OPTIONS: list[dict[str, Any]] = [
    {"rank": 0.6},
    {"rank": 6, "pool": "max"},
    {"rank": 0.5, "mix": "pooled"},
    {"rank": 0.4, "mix": "all"},
    {"rank": 4, "mix": "all", "pool": "avg", "round_to": 1},
    {"rank": 0.3, "kernel": "own"},
    {"rank": 0.5, "kernel": "whole", "mix": "pooled"},
    {"rank": 2, "pools": True},
]


def networks_of_one_site() -> list[nn.Module]:
    return [
        conv(8, 12, 3, 3, stride=2, padding=1, seed=3),
        nn.Sequential(conv(8, 12, 3, 3, padding=1, bias=False), normed(12), nn.ReLU(), nn.MaxPool2d(2)).eval(),
        nn.Sequential(conv(8, 12, 3, 3, padding=1), nn.AvgPool2d(3, 2, 1, ceil_mode=True)).eval(),
    ]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("mix", MIXES)
def test_data_make_it_much_better_on_inputs_not_seen(which: int, mix: str) -> None:
    model = networks_of_one_site()[which]
    x, unseen = images(120, 8, 10, 10), images(60, 8, 10, 10, seed=50)
    wanted = outputs(model, unseen)
    options = {"mix": mix, "rank": 6, "pool": "max"}
    errors = [relative(outputs(reduced(model, x, data, **options).module, unseen), wanted) for data in (None, x)]
    assert errors[1] < 0.8 * errors[0]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_data_never_lose_to_the_weights(data: st.DataObject) -> None:
    """On correlated inputs that were held out, however few there are to fit to."""
    model = networks_of_one_site()[data.draw(st.integers(0, 2))]
    x = images(data.draw(st.sampled_from([4, 8, 40])), 8, 8, 8, seed=data.draw(st.integers(0, 99)))
    options = data.draw(st.sampled_from(OPTIONS))
    _, held = as_calibration(x, trace(model, x[:2]).inputs).split(seed=0)
    ((unseen,),) = held.batches(len(x))
    found = [relative(outputs(reduced(model, x, part, **options).module, unseen), outputs(model, unseen))
             for part in (None, x)]  # fmt: skip
    assert found[1] <= found[0] * (1 + 1e-9)


def test_a_pooling_that_comes_nearer_is_taken() -> None:
    """An identity with a pooling behind, of which half is to be pooled: that of its own kind gives it exactly."""
    layer = conv(6, 6, 1, 1)
    layer.weight.data = torch.eye(6, dtype=torch.float64)[..., None, None] * torch.arange(1.0, 7.0).view(6, 1, 1, 1)
    x = images(60, 6, 8, 8)
    for kind in ("max", "avg"):
        model = nn.Sequential(layer, POOLS[kind][1](2)).eval()
        for chosen in (None, kind):
            result = reduced(model, x, x, rank=3, pool=chosen)
            assert any(isinstance(inner, POOLS[kind][1]) for inner in result.module.modules())


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("rank", [0.35, 0.7, 1.0])
@pytest.mark.parametrize("which", range(3))
def test_the_share_of_the_cost_is_kept(mix: str, rank: float, which: int) -> None:
    model = networks_of_one_site()[which]
    for rounding in (1, 8):
        site = only_site(reduced(model, randn(4, 8, 12, 12), rank=rank, round_to=rounding, mix=mix))
        if site.outcome == "kept":
            assert site.after.macs <= rank * site.before.macs
        else:
            assert "above rank" in site.reason


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_of_it_trains(options: dict[str, Any]) -> None:
    for model in networks_of_one_site():
        x = images(40, 8, 10, 10)
        module = reduced(model, x, x, **options).module.train()
        module(x).square().mean().backward()
        assert all(float(item.grad.abs().max()) > 0 for item in module.parameters())


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_pooling_by_itself_becomes_both(kind: str, dims: int) -> None:
    """Half of the channels are pooled as they were; means are convolved exactly, and maxima nearly."""
    pool = POOLS[kind][dims - 1](2, 2, 1)
    net = Net(lambda m, x: m.pool(m.pool(x).cos()), pool=pool)
    x = images(40, 6, *[9] * dims)
    result = reduced(net, x, x, pools=True, rank=3)
    sites = result.record.passes[0].sites
    assert [(site.name, site.outcome) for site in sites] == [("pool", "kept"), ("pool_1", "kept")]
    assert all(site.error < (1e-6 if kind == "avg" else 0.5) for site in sites)
    strided = [inner for inner in result.module.modules() if isinstance(inner, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    assert [inner.out_channels for inner in strided if inner.stride[0] == 2] == [3, 3]
    site = next(iter(ReduceGrid(pools=True, rank=3).sites(trace(nn.Sequential(pool), x[:2]))))
    assert isinstance(site, Site)
    once = outputs(nn.Sequential(*ReduceGrid(pools=True, rank=3).rewrite(site)), x)
    same = [channel for channel in range(6) if relative(once[:, channel], outputs(pool, x)[:, channel]) < 1e-12]
    assert len(same) >= 3


def test_poolings_by_themselves_are_left_unless_asked_for() -> None:
    x = randn(2, 4, 9, 9)
    assert skips(nn.MaxPool2d(2), x) == ["no convolution of stride 1 leads to it alone, and it costs nothing by itself"]
    assert skips(nn.MaxPool2d(2), x, pools=True) == []
    assert skips(nn.MaxPool2d(2, 3, 1, ceil_mode=True), x, pools=True) == [
        "its pooling leaves out windows that begin behind the map"
    ]
    assert skips(nn.MaxPool2d(3, 2), randn(2, 1, 9, 9), pools=True) == [
        "one output is nothing to share between two branches"
    ]


def test_what_pads_nothing_or_evenly_stands_alone() -> None:
    for padding in (0, 1):
        branches = replacement(conv(4, 6, 3, 3, stride=2, padding=padding), randn(2, 4, 9, 9), rank=4)[0].branches
        assert isinstance(branches[0], nn.Conv2d)
        assert isinstance(branches[1][0], nn.AvgPool2d)


def test_layers_of_too_many_features_are_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = conv(4, 6, 3, 3, stride=2), randn(2, 4, 9, 9)
    site = next(iter(ReduceGrid(rank=4).sites(trace(layer, x))))
    assert isinstance(site, Site)
    site = site.with_pairs(((x, outputs(layer, x)),))
    for most, count in [(36, 3), (35, 1)]:
        monkeypatch.setattr(reduce_grid, "MOST_FEATURES", most)
        assert len(list(ReduceGrid(rank=4).candidates(site))) == count


# ---- what stays ------------------------------------------------------------------------------------------------------


def skips(model: nn.Module, x: Tensor, **options: Any) -> list[str]:
    found = ReduceGrid(**options).sites(trace(model.eval(), x))
    return [item.reason for item in found if isinstance(item, Skip)]


def test_layers_that_have_no_such_form_are_left_with_a_reason() -> None:
    x = randn(2, 4, 9, 9)
    layer, pool = conv(4, 4, 3, 3), nn.MaxPool2d(2)
    assert skips(layer, x) == []
    assert skips(nn.Sequential(layer, nn.MaxPool2d(2, 1)), x) == []
    assert skips(nn.Sequential(layer, nn.SiLU(), pool), x) == [
        "SiLU stands ahead of its pooling, and only a batch norm and then a ReLU may"
    ]
    assert skips(nn.Sequential(layer, nn.ReLU(), normed(4), pool), x) == [
        "BatchNorm2d stands ahead of its pooling, and only a batch norm and then a ReLU may"
    ]
    assert skips(nn.Sequential(layer, nn.MaxPool2d(2, 3, 1, ceil_mode=True)), x) == [
        "its pooling leaves out windows that begin behind the map"
    ]
    net = Net(lambda m, x: (m.conv(x).relu(), nn.functional.max_pool2d(m.conv(x).relu(), 2)), conv=layer)
    alone = ["no convolution of stride 1 leads to it alone, and it costs nothing by itself"]
    assert skips(net, x) == alone
    assert skips(nn.Sequential(conv(4, 4, 3, 3, stride=2), nn.ReLU(), pool), x, rank=2) == alone
    net = Net(lambda m, x: (y := m.conv(x), m.pool(y)), conv=layer, pool=pool)
    assert skips(net, x) == ["the value of 'conv' is used elsewhere, not only by its pooling"]
    unseen = nn.Sequential(layer, nn.BatchNorm2d(4, track_running_stats=False).double(), pool)
    assert skips(unseen, x) == ["the norm ahead of its pooling keeps no statistics and normalises by the batch"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_inputs_has_nothing_to_save() -> None:
    assert skips(nn.Conv2d(0, 4, 3, stride=2).double(), randn(2, 0, 9, 9), mix="pooled") == [
        "a convolution of 1 channels, the fewest there can be, beside the pooling costs 100% of its MACs, "
        "above rank=0.5"
    ]


def test_strided_layers_that_save_nothing_are_left_with_a_reason() -> None:
    x = randn(2, 4, 9, 9)
    assert skips(conv(4, 4, 3, 3, stride=2, groups=4), x) == [
        "one output a group is nothing to share between two branches"
    ]
    assert skips(conv(4, 1, 3, 3, stride=2), x) == ["one output is nothing to share between two branches"]
    assert skips(conv(4, 16, 3, 3, stride=2), x) == [
        "a convolution of 12 channels, the fewest there can be, beside the pooling costs 76% of its MACs, "
        "above rank=0.5"
    ]
    assert skips(conv(4, 16, 3, 3, stride=2), x, rank=11) == [
        "4 channels can pass, which leaves more than rank=11 outputs"
    ]
    assert skips(conv(4, 16, 3, 3, stride=2), x, rank=12) == []
    assert skips(conv(4, 16, 3, 3, stride=2, groups=2), x, rank=1) == [
        "4 channels can pass, which leaves more than rank=1 outputs"
    ]
    assert skips(conv(4, 4, 1, 1, stride=2), x, mix="pooled") == [
        "a convolution of 1 channels, the fewest there can be, beside the pooling costs 100% of its MACs, "
        "above rank=0.5"
    ]


@pytest.mark.parametrize("mix", MIXES)
def test_fewer_channels_than_groups_are_one_for_each(mix: str) -> None:
    result = reduced(conv(8, 8, 3, 3, stride=2, groups=4), randn(2, 8, 9, 9), None, mix=mix, rank=2)
    strided = next(inner for inner in result.module.modules() if isinstance(inner, nn.Conv2d) and inner.stride[0] == 2)
    assert strided.out_channels == 4


def test_layers_that_share_a_weight_are_left() -> None:
    first, second = (conv(4, 4, 3, 3, stride=2) for _ in range(2))
    second.weight = first.weight
    net = Net(lambda m, x: m.first(x) + m.second(x.flip(2)), first=first, second=second)
    assert skips(net, randn(2, 4, 9, 9)) == [
        "it shares its weight with 'second', which would keep it",
        "it shares its weight with 'first', which would keep it",
    ]


@pytest.mark.parametrize("text", ["mix=none", 'mix="none"', "mix='none'"])
def test_the_mixture_named_none_is_read_with_quotes_and_without(text: str) -> None:
    (read,) = parse_pipeline(f"reduce-grid({text}, pool=none)")
    assert isinstance(read, ReduceGrid)
    assert (read.mix, read.pool) == ("none", None)
    assert format_pipeline([read]) == 'reduce-grid(pool=none, mix="none")'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reduce-grid(energy=0.4)", "energy"),
        ("reduce-grid(pool=median)", "option 'pool' of pass 'reduce-grid' cannot be"),
        ("reduce-grid(mix=some)", "option 'mix' of pass 'reduce-grid' cannot be"),
    ],
)
def test_options_that_there_are_not_are_refused(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        parse_pipeline(text)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_text_with_every_option_means_the_same_pass(options: dict[str, Any]) -> None:
    assert_text_means_the_same(ReduceGrid(**options))


def step(kind: str, *sources: tuple[int, int], **choices: Any) -> Step:
    return Step(kind, tuple((name.replace("_", " "), value) for name, value in choices.items()), sources)


PLANTED = [
    Recipe((step("convolution", stride=2),)),
    Recipe((step("pool", stride=2),)),
    Recipe(
        (step("convolution", stride=1), step("activation", (0, 0), function="relu"), step("pool", (1, 0), stride=2))
    ),
    Recipe((step("convolution", stride=1), step("batch norm", (0, 0)), step("pool", (1, 0), stride=2))),
]


@pytest.mark.parametrize(
    "options",
    [{"rank": 0.9}, {"rank": 2, "pools": True}, {"mix": "pooled", "rank": 0.8}, {"mix": "all", "rank": 0.9}],
    ids=str,
)
def test_the_kit_breaks_none_of_its_promises(options: dict[str, Any]) -> None:
    pass_ = ReduceGrid(min_saving=None, **options)
    summary = check_pass(pass_, examples=14, seed=3, onnx_examples=1, sites=PLANTED)
    assert summary.with_sites >= 5


# ---- in a network ----------------------------------------------------------------------------------------------------


def test_golden_branches() -> None:
    """A quarter of the outputs by the pooling, in their order; what stood between is folded or comes last."""
    model = Net(
        lambda m, x: m.last(m.pool(m.norm(m.conv(x)).relu())),
        conv=conv(3, 4, 3, 3, padding=1),
        norm=normed(4),
        pool=nn.MaxPool2d(3, 2, 1),
        last=conv(4, 4, 1, 1),
    ).eval()
    result = reduced(model, randn(2, 3, 12, 12), rank=2, pool="max", mix="pooled")
    assert printed(result.program) == "\n".join([
        "conv.0.branches.0 = Conv2d 3->2 3x3 /2(x)",
        "pool = MaxPool2d(x)",
        "conv.0.branches.1.1 = Conv2d 3->2 1x1(pool)",
        "cat = cat([conv.0.branches.0, conv.0.branches.1.1], 1)",
        "_0_order = conv.0.order()",
        "index_select = index_select(cat, 1, _0_order)",
        "relu = ReLU(index_select)",
        "last = Conv2d 4->4 1x1(relu)",
        "return last",
    ])  # fmt: skip
    strided = result.module.get_submodule("conv.0.branches.0")
    assert (strided.kernel_size, strided.stride, strided.padding) == ((3, 3), (2, 2), (1, 1))


def test_golden_mixture() -> None:
    model = Net(lambda m, x: m.norm(m.conv(x)).relu(), conv=conv(4, 8, 3, 3, stride=2, padding=1), norm=normed(8))
    result = reduced(model.eval(), randn(2, 4, 12, 12), rank=3, pool="avg", mix="all")
    assert printed(result.program) == "\n".join([
        "conv.0.branches.0 = Conv2d 4->3 3x3 /2(x)",
        "conv.0.branches.1 = AvgPool2d(x)",
        "cat = cat([conv.0.branches.0, conv.0.branches.1], 1)",
        "conv.1 = Conv2d 7->8 1x1(cat)",
        "norm = BatchNorm2d(conv.1)",
        "relu = ReLU(norm)",
        "return relu",
    ])  # fmt: skip
