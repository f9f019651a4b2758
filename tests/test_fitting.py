"""The least-squares step and reduced rank, against oracles made another way."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from drawn_layers import close, conv_case, direct_rows, layers, noise, quick, same_moments
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fxcompile.errors import FitError, UsageError
from fxcompile.fitting import (
    LayerStats,
    collect,
    reduced_rank,
    refit,
    refitted,
    row_count,
    solve,
    with_parameters,
)
from fxcompile.patches import weight_matrix

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


# ---- solving


def augmented(rows: numpy.ndarray, wanted: numpy.ndarray, start: numpy.ndarray, ridge: float) -> numpy.ndarray:
    """min |W x - y|² + n a |W - W0|² as one plain least-squares system [X; sqrt(n a) I] Wᵀ = [Y; sqrt(n a) W0ᵀ]."""
    features = rows.shape[1]
    weight = math.sqrt(ridge * (rows**2).sum() / features)
    left = numpy.concatenate([rows, weight * numpy.eye(features)])
    right = numpy.concatenate([wanted, weight * start.T])
    return numpy.asarray(numpy.linalg.lstsq(left, right)[0]).T


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("samples", [1, 6])
def test_solution_is_that_of_the_augmented_system(ridge: float, with_bias: bool, groups: int, samples: int) -> None:
    layer, x, y = conv_case(groups, samples)
    stats = LayerStats.of(layer)
    stats.update(x, y)
    weight, bias = solve(stats, layer.weight, layer.bias if with_bias else None, ridge)
    rows, wanted = direct_rows(layer, x), y.movedim(1, -1).reshape(-1, groups, 6 // groups).numpy()
    start = layer.weight.detach().flatten(1).unflatten(0, (groups, -1)).numpy()
    for group in range(groups):
        xs, ys = rows[:, group], wanted[:, group]
        centre = (xs.mean(0), ys.mean(0)) if with_bias else (0, 0)
        want = augmented(xs - centre[0], ys - centre[1], start[group], ridge)
        part = slice(group * 6 // groups, (group + 1) * 6 // groups)
        assert close(weight.flatten(1)[part], torch.from_numpy(want), 1e-9)
        if with_bias:
            assert bias is not None
            assert close(bias[part], torch.from_numpy(ys.mean(0) - want @ xs.mean(0)), 1e-9)
    assert (bias is None) == (not with_bias)
    assert weight.shape == layer.weight.shape
    assert weight.dtype == torch.float64


@given(layers)
@settings(max_examples=60, deadline=None)
def test_planted_weights_are_recovered(case: tuple[Any, Tensor]) -> None:
    layer, x = case
    x = noise(60, *x.shape[1:] if x.dim() > 1 else x.shape)
    stats = LayerStats.of(layer)
    stats.update(x, layer(x).detach(), max_rows=1500)
    planted = weight_matrix(layer).detach()
    values = torch.linalg.eigvalsh(stats.centred().gram)
    if values.min() <= 1e-3 * values.max():
        return  # padding or stride may hide taps; those stay where they were
    weight, bias = solve(stats, noise(*planted.shape, seed=1), torch.zeros(stats.outputs), 1e-11)
    assert close(weight, planted, 1e-7)
    if layer.bias is not None:
        assert bias is not None
        assert close(bias, layer.bias.detach(), 1e-6)


@given(st.integers(0, 1000), st.sampled_from([1e-300, 1e-16, 1e-12, 1e-6, 1e-2, 1.0, 1e6]), st.integers(0, 4))
@settings(max_examples=80, deadline=None)
def test_rank_deficient_data_never_fits_worse_than_the_original(seed: int, ridge: float, kind: int) -> None:
    layer = nn.Conv2d(4, 5, 3, padding=1).double()
    x = noise(1 if kind == 0 else 4, 4, 3, 3, seed=seed)
    if kind == 1:
        x[:, 1] = 0  # dead
    elif kind == 2:
        x[:, 2] = x[:, 0]  # duplicate
    elif kind == 3:
        x = x * 0 + 7  # constant: only borders vary
    elif kind == 4:
        x = x * torch.tensor([1e6, 1.0, 1e-6, 0.0]).view(1, 4, 1, 1)
    y = noise(len(x), 5, 3, 3, seed=seed + 1)
    stats = LayerStats.of(layer)
    stats.update(x, y)
    weight, bias = solve(stats, layer.weight, layer.bias, ridge)
    candidates = ((layer.weight, layer.bias), (weight, bias))
    errors = [(functional.conv2d(x, w, b, padding=1) - y).norm().item() for w, b in candidates]
    assert weight.isfinite().all()
    assert errors[1] <= errors[0] * (1 + 1e-9)
    if kind == 1:
        assert torch.equal(weight[:, 1], layer.weight[:, 1])  # nothing is known of it: it stays


def test_duplicate_channels_share_the_change() -> None:
    layer, x, y = conv_case()
    x[:, 2] = x[:, 0]
    stats = LayerStats.of(layer)
    stats.update(x, y)
    weight, _ = solve(stats, layer.weight, layer.bias, 1e-15)
    change = weight - layer.weight.detach()
    assert close(change[:, 2], change[:, 0], 1e-6)


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_few_samples_help_on_inputs_that_were_not_seen(samples: int) -> None:
    layer = nn.Conv2d(16, 8, 3, padding=1).double()
    x = functional.avg_pool2d(noise(40, 16, 20, 20), 5, 1).relu() + 0.1 * noise(40, 16, 16, 16, seed=1)
    x = torch.einsum("nchw,cd->ndhw", x, noise(16, 16, seed=2))
    y = layer(x).detach()
    damaged = with_parameters(layer, layer.weight * (noise(8, 16, 1, 1, seed=3) > -0.5), layer.bias)
    fitted = refit(damaged, [(x[:samples], y[:samples])])
    before, after = ((module(x[20:]) - y[20:]).norm() for module in (damaged, fitted))
    assert after < before


def test_one_row_moves_the_bias_only() -> None:
    layer = nn.Linear(5, 3)
    x, y = noise(1, 5, dtype=torch.float32), noise(1, 3, seed=1, dtype=torch.float32)
    fitted = refit(layer, [(x, y)])
    assert torch.equal(fitted.weight, layer.weight)
    assert close(fitted(x), y, 1e-6)


def test_rounding_noise_is_not_fitted() -> None:
    x = 0.1 + 1e-8 * noise(64, 5, dtype=torch.float32)
    assert x.std() > 0
    layer, y = nn.Linear(5, 3), noise(64, 3, seed=1, dtype=torch.float32)
    assert torch.equal(refit(layer, [(x, y)]).weight, layer.weight)  # 1e7 when it is taken for a signal
    x[:, 2:] += noise(64, 3, seed=2, dtype=torch.float32)
    fitted = refit(layer, [(x, y)])
    assert torch.equal(fitted.weight[:, :2], layer.weight[:, :2])
    assert not torch.equal(fitted.weight[:, 2:], layer.weight[:, 2:])


def test_a_constant_feature_serves_where_there_is_no_bias() -> None:
    layer = nn.Linear(2, 1, bias=False).double()
    x = torch.cat([torch.full((50, 1), 3.0).double(), noise(50, 1)], 1)
    fitted = refit(layer, [(x, 6 + x[:, 1:])], 1e-10)
    assert close(fitted.weight, torch.tensor([[2.0, 1.0]]).double(), 1e-8)


def test_no_regularisation_is_refused() -> None:
    stats = LayerStats.of(nn.Linear(2, 2))
    stats.update(torch.ones(3, 2), torch.ones(3, 2))
    for ridge in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="ridge"):
            solve(stats, torch.ones(2, 2), None, ridge)


def test_a_bias_can_be_added_or_left_out() -> None:
    layer, x, y = conv_case()
    stats = LayerStats.of(layer)
    stats.update(x, y)
    _, added = solve(stats, layer.weight, None, with_bias=True)
    weight, left = solve(stats, layer.weight, layer.bias, with_bias=False)
    assert left is None
    assert added is not None
    residual = (functional.conv2d(x, weight, None, (2, 1), 1) - y).norm() / y.norm()
    assert stats.relative_error(weight, None) == pytest.approx(residual.item(), abs=1e-9)


def test_the_fitted_mean_output_is_the_wanted_one() -> None:
    layer, x, y = conv_case(groups=2)
    fitted = refit(layer, [(x, y)], ridge=3.0)
    assert close(fitted(x).mean((0, 2, 3)).detach(), y.mean((0, 2, 3)), 1e-12)


# ---- re-fitting layers


@given(layers)
@quick
def test_refitting_to_what_a_layer_computes_changes_nothing(case: tuple[Any, Tensor]) -> None:
    layer, x = case
    fitted = refit(layer, [(x, layer(x).detach())])
    assert type(fitted) is type(layer)
    assert fitted is not layer
    assert (fitted.bias is None) == (layer.bias is None)
    assert close(fitted(x), layer(x), 1e-9)
    assert close(fitted.weight, layer.weight, 1e-6)


@given(layers)
@quick
def test_refitting_repairs_every_kind_of_layer(case: tuple[Any, Tensor]) -> None:
    layer, x = case
    y = layer(x).detach()
    damaged = with_parameters(layer, 0.7 * weight_matrix(layer), layer.bias)
    before, after = ((module(x) - y).norm() for module in (damaged, refit(damaged, [(x, y)])))
    assert after <= before * (1 + 1e-9)


def test_refitting_leaves_the_old_layer_and_its_settings_alone() -> None:
    layer = nn.Conv2d(2, 3, 3, bias=False).eval().requires_grad_(False)
    old = layer.weight.clone()
    fitted = refit(layer, [(noise(4, 2, 6, 6).float(), noise(4, 3, 4, 4).float())])
    assert torch.equal(layer.weight, old)
    assert not torch.equal(fitted.weight, old)
    assert (fitted.weight.dtype, fitted.weight.requires_grad, fitted.training) == (torch.float32, False, False)
    assert fitted.bias is None
    assert fitted.weight.is_contiguous()


def test_float32_layers_are_solved_in_float64() -> None:
    layer, x, y = conv_case()
    x, y = x.float() + 1000, y.float()
    narrow: Any = nn.Conv2d(4, 6, 3, (2, 1), 1)
    wide = with_parameters(layer, narrow.weight.double(), narrow.bias.double())
    got, want = refit(narrow, [(x, y)], 1e-8), refit(wide, [(x.double(), y.double())], 1e-8)
    assert got.weight.dtype == torch.float32
    assert close(got.weight.double(), want.weight, 2e-7)


def test_equal_data_gives_equal_bits() -> None:
    layer, x, y = conv_case(groups=2)
    one, two = (refit(layer, zip(x.split(2), y.split(2), strict=True)) for _ in range(2))
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.bias, two.bias)


def test_no_more_rows_are_read_than_a_fit_needs() -> None:
    """10 for each of 36 features and 8,192 more, a like share from each batch, of 20,000; all where there are fewer."""
    layer = nn.Conv2d(4, 3, 3, padding=1).double()
    x = noise(50, 4, 20, 20)
    y = layer(x).detach() + noise(50, 3, 20, 20, seed=1)
    pairs = [(x[:10], y[:10]), (x[10:], y[10:])]
    rows = sum(row_count(layer, wanted) for _, wanted in pairs)
    assert rows == 20_000
    some, again, everything = collect(layer, pairs, rows), collect(layer, pairs, rows), collect(layer, pairs)
    assert some.rows == math.ceil(8552 / 5) + math.ceil(8552 * 4 / 5)
    assert everything.rows == collect(layer, pairs[:1], 4000).rows * 5 == rows
    assert torch.equal(some.centred().gram, again.centred().gram)
    assert close(some.raw().gram / some.rows, everything.raw().gram / rows, 0.1)
    best, near = (refitted(layer, stats) for stats in (everything, some))
    assert everything.relative_error(near.weight, near.bias) < 1.01 * everything.relative_error(best.weight, best.bias)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["inputs", "wanted outputs", "weights"])
def test_what_is_not_finite_is_named(where: str, value: float) -> None:
    layer, x, y = conv_case()
    {"inputs": x, "wanted outputs": y, "weights": layer.weight.data}[where].flatten()[3] = value
    with pytest.raises(FitError, match=f"1 of .* {where} are NaN or infinite"):
        refit(layer, [(x, y)])


def test_sums_that_overflow_are_refused() -> None:
    with pytest.raises(FitError, match="sums of squared inputs"):
        refit(nn.Linear(2, 2).double(), [(1e200 * noise(5, 2), noise(5, 2))])
    with pytest.raises(FitError, match="numbers that float16 cannot hold"):
        refit(nn.Linear(2, 2).half(), [(noise(50, 2), 1e6 * noise(50, 2))])


def test_refused_data_leaves_the_statistics_as_they_were() -> None:
    layer, x, y = conv_case()
    stats, want = LayerStats.of(layer), LayerStats.of(layer)
    stats.update(x, y)
    want.update(x, y)
    with pytest.raises(FitError):
        stats.update(x, y * math.nan)
    assert same_moments(stats, want, 0)


def test_nothing_to_fit_to_is_refused() -> None:
    layer, x, y = conv_case()
    for pairs in ([], [(x[:0], y[:0])]):
        with pytest.raises(FitError, match="no samples"):
            refit(layer, pairs)
    stats = LayerStats.of(layer)
    stats.update_inputs(x)
    with pytest.raises(FitError, match="no wanted outputs"):
        solve(stats, layer.weight, layer.bias)


def test_shapes_that_do_not_fit_are_refused() -> None:
    layer, x, y = conv_case()
    with pytest.raises(FitError, match="do not fit inputs"):
        refit(layer, [(x, y[:, :, 1:])])
    stats = LayerStats.of(layer)
    stats.update(x, y)
    with pytest.raises(FitError, match="does not fit 36 features"):
        solve(stats, layer.weight[:, 1:], layer.bias)
    with pytest.raises(FitError, match="does not fit 6 wanted outputs"):
        stats.relative_error(layer.weight[1:], None)


# ---- reduced rank


@given(st.integers(1, 2), st.integers(1, 3), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_reduced_rank_is_the_global_optimum(groups: int, rank: int, seed: int) -> None:
    layer, x, _ = conv_case(groups)
    weight = noise(6, 4 // groups, 3, 3, seed=seed)
    stats = LayerStats.of(layer)
    stats.update_inputs(x)
    inner, outer, bias = reduced_rank(stats, weight, layer.bias, rank)
    assert (inner.shape, outer.shape) == ((groups * rank, 36 // groups), (6, rank))
    y = functional.conv2d(x, weight, layer.bias, (2, 1), 1, groups=groups).detach()
    middle = functional.conv2d(x, inner.view(-1, 4 // groups, 3, 3), None, (2, 1), 1, groups=groups)
    got = functional.conv2d(middle, outer[:, :, None, None], bias, groups=groups)
    flat = (y - y.mean((0, 2, 3), keepdim=True)).movedim(1, 0).reshape(groups, 6 // groups, -1)
    tail = torch.linalg.svdvals(flat)[:, rank:].square().sum().sqrt()  # Eckart and Young, on the outputs themselves
    assert (got - y).norm().item() == pytest.approx(tail.item(), rel=1e-6, abs=1e-9)


def test_full_rank_is_exact_and_wrong_ranks_are_refused() -> None:
    layer, x, _ = conv_case()
    stats = LayerStats.of(layer)
    with pytest.raises(FitError, match="no samples"):
        reduced_rank(stats, layer.weight, layer.bias, 2)
    stats.update_inputs(x)
    inner, outer, bias = reduced_rank(stats, layer.weight, None, 6)
    assert close(outer @ inner, layer.weight.detach().flatten(1), 1e-12)
    assert bias.abs().max() < 1e-12
    first = reduced_rank(stats, layer.weight, None, 1)[1]
    assert close((outer[:, :1].T @ first).abs(), torch.ones(1, 1).double(), 1e-9)  # largest first
    for rank in (0, 7):
        with pytest.raises(UsageError, match="rank"):
            reduced_rank(stats, layer.weight, layer.bias, rank)
