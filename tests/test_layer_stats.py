"""Layer statistics are the moments of the rows, however they are streamed, merged, narrowed or derived."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from drawn_layers import close, conv_case, direct_rows, layers, noise, quick, same_moments
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompile import layer_stats
from fxcompile.errors import FitError, UsageError
from fxcompile.fitting import LayerStats
from fxcompile.patches import weight_matrix

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows and Gram blocks of a few features, so that small tests walk through all of them."""
    monkeypatch.setattr(layer_stats, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(layer_stats, "BLOCK", 5)


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


@pytest.mark.parametrize("groups", [1, 2])
def test_selecting_numbers_of_each_patch_is_solving_with_the_others_at_zero(groups: int) -> None:
    """The middle row of a kernel: what a layer sees that has nothing else."""
    layer, x, y = conv_case(groups)
    stats, row = LayerStats.of(layer), LayerStats.of(nn.Conv2d(4, 6, (1, 3), (2, 1), (0, 1), groups=groups))
    stats.update(x, y)
    row.update(x, y)
    taps = torch.zeros(4 // groups, 3, 3, dtype=torch.bool)
    taps[:, 1] = True
    selected = stats.select_features(taps.flatten().nonzero())
    assert same_moments(selected, row)


@pytest.mark.parametrize("groups", [1, 2])
def test_squared_errors_are_those_of_each_output(groups: int) -> None:
    layer, x, _ = conv_case(groups)
    y = layer(x).detach()
    wanted = y + torch.arange(6.0).view(1, 6, 1, 1) * noise(*y.shape)
    stats = LayerStats.of(layer)
    stats.update(x, wanted)
    found = stats.squared_errors(weight_matrix(layer), layer.bias)
    assert close(found, (y - wanted).square().sum((0, 2, 3)), 1e-10)


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
