"""Patches, layer statistics and the least-squares step, against oracles made another way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fxcompile import layer_stats
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
from fxcompile.patches import matrix_weight, output_rows, patches, weight_matrix

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small matrices: threads cost more than they bring, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, Tensor]:
    """A float64 convolution of any geometry, and an input that it takes."""
    dims = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    groups = draw(st.integers(1, 3))
    kernel, dilation, stride = each(1, 3), each(1, 2), each(1, 3)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers", "numbers"]))
    if padding == "numbers":
        padding = each(0, 3)
    if padding == "same":
        stride = (1,) * dims
    size = tuple(gap * (k - 1) + 1 + extra for gap, k, extra in zip(dilation, kernel, each(3, 5), strict=True))
    layer = CONVOLUTIONS[dims](
        groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)), kernel, stride, padding, dilation, groups,
        bias=draw(st.booleans()), padding_mode=mode, dtype=torch.float64,
    )  # fmt: skip
    return _randomised(draw, layer, (draw(st.integers(1, 3)), layer.in_channels, *size))


@st.composite
def transposed(draw: st.DrawFn) -> tuple[Any, Tensor]:
    """A float64 transposed convolution of any geometry, and an input."""
    dims = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    groups, stride, dilation = draw(st.integers(1, 3)), each(1, 3), each(1, 2)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    layer = TRANSPOSED[dims](
        groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)), each(1, 3), stride, each(0, 2), extra,
        groups, bias=draw(st.booleans()), dilation=dilation, dtype=torch.float64,
    )  # fmt: skip
    return _randomised(draw, layer, (draw(st.integers(1, 2)), layer.in_channels, *each(5, 6)))


@st.composite
def linears(draw: st.DrawFn) -> tuple[Any, Tensor]:
    """A float64 linear layer, and an input with any leading axes."""
    layer = nn.Linear(draw(st.integers(1, 5)), draw(st.integers(1, 5)), bias=draw(st.booleans()), dtype=torch.float64)
    return _randomised(draw, layer, (*draw(st.lists(st.integers(1, 3), max_size=3)), layer.in_features))


def _randomised(draw: st.DrawFn, layer: Any, shape: tuple[int, ...]) -> tuple[Any, Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer, torch.randn(shape, generator=generator, dtype=torch.float64)


layers = st.one_of(convolutions(), transposed(), linears())


def without_bias(layer: Any, x: Tensor) -> Tensor:
    """The layer's output less its bias, from PyTorch's own forward."""
    with torch.no_grad():
        y: Tensor = layer(x)
        if layer.bias is None:
            return y
        bias: Tensor = layer.bias
        return y - (bias if isinstance(layer, nn.Linear) else bias.view(-1, *[1] * (x.dim() - 2)))


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Largest difference against the largest number wanted."""
    assert got.shape == want.shape
    scale = want.abs().max().item() if want.numel() else 0.0
    return bool((got - want).abs().max() <= tolerance * max(scale, 1e-300)) if want.numel() else True


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def conv_case(groups: int = 1, samples: int = 6) -> tuple[Any, Tensor, Tensor]:
    """A float64 convolution, inputs with a large mean, and wanted outputs that it does not compute."""
    torch.manual_seed(3)
    layer = nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1, groups=groups).double()
    x = noise(samples, 4, 7, 6, seed=1).relu() + 5
    y = functional.conv2d(x, noise(6, 4 // groups, 3, 3, seed=2), None, (2, 1), 1, groups=groups)
    return layer, x, (y + noise(*y.shape, seed=4)).detach()


def direct_rows(layer: Any, x: Tensor) -> numpy.ndarray:
    """Patches [rows, groups, F] by `functional.unfold`, another code path than the module's."""
    columns = functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # [N, C k k, L]
    return columns.transpose(1, 2).reshape(-1, layer.groups, columns.shape[1] // layer.groups).numpy()


# ---- patches


def check_patches(layer: Any, x: Tensor) -> None:
    want = output_rows(layer, without_bias(layer, x)).reshape(-1, weight_matrix(layer).shape[0])
    rows = patches(layer, x)
    matrix = weight_matrix(layer).detach().unflatten(0, (rows.shape[1], -1))
    got = torch.einsum("rgf,gof->rgo", rows, matrix).flatten(1)
    assert close(got, want, 1e-12)


@given(convolutions())
@settings(max_examples=300, deadline=None)
def test_patches_times_weight_is_the_convolution(case: tuple[Any, Tensor]) -> None:
    check_patches(*case)


@given(st.one_of(transposed(), linears()))
@settings(max_examples=150, deadline=None)
def test_patches_times_weight_is_the_transposed_or_linear_layer(case: tuple[Any, Tensor]) -> None:
    check_patches(*case)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", "numbers"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_padding_in_every_dimension(dims: int, padding: str, mode: str) -> None:
    """Even kernels, so that "same" pads more after than before, and different numbers on each axis."""
    sides, stride = (0, 2, 1)[:dims], 1 if padding == "same" else (3, 1, 2)[:dims]
    pad: Any = sides if padding == "numbers" else padding
    layer = CONVOLUTIONS[dims](
        4, 6, (4, 2, 3)[:dims], stride, pad, (1, 3, 2)[:dims], groups=2, padding_mode=mode
    ).double()
    check_patches(layer, noise(2, 4, *(7, 8, 9)[:dims]))


@given(layers)
@quick
def test_features_are_in_the_order_of_the_weight(case: tuple[Any, Tensor]) -> None:
    layer, _ = case
    assert torch.equal(matrix_weight(layer, weight_matrix(layer)), layer.weight)
    if "Transpose" not in type(layer).__name__:
        assert torch.equal(weight_matrix(layer), layer.weight.flatten(1))


def test_unbatched_half_and_integer_inputs_have_patches() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1)
    x = torch.arange(2 * 4 * 4).view(2, 4, 4)
    exact = patches(layer.double(), x.double()[None])
    assert torch.equal(patches(layer, x), exact)
    assert torch.equal(patches(layer, x.half()).double(), exact)


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (nn.BatchNorm2d(3), (2, 3, 4, 4), "BatchNorm2d has no patches"),
        (nn.Conv2d(3, 4, 3), (2, 4, 8, 8), "does not fit 3 channels"),
        (nn.Conv2d(3, 4, 3), (2, 3, 8), "does not fit 3 channels"),
        (nn.Conv2d(3, 4, 3), (2, 3, 2, 8), "smaller than the kernel"),
        (nn.Linear(3, 4), (2, 4), "does not fit 3 input features"),
    ],
)
def test_what_has_no_patches_is_refused(layer: nn.Module, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(FitError, match=words):
        patches(layer, torch.zeros(shape))


# ---- statistics


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows and Gram blocks of a few features, so that small tests walk through all of them."""
    monkeypatch.setattr(layer_stats, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(layer_stats, "BLOCK", 5)


def same_moments(got: LayerStats, want: LayerStats, tolerance: float = 1e-12) -> bool:
    pairs = [*zip(got.centred(), want.centred(), strict=True), (got.mean_in, want.mean_in)]
    pairs.append((got.mean_out, want.mean_out))
    return got.rows == want.rows and all(close(mine, theirs, tolerance) for mine, theirs in pairs)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.usefixtures("small_blocks")
def test_moments_are_those_of_the_rows(groups: int) -> None:
    layer, x, y = conv_case(groups)
    stats = LayerStats.of(layer)
    stats.update(x, y)
    rows, wanted = direct_rows(layer, x), y.movedim(1, -1).reshape(-1, groups, 6 // groups).numpy()
    gram, cross, energy = stats.raw()
    assert close(gram, torch.from_numpy(numpy.einsum("rgf,rgh->gfh", rows, rows)), 1e-13)
    assert close(cross, torch.from_numpy(numpy.einsum("rgf,rgo->gfo", rows, wanted)), 1e-13)
    assert close(energy, torch.from_numpy((wanted**2).sum(0).flatten()), 1e-13)
    rows, wanted = rows - rows.mean(0), wanted - wanted.mean(0)
    gram, cross, energy = stats.centred()
    assert close(gram, torch.from_numpy(numpy.einsum("rgf,rgh->gfh", rows, rows)), 1e-13)
    assert close(cross, torch.from_numpy(numpy.einsum("rgf,rgo->gfo", rows, wanted)), 1e-12)
    assert close(energy, torch.from_numpy((wanted**2).sum(0).flatten()), 1e-13)
    assert torch.equal(gram, gram.mT)
    assert (stats.groups, stats.features, stats.outputs, stats.channels) == (groups, 36 // groups, 6, 4)
    assert stats.rows == len(rows)


@given(layers, st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_chunking_gives_the_same_statistics(
    monkeypatch: pytest.MonkeyPatch, case: tuple[Any, Tensor], data: st.DataObject
) -> None:
    layer, x = case
    if x.dim() == 1:
        x = x[None]
    x = torch.cat([x, 3 - x])
    y = layer(x).detach().square()
    once = LayerStats.of(layer)
    once.update(x, y)
    with monkeypatch.context() as patch:
        patch.setattr(layer_stats, "CHUNK_BYTES", data.draw(st.sampled_from([1000, 10000, 50000])))
        patch.setattr(layer_stats, "BLOCK", data.draw(st.sampled_from([1, 3, 512])))
        streamed, other = LayerStats.of(layer), LayerStats.of(layer)
        cuts = data.draw(st.lists(st.integers(0, len(x)), max_size=3).map(sorted))
        for start, stop in zip([0, *cuts], [*cuts, len(x)], strict=True):
            data.draw(st.sampled_from([streamed, other])).update(x[start:stop], y[start:stop])
        streamed.merge(other)
    assert same_moments(streamed, once)


def test_large_means_cost_no_digits() -> None:
    layer = nn.Linear(3, 2).double()
    x = noise(500, 3)
    plain, shifted = LayerStats.of(layer), LayerStats.of(layer)
    for part in x.split(50):
        plain.update_inputs(part)
        shifted.update_inputs(part + 2.0**20)  # 2^40 would swamp a variance kept about zero
    assert close(shifted.centred().gram, plain.centred().gram, 1e-9)


def test_merging_checks_what_it_merges() -> None:
    layer, x, y = conv_case()
    full, inputs, empty = LayerStats.of(layer), LayerStats.of(layer), LayerStats.of(layer)
    full.update(x, y)
    inputs.update_inputs(x)
    with pytest.raises(FitError, match="do not merge"):
        full.merge(inputs)
    with pytest.raises(FitError, match="different layers"):
        full.merge(LayerStats.of(nn.Linear(3, 2)))
    with pytest.raises(FitError, match="for all or for none"):
        inputs.update(x, y)
    empty.merge(full)
    full.merge(LayerStats.of(layer))
    assert same_moments(empty, full)


@given(st.integers(1, 60), st.integers(0, 100))
@quick
def test_drawn_rows_are_distinct_rows_of_the_batch(count: int, seed: int) -> None:
    layer, x = nn.Linear(1, 1).double(), torch.arange(1.0, 51, dtype=torch.float64).view(50, 1)
    stats = LayerStats.of(layer)
    stats.update(x, 2 * x, max_rows=count, generator=torch.Generator().manual_seed(seed))
    assert stats.rows == min(count, 50)
    gram, cross, energy = (moment.item() for moment in stats.raw())
    assert cross == pytest.approx(2 * gram, rel=1e-12)  # inputs and outputs are drawn together
    assert energy == pytest.approx(4 * gram, rel=1e-12)
    total = stats.mean_in.item() * stats.rows
    low, high = sum(range(1, stats.rows + 1)), sum(range(51 - stats.rows, 51))
    assert low - 1e-6 <= total <= high + 1e-6
    assert total == pytest.approx(round(total), abs=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_drawn_rows_are_deterministic_and_estimate_the_whole() -> None:
    layer, x, y = conv_case(groups=2, samples=200)
    full, some, again, other = (LayerStats.of(layer) for _ in range(4))
    for xs, ys in zip(x.split(50), y.split(50), strict=True):
        full.update(xs, ys)
        some.update(xs, ys, max_rows=250)
        again.update(xs, ys, max_rows=250)
        other.update(xs, ys, max_rows=250, generator=torch.Generator().manual_seed(9))
    assert some.rows == 1000
    assert torch.equal(some.centred().gram, again.centred().gram)
    assert not torch.equal(some.centred().gram, other.centred().gram)
    assert close(some.centred().gram / some.rows, full.centred().gram / full.rows, 0.2)
    one = LayerStats.of(nn.Linear(1, 1))
    for _ in range(20):  # equal batches of one drawn row: not the same row every time
        one.update(torch.arange(50.0).view(50, 1), torch.zeros(50, 1), max_rows=1)
    assert one.centred().gram.item() > 0
    with pytest.raises(UsageError, match="max_rows"):
        some.update(x, y, max_rows=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_selecting_inputs_is_collecting_for_the_narrower_layer(groups: int) -> None:
    layer, x, y = conv_case(groups)
    channels = [2, 0] if groups == 1 else [3, 0]
    stats, narrow = LayerStats.of(layer), LayerStats.of(nn.Conv2d(2, 6, 3, (2, 1), 1, groups=groups))
    stats.update(x, y)
    narrow.update(x[:, channels if groups == 1 else [0, 3]], y)
    selected = stats.select_inputs(channels)
    assert same_moments(selected, narrow)
    assert selected.channels == 2
    with pytest.raises(FitError, match="no more data"):
        selected.update(x, y)


def test_a_group_without_inputs_takes_its_outputs_along() -> None:
    layer = nn.Conv2d(4, 8, 3, groups=4).double()
    x = noise(3, 4, 6, 6)
    y = layer(x).detach()
    stats, narrow = LayerStats.of(layer), LayerStats.of(nn.Conv2d(2, 4, 3, groups=2))
    stats.update(x, y)
    narrow.update(x[:, [1, 3]], y[:, [2, 3, 6, 7]])
    assert same_moments(stats.select_inputs([1, 3]), narrow)


@pytest.mark.parametrize("channels", [[], [0, 0], [4], [-1], [0, 1, 2]])
def test_inputs_that_cannot_be_selected_are_refused(channels: list[int]) -> None:
    with pytest.raises(FitError, match="input channel"):
        LayerStats.of(nn.Conv2d(4, 4, 1, groups=2)).select_inputs(channels)


@given(layers)
@quick
def test_outputs_of_given_weights_need_no_data(case: tuple[Any, Tensor]) -> None:
    layer, x = case
    inputs, full = LayerStats.of(layer), LayerStats.of(layer)
    inputs.update_inputs(x)
    full.update(x, layer(x).detach())
    matrix = weight_matrix(layer)
    derived = inputs.with_outputs_of(matrix, layer.bias)
    want, scale = full.raw(), full.raw().energy.max().item()
    assert close(derived.raw().gram, want.gram, 1e-12)
    assert ((derived.raw().cross - want.cross).abs() <= 1e-11 * max(scale, want.cross.abs().max().item())).all()
    assert ((derived.raw().energy - want.energy).abs() <= 1e-11 * scale).all()
    assert derived.relative_error(matrix, layer.bias) <= 1e-6


@given(layers, st.floats(-7, 1))
@quick
def test_relative_error_is_the_directly_computed_one(case: tuple[Any, Tensor], size: float) -> None:
    layer, x = case
    y = layer(x).detach()
    wanted = y + 10**size * noise(*y.shape)
    direct = ((y - wanted).norm() / wanted.norm()).item()
    stats = LayerStats.of(layer)
    stats.update(x, wanted)
    got = stats.relative_error(weight_matrix(layer), layer.bias)
    assert abs(got - direct) <= (1e-9 if direct > 1e-4 else 3e-7) * max(1, direct)


def test_relative_error_of_silence() -> None:
    stats = LayerStats.of(nn.Linear(2, 2))
    stats.update(torch.ones(3, 2), torch.zeros(3, 2))
    assert stats.relative_error(torch.zeros(2, 2), torch.zeros(2)) == 0
    assert stats.relative_error(torch.ones(2, 2), None) == math.inf


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
    with pytest.raises(FitError, match="as float16"):
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


# ---- size


def test_memory_stays_bounded_for_large_images(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = layer_stats._centred_columns

    def watched(*args: Any) -> tuple[Tensor, Tensor]:
        columns, mean = original(*args)
        sizes.append(columns.numel() * 8)
        return columns, mean

    monkeypatch.setattr(layer_stats, "CHUNK_BYTES", 2**20)
    monkeypatch.setattr(layer_stats, "_centred_columns", watched)
    layer = nn.Conv2d(8, 4, 3, padding=1)
    stats = LayerStats.of(layer)
    stats.update_inputs(torch.zeros(2, 8, 96, 96))  # 5 MB of patches for each image
    assert len(sizes) >= 10
    assert max(sizes) <= 2**20 + 8 * 72
    assert stats.rows == 2 * 96 * 96
