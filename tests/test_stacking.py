"""The mathematics of stack-kernels, against dense convolutions, dense least squares and autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from fxcompile.passes import _stack_fitting as fitting
from fxcompile.passes import _stack_refining as refining
from fxcompile.passes._relus import relu_shift, with_relus
from fxcompile.passes._stacking import (
    amplification,
    compose,
    corner_stack,
    exact_width,
    refine,
    stack,
    stack_macs,
    stage_kernels,
    stage_maps,
    widths_for,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompile.errors import FitError

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
KERNELS = [(5,), (7,), (5, 5), (7, 7), (5, 7), (7, 3), (5, 3), (1, 5), (5, 5, 5), (5, 3, 1)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def smooth(outputs: int, inputs: int, size: int, seed: int = 0) -> Tensor:
    """Kernels as training makes them: smooth in space, with a decaying spectrum between channels."""
    at = torch.arange(size, dtype=torch.float64) - size // 2
    blur = torch.exp(-((at[:, None] - at) ** 2) / 2)
    weight = torch.einsum("oiab,xa,yb->oixy", randn(outputs, inputs, size, size, seed=seed), blur, blur)
    mixes = [torch.linalg.qr(randn(n, n, seed=seed + n))[0] * torch.arange(1, n + 1) ** -0.5 for n in (outputs, inputs)]
    weight = torch.einsum("oixy,po,qi->pqxy", weight, *mixes)
    return weight / weight.std() + 0.05 * randn(outputs, inputs, size, size, seed=seed + 1)


def random_stages(
    kernels: Sequence[Sequence[int]], channels: Sequence[int], groups: int = 1, seed: int = 0
) -> list[Tensor]:
    """Stages with `channels` channels a group between them."""
    return [
        randn(groups * o, i, *k, seed=seed + n)
        for n, (k, i, o) in enumerate(zip(kernels, channels, channels[1:], strict=False))
    ]


def error_of(weight: Tensor, stages: Sequence[Tensor], groups: int = 1) -> float:
    return float((weight - naive_compose(stages, groups)).norm() / weight.norm())


def naive_compose(stages: Sequence[Tensor], groups: int = 1) -> Tensor:
    """Tap by tap, from the definition."""
    dense = stages[0]
    for stage in stages[1:]:
        parts = []
        for a, b in zip(dense.chunk(groups), stage.chunk(groups), strict=True):
            full = [m + n - 1 for m, n in zip(a.shape[2:], b.shape[2:], strict=True)]
            part = torch.zeros(len(b), a.shape[1], *full, dtype=torch.float64)
            for u in product(*map(range, b.shape[2:])):
                place = tuple(slice(start, start + n) for start, n in zip(u, a.shape[2:], strict=True))
                part[(slice(None), slice(None), *place)] += torch.einsum("om,mc...->oc...", b[(..., *u)], a)
            parts.append(part)
        dense = torch.cat(parts)
    return dense


def layers_for(
    stages: Sequence[Tensor], stride: int, padding: Sequence[int], dilation: int, groups: int, mode: str
) -> nn.Sequential:
    """The chain as layers: all padding on the first, the stride on the last, the dilation on all."""
    dims, made = len(padding), []
    for index, weight in enumerate(stages):
        first, last = index == 0, index == len(stages) - 1
        layer = CONVOLUTIONS[dims](
            weight.shape[1] * groups, len(weight), tuple(weight.shape[2:]), stride if last else 1,
            tuple(padding) if first else 0, dilation, groups, bias=False, padding_mode=mode if first else "zeros",
        )  # fmt: skip
        layer.weight = nn.Parameter(weight, requires_grad=False)
        made.append(layer)
    return nn.Sequential(*made)


# ---- chains ----------------------------------------------------------------------------------------------------------


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Tensor], Tensor, int, list[int], int, int, str]:
    kernel = draw(st.sampled_from(KERNELS))
    dims, groups = len(kernel), draw(st.integers(1, 2))
    dilation, stride = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    kernels = stage_kernels(kernel)
    channels = [draw(st.integers(1, 3)) for _ in range(len(kernels) + 1)]
    size, padding = [], []
    for k in kernel:
        reach = dilation * (k - 1)
        n = draw(st.integers(3, 9))
        most = {"zeros": reach, "replicate": reach, "circular": n, "reflect": n - 1}[mode]
        least = max(0, (reach + 2 - n) // 2)
        p = draw(st.integers(min(least, most), min(most, max(least, reach // 2 + 1))))
        size.append(max(n, reach + 1 - 2 * p))
        padding.append(p)
    seed = draw(st.integers(0, 1000))
    stages = random_stages(kernels, channels, groups, seed)
    x = randn(2, groups * channels[0], *size, seed=seed + 99)
    return stages, x, stride, padding, dilation, groups, mode if dims < 3 or mode != "reflect" else "zeros"


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chains())
def test_the_chain_equals_its_dense_kernel_at_every_pixel(
    case: tuple[list[Tensor], Tensor, int, list[int], int, int, str],
) -> None:
    stages, x, stride, padding, dilation, groups, mode = case
    dense = compose(stages, groups)
    wanted = layers_for([dense], stride, padding, dilation, groups, mode)(x)
    found = layers_for(stages, stride, padding, dilation, groups, mode)(x)
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


def test_sharing_out_the_padding_is_wrong_at_the_border_only() -> None:
    stages, x = random_stages([(3, 3)] * 2, [2, 3, 2]), randn(1, 2, 14, 14, seed=5)
    wanted = F.conv2d(x, compose(stages), padding=2)
    wrong = F.conv2d(F.conv2d(x, stages[0], padding=1), stages[1], padding=1)
    assert float((wrong - wanted).norm() / wanted.norm()) > 0.05
    assert float((wrong - wanted)[:, :, 1:-1, 1:-1].abs().max()) < 1e-12 * float(wanted.abs().max())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("groups", [1, 3])
def test_compose_follows_the_definition(kernel: tuple[int, ...], groups: int) -> None:
    kernels = stage_kernels(kernel)
    stages = random_stages(kernels, [2, *[3] * (len(kernels) - 1), 2], groups)
    dense = compose([x.float() for x in stages], groups)
    assert dense.dtype == torch.float64
    assert dense.shape == (2 * groups, 2, *kernel)
    torch.testing.assert_close(compose(stages, groups), naive_compose(stages, groups), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("outputs", "inputs", "groups"), [(3, 2, 1), (2, 3, 1), (1, 1, 4), (2, 1, 3), (2, 2, 2)])
def test_the_corner_stack_is_exact_to_the_bit(kernel: tuple[int, ...], outputs: int, inputs: int, groups: int) -> None:
    weight = randn(outputs * groups, inputs, *kernel)
    stages = corner_stack(weight, groups)
    assert [tuple(x.shape[2:]) for x in stages] == stage_kernels(kernel)
    assert torch.equal(compose(stages, groups), weight)
    assert amplification(stages, groups) == pytest.approx(1, abs=1e-12)


def test_the_corner_stack_of_a_square_kernel_has_four_copies() -> None:
    assert corner_stack(randn(8, 3, 5, 5))[0].shape == (12, 3, 3, 3)
    assert corner_stack(randn(3, 8, 5, 5))[0].shape == (12, 8, 3, 3)


def test_stage_kernels_add_up() -> None:
    assert stage_kernels((5, 7)) == [(3, 3), (3, 3), (1, 3)]
    assert stage_kernels((5, 1)) == [(3, 1), (3, 1)]
    for kernel in KERNELS:
        sums = [1 + sum(k - 1 for k in axis) for axis in zip(*stage_kernels(kernel), strict=True)]
        assert tuple(sums) == kernel
    for bad in [(4, 4), (5, 4), (3, 3)]:
        with pytest.raises(ValueError, match="odd"):
            stage_kernels(bad)


def test_amplification_is_the_growth_of_relative_noise() -> None:
    weight = smooth(8, 2, 5)
    stages = stack(weight, [5], limit=math.inf)
    noise = torch.Generator().manual_seed(0)
    changes = []
    for _ in range(200):
        noisy = [x * (1 + 1e-6 * torch.randn(x.shape, generator=noise, dtype=torch.float64)) for x in stages]
        changes.append(float((compose(noisy) - compose(stages)).square().sum()))
    grown = math.sqrt(sum(changes) / 200) / (1e-6 * math.sqrt(2) * float(compose(stages).norm()))
    assert amplification(stages) == pytest.approx(grown, rel=0.15)


# ---- widths ----------------------------------------------------------------------------------------------------------


def test_exact_width_of_equal_channels_is_the_parameter_count() -> None:
    for channels in (4, 16, 64, 256):
        assert exact_width((channels, channels, 5, 5)) == [math.ceil((9 - math.sqrt(56)) * channels)]
        assert exact_width((channels, channels, 5)) == [channels]
    assert exact_width((960, 1, 5, 5), groups=960) == [2 * 960]
    assert exact_width((64, 3, 7, 7)) == [exact_width((64, 3, 7, 7))[0]] * 2


@pytest.mark.parametrize("shape", [(3, 3, 5, 5), (2, 2, 5), (5, 2, 5, 5), (2, 2, 7, 7), (1, 1, 7, 7), (2, 2, 5, 3)])
def test_at_exact_width_every_direction_of_the_weight_can_be_reached(shape: tuple[int, ...]) -> None:
    """The derivative of compose has full rank there, and one channel less leaves directions out."""

    def reached(width: int) -> int:
        kernels = stage_kernels(shape[2:])
        stages = random_stages(kernels, [shape[1], *[width] * (len(kernels) - 1), shape[0]])
        rows = []
        for at, stage in enumerate(stages):
            for index in range(stage.numel()):
                unit = torch.zeros(stage.numel(), dtype=torch.float64)
                unit[index] = 1
                rows.append(naive_compose([*stages[:at], unit.reshape(stage.shape), *stages[at + 1 :]]).flatten())
        return int(np.linalg.matrix_rank(torch.stack(rows).numpy(), tol=1e-9))

    width = exact_width(shape)[0]
    assert reached(width) == math.prod(shape)
    assert width == 1 or reached(width - 1) < math.prod(shape) or width == min(shape[:2])


@pytest.mark.parametrize("shape", [(16, 16, 5, 5), (64, 16, 5, 5), (9, 30, 5, 5), (32, 32, 7, 7), (24, 24, 9, 9)])
def test_a_weight_without_structure_has_no_exact_stack_that_saves(shape: tuple[int, ...]) -> None:
    """Even on a map so large that its border does not count: the parameters fall short by the gauge, M^2."""
    kernel, large = shape[2:], (10**6, 10**6)
    dense = math.prod(shape) * math.prod(large)
    assert stack_macs(shape, exact_width(shape), large, large) > dense
    even = widths_for(shape, large, large, 1.0)
    assert stack_macs(shape, even, large, large) <= dense
    kernels, channels = stage_kernels(kernel), [shape[1], *even, shape[0]]
    parts = zip(kernels, channels, channels[1:], strict=False)
    parameters = sum(math.prod(k) * i * o for k, i, o in parts)
    assert parameters - sum(m * m for m in even) < math.prod(shape)


@settings(max_examples=150, deadline=None)
@given(
    kernel=st.sampled_from(KERNELS[:8]),
    channels=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    groups=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    size=st.integers(14, 30),
    same=st.booleans(),
    rank=st.floats(0.1, 2),
)
def test_widths_spend_the_share_of_the_macs_that_was_asked_for(
    kernel: tuple[int, ...], channels: tuple[int, int], groups: int, stride: int, dilation: int, size: int, same: bool,
    rank: float,
) -> None:  # fmt: skip
    inputs, outputs = channels
    weight = torch.zeros(outputs * groups, inputs, *kernel)
    padding = [dilation * (k - 1) // 2 if same else 0 for k in kernel]
    dilations = [dilation] * len(kernel)

    def run(stages: Sequence[Tensor]) -> tuple[int, list[tuple[int, ...]]]:
        x, macs, maps = torch.zeros(1, inputs * groups, *[size] * len(kernel)), 0, []
        for layer in layers_for(stages, stride, padding, dilation, groups, "zeros"):
            x = layer(x)
            macs += x.numel() * layer.weight[0].numel()
            maps.append(tuple(x.shape[2:]))
        return macs, maps

    def of_width(width: int) -> list[Tensor]:
        kernels = stage_kernels(kernel)
        ends = [inputs, *[width // groups] * (len(kernels) - 1), outputs]
        pairs = zip(kernels, ends, ends[1:], strict=False)
        return [torch.zeros(groups * o, i, *k) for k, i, o in pairs]

    dense, (out_size,) = run([weight])
    sizes = ([size + 2 * p for p in padding], out_size)
    widths = widths_for(weight.shape, *sizes, rank, groups, dilations)
    assert len(set(widths)) == 1
    assert widths[0] % groups == 0
    assert stack_macs(weight.shape, widths, *sizes, groups, dilations) == run(of_width(widths[0]))[0]
    assert stage_maps(kernel, *sizes, dilations) == run(of_width(widths[0]))[1]
    assert widths[0] == groups or run(of_width(widths[0]))[0] <= rank * dense * (1 + 1e-9)
    assert run(of_width(widths[0] + groups))[0] > rank * dense * (1 - 1e-9)


def test_widths_given_as_channels() -> None:
    assert widths_for((64, 32, 5, 5), (20, 20), (16, 16), 48) == [48]
    assert widths_for((64, 8, 7, 7), (22, 22), (16, 16), 50, groups=4) == [48, 48]
    assert widths_for((64, 1, 5, 5), (20, 20), (16, 16), 1, groups=64) == [64]


def test_widths_agree_with_the_measured_layers() -> None:
    """methods.md, section 1: conv2 32 -> 64 at 16 x 16, M = 32 costs .59 of the layer with its border."""
    assert widths_for((64, 32, 5, 5), (20, 20), (16, 16), 0.59) == [32]
    assert widths_for((128, 64, 5, 5), (12, 12), (8, 8), 0.645) == [64]


# ---- ReLU between ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_a_relu_above_the_calibrated_minimum_changes_nothing(mode: str) -> None:
    groups, x = 2, randn(4, 4, 9, 10, seed=7)
    stages = random_stages(stage_kernels((7, 5)), [2, 3, 4, 2], groups)
    linear = layers_for(stages, 2, (3, 2), 1, groups, mode)
    wanted, value, correction = linear(x), x, torch.zeros(len(stages[0]), dtype=torch.float64)
    for at, layer in enumerate(linear):
        value = layer(value) + correction.reshape(1, -1, 1, 1)
        if at < len(stages) - 1:
            shift, correction = relu_shift(value.amin((0, 2, 3)), stages[at + 1], groups)
            value = F.relu(value + shift.reshape(1, -1, 1, 1))
    assert float((value - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


def test_the_lift_above_zero_is_a_quarter_of_the_range() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3).double(), nn.Conv2d(5, 2, 1).double()]
    data = [randn(4, 3, 6, 6, seed=seed) for seed in (0, 1)]
    plain, wanted = torch.cat([layers[0](x) for x in data]), [layers[1](layers[0](x)) for x in data]
    spread = plain.amax((0, 2, 3)) - plain.amin((0, 2, 3))
    first, _, second = with_relus(layers, data)
    lifted = torch.cat([first(x) for x in data])
    torch.testing.assert_close(lifted.amin((0, 2, 3)), 0.25 * spread)
    for x, y in zip(data, wanted, strict=True):
        torch.testing.assert_close(second(first(x)), y)


# ---- fitting to the weight -------------------------------------------------------------------------------------------


PLANTED = [
    *[(kernel, (3, 1, 4), groups) for kernel in KERNELS for groups in (1, 5)],
    *[(kernel, (3, 2, 4), groups) for kernel in KERNELS if max(kernel) == 5 for groups in (1, 3)],
    ((5, 5), (32, 30, 32), 1),
    ((5, 5), (16, 8, 16), 4),
    ((7, 7), (24, 8, 24), 1),
]


@pytest.mark.parametrize(("kernel", "ends", "groups"), PLANTED)
def test_planted_factors_are_found(kernel: tuple[int, ...], ends: tuple[int, int, int], groups: int) -> None:
    kernels, (inputs, width, outputs) = stage_kernels(kernel), ends
    channels = [inputs, *[width] * (len(kernels) - 1), outputs]
    weight = compose(random_stages(kernels, channels, groups, seed=3), groups)
    stages = stack(weight, [width * groups] * (len(kernels) - 1), groups)
    shapes = [(groups * o, i, *k) for k, i, o in zip(kernels, channels, channels[1:], strict=False)]
    assert [tuple(x.shape) for x in stages] == shapes
    assert error_of(weight, stages, groups) < 1e-6


@pytest.mark.parametrize("shape", [(4, 4, 5, 5), (8, 2, 5, 5), (2, 8, 5, 5), (3, 3, 5), (2, 2, 5, 5, 5), (2, 2, 7, 7)])
def test_a_channel_above_exact_width_is_exact(shape: tuple[int, ...]) -> None:
    weight = randn(*shape)
    assert error_of(weight, stack(weight, [m + 1 for m in exact_width(shape)])) < 1e-6


def dense_solution(weight: Tensor, first: Tensor) -> Tensor:
    """The last stage by numpy's least squares on an explicit design matrix: another way than normal equations."""
    kernel = [n - k + 1 for n, k in zip(weight.shape[2:], first.shape[2:], strict=True)]
    size = len(first) * math.prod(kernel)
    units = torch.eye(size, dtype=torch.float64).reshape(size, len(first), *kernel)
    design = naive_compose([first, units]).flatten(1)
    return torch.from_numpy(np.linalg.lstsq(design.T.numpy(), weight.flatten(1).T.numpy(), rcond=None)[0].T)


@pytest.mark.parametrize("shape", [(5, 3, 5, 5), (3, 5, 5, 5), (4, 3, 5), (3, 2, 5, 3), (2, 2, 5, 5, 5)])
def test_a_half_step_is_the_dense_least_squares_solution(shape: tuple[int, ...]) -> None:
    weight, (_, last_kernel) = randn(*shape), stage_kernels(shape[2:])
    first = randn(4, shape[1], *stage_kernels(shape[2:])[0], seed=1)
    stages = [first[None], torch.zeros(1, shape[0], 4, *last_kernel, dtype=torch.float64)]
    grid = weight.shape[2:]
    wanted = fitting.spectrum(weight[None], grid)
    for _ in range(3):  # the proximal term goes with the second pass
        stages[1] = fitting._solve(wanted, stages, 1, grid, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(stages[1][0].flatten(1), dense_solution(weight, first), rtol=1e-8, atol=1e-8)


def test_the_leading_vectors_of_a_large_matrix_are_found_from_a_sketch() -> None:
    """Matrices of known singular values and vectors, too large to be decomposed whole."""
    left, right = (torch.linalg.qr(randn(2, 1100, 20, seed=seed))[0] for seed in (1, 2))
    values = 0.5 ** torch.arange(20, dtype=torch.float64)
    found = fitting._leading(left * values @ right.mT, 4, torch.Generator().manual_seed(0))
    assert found.shape == (2, 4, 1100)
    wanted = (right[:, :, :4] * values[:4]).mT
    assert torch.allclose(found * (found * wanted).sum(2, keepdim=True).sign(), wanted, rtol=0, atol=1e-12)


def test_a_matrix_that_rounding_made_indefinite_is_solved_with_more_on_its_diagonal() -> None:
    normal = torch.diag_embed(torch.tensor([[1.0, 2.0, -1e-9], [3.0, 1.0, 0.5]], dtype=torch.float64))
    x = fitting._positive_solve(normal.clone(), torch.ones(2, 3, 1, dtype=torch.float64), torch.zeros(2).double())
    assert torch.allclose(x[0, :2, 0], torch.tensor([1.0, 0.5]).double(), rtol=1e-6)
    assert torch.allclose(x[1, :, 0], torch.tensor([1 / 3, 1.0, 2.0]).double(), rtol=1e-6)
    assert 1e6 < float(x[0, 2, 0]) < math.inf


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_system_that_holds_no_numbers_is_refused(wrong: float) -> None:
    normal = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    normal[1, 0, 2] = normal[1, 2, 0] = wrong
    with pytest.raises(FitError, match="2 of 18 products of kernels are NaN or infinite"):
        fitting._positive_solve(normal, torch.ones(2, 3, 1, dtype=torch.float64), torch.zeros(2).double())


def test_steps_towards_an_inner_stage_are_those_of_conjugate_gradients() -> None:
    """Each lowers the objective; as many as converge leave nothing over, on systems of scales far apart."""
    grid, ridge = (7, 7), torch.tensor([1e-6, 1e-3], dtype=torch.float64)
    left, right = (
        1e-2 * fitting.spectrum(randn(2, *shape, 3, 3, seed=at), grid) for at, shape in ((1, (6, 3)), (2, (4, 6)))
    )
    outer, inner = left.mH @ left, right @ right.mH
    gradient = 1e-3 * randn(2, 3, 4, 3, 3, seed=3)

    def image(x: Tensor) -> Tensor:
        whole = fitting.taps(outer @ fitting.spectrum(x, grid) @ inner, grid)[..., :3, :3]
        return whole + ridge.view(-1, 1, 1, 1, 1) * x

    def objective(x: Tensor) -> Tensor:
        return (x * (image(x) / 2 - gradient)).flatten(1).sum(1)

    lowest = torch.zeros(2, dtype=torch.float64)
    for steps in range(1, 12):
        reached = objective(fitting._gradient_steps(outer, inner, gradient, torch.Size(grid), ridge, steps))
        assert bool((reached < lowest).all())
        lowest = reached
    left_over = gradient - image(fitting._gradient_steps(outer, inner, gradient, torch.Size(grid), ridge, 60))
    assert float(left_over.norm() / gradient.norm()) < 1e-9


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_has_no_factor(value: float) -> None:
    gram = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    gram[1, 2, 2] = value
    with pytest.raises(FitError, match="1 of 18 second moments are NaN or infinite"):
        refining.cholesky_factor(gram, 1e-10)


@pytest.mark.parametrize("damping", [1e-10, 1e-2])
def test_the_factor_is_that_of_the_damped_matrix(damping: float) -> None:
    """Of full rank, of less, and of all zeros, where there is no scale and the factor is the identity."""
    rows = randn(3, 4, 6)
    rows[1, :, 2:], rows[2] = 0, 0
    gram = rows @ rows.mT
    factor = refining.cholesky_factor(gram, damping)
    level = torch.cat([damping * gram[:2].diagonal(dim1=1, dim2=2).mean(1), torch.ones(1).double()])
    wanted = gram + torch.diag_embed(level[:, None].expand(3, 4))
    torch.testing.assert_close(factor @ factor.mT, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_no_solve_raises_the_objective(ridge: float) -> None:
    weight = randn(3, 4, 2, 7, 7)
    kernels = stage_kernels((7, 7))
    stages = [randn(3, o, i, *k, seed=n) for n, (k, i, o) in enumerate(zip(kernels, [2, 3, 4], [3, 4, 4], strict=True))]
    weights = torch.full((3,), ridge, dtype=torch.float64)
    wanted, reached = fitting.spectrum(weight, weight.shape[3:]), fitting._error(weight, stages, weights)
    first = reached
    for at in [2, 1, 0, 1, 2] * 5:
        stages[at] = fitting._solve(wanted, stages, at, weight.shape[3:], weights)
        error = fitting._error(weight, stages, weights)
        assert bool((error <= reached * (1 + 1e-10)).all())
        reached = error
    assert bool((reached < 0.5 * first).all())
    sizes = sum(stage.flatten(1).square().sum(1) for stage in stages)
    torch.testing.assert_close(reached - fitting._error(weight, stages), ridge * sizes)


def gradient_of(weight: Tensor, stages: Sequence[Tensor]) -> float:
    """Norm of the gradient of |W - chain|^2 / |W|^2, per unit of relative change of the stages, by autograd."""
    free = [x.clone().requires_grad_() for x in stages]
    ((weight - naive_compose(free)).square().sum() / weight.square().sum()).backward()
    return math.sqrt(sum(float((x.grad * x.detach().norm()).square().sum()) for x in free if x.grad is not None))


def test_the_fit_is_a_stationary_point() -> None:
    weight = randn(4, 3, 5, 5)
    assert gradient_of(weight, stack(weight, [3], limit=math.inf)) < 5e-3
    assert gradient_of(weight, random_stages([(3, 3)] * 2, [3, 3, 4])) > 0.1


def brute_force(weight: Tensor, width: int, seed: int, gram: Tensor | None = None) -> float:
    """The error that L-BFGS on all stages reaches from a random start; of the outputs, if their data are given."""
    free = [x.requires_grad_() for x in random_stages([(3, 3)] * 2, [weight.shape[1], width, len(weight)], seed=seed)]
    search = torch.optim.LBFGS(free, max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        error = (weight - naive_compose(free)).flatten(1)
        loss = size(error) / size(weight.flatten(1))
        loss.backward()
        return loss

    def size(rows: Tensor) -> Tensor:
        return rows.square().sum() if gram is None else ((rows @ gram) * rows).sum()

    search.step(closure)
    return math.sqrt(closure().item())


@pytest.mark.parametrize("seed", range(3))
def test_random_searches_find_nothing_much_better(seed: int) -> None:
    weight = randn(3, 3, 5, 5, seed=seed)
    found = error_of(weight, stack(weight, [2]))
    assert found <= 1.02 * min(brute_force(weight, 2, seed=10 * seed + n) for n in range(3))


@pytest.mark.parametrize("width", [2, 4, 6])
def test_the_error_is_above_the_rank_bound_and_on_it_where_it_is_tight(width: int) -> None:
    """At each frequency the chain has rank M at most: no kernels, of any size, do better (Eckart-Young, Parseval)."""
    weight = smooth(12, 8, 5)
    values = np.linalg.svd(np.fft.fft2(weight.numpy()).transpose(2, 3, 0, 1), compute_uv=False)
    bound = math.sqrt((values[:, :, width:] ** 2).sum() / (values**2).sum())
    found = error_of(weight, stack(weight, [width]))
    assert bound <= found
    pattern = compose([randn(1, 1, 3, 3, seed=s) for s in (8, 9)])
    thin = weight[:, :, 2:3, 2:3] * pattern  # a single spatial pattern, and one that 3 x 3 twice can make
    values = np.linalg.svd(thin[:, :, 0, 0].numpy(), compute_uv=False)
    bound = math.sqrt((values[width:] ** 2).sum() / (values**2).sum())
    assert error_of(thin, stack(thin, [width])) == pytest.approx(bound, rel=1e-3)


def test_errors_are_no_worse_than_those_of_plain_alternation() -> None:
    """methods.md, section 1, random kernels 32 -> 64: .750, .506 and .276."""
    weight = randn(64, 32, 5, 5)
    errors = [error_of(weight, stack(weight, [m], sweeps=40)) for m in (16, 32, 48)]
    assert [round(e, 2) for e in errors] <= [0.75, 0.51, 0.28]
    assert errors == sorted(errors, reverse=True)


def test_cancelling_factors_are_held_back() -> None:
    weight = smooth(8, 2, 5)
    free, held = stack(weight, [3], limit=math.inf), stack(weight, [3], limit=2.0)
    assert amplification(held) < min(2.2, amplification(free))
    assert error_of(weight, held) < 1.5 * error_of(weight, free)


@pytest.mark.parametrize(("outputs", "inputs", "width"), [(8, 2, 3), (8, 8, 6), (16, 16, 12)])
def test_cancelling_factors_are_held_back_no_more_than_they_must(outputs: int, inputs: int, width: int) -> None:
    """Those that may grow to the limit come nearer than those that stay far below."""
    stages = stack(smooth(outputs, inputs, 5), [width], limit=1.5)
    assert amplification(stages) == pytest.approx(1.5, rel=0.05)


def test_depthwise_layers_are_as_good_together_as_one_by_one() -> None:
    weight = randn(960, 1, 5, 5)
    stages = stack(weight, [960], 960)
    errors = (weight - compose(stages, 960)).flatten(1).norm(dim=1) / weight.flatten(1).norm(dim=1)
    assert 0.25 < float(errors.mean()) < 0.36
    alone = [error_of(weight[at : at + 1], stack(weight[at : at + 1], [1])) for at in range(20)]
    assert abs(float(errors[:20].mean()) - sum(alone) / 20) < 0.02
    twice = stack(weight[:100], [200], 100)
    exact = (weight[:100] - compose(twice, 100)).flatten(1).norm(dim=1)
    assert float(exact.median()) < 1e-6


def test_groups_are_fitted_apart() -> None:
    """Whatever their scale: one is tiny, one is all zero."""
    weight = torch.cat([smooth(26, 20, 5), 1e-9 * randn(26, 20, 5, 5), torch.zeros(26, 20, 5, 5, dtype=torch.float64)])
    stages = stack(weight, [15], 3)
    alone = [error_of(weight[at : at + 26], stack(weight[at : at + 26], [5])) for at in (0, 26)]
    found = (weight - compose(stages, 3)).unflatten(0, (3, -1)).flatten(1).norm(dim=1)
    norms = weight.unflatten(0, (3, -1)).flatten(1).norm(dim=1)
    torch.testing.assert_close(found[:2] / norms[:2], torch.tensor(alone, dtype=torch.float64), rtol=1e-6, atol=0)
    assert float(found[2]) == 0


def test_the_same_weight_gives_the_same_stages() -> None:
    weight = smooth(6, 4, 7).float()
    state = torch.get_rng_state()
    first, again = stack(weight, [5, 5]), stack(weight, [5, 5])
    wide = randn(2, 2, 5, 5)  # 20 channels: more than it has windows
    seeded = [stack(wide, [20], generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(*seeded, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert {x.dtype for x in first} == {torch.float64}


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_does_not_matter(scale: float) -> None:
    weight = smooth(6, 4, 5)
    assert error_of(scale * weight, stack(scale * weight, [4])) == pytest.approx(
        error_of(weight, stack(weight, [4])), rel=1e-6
    )


def test_by_default_there_is_one_group_and_no_rounding() -> None:
    stages = [randn(3, 3, 3, 3), randn(3, 3, 3, 3)]
    assert amplification(stages) == amplification(stages, 1)
    assert torch.equal(compose(stages), compose(stages, 1))
    assert widths_for((9, 9, 5, 5), (12, 12), (8, 8), 5) == [5]
    assert exact_width((5, 5, 5, 5)) == exact_width((5, 5, 5, 5), 1)
    macs = stack_macs((5, 5, 5, 5), [3], (12, 12), (8, 8))
    assert macs == 9 * 3 * 5 * (10 * 10 + 8 * 8)
    assert isinstance(macs, int)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="1 widths that are multiples of 2"):
        stack(randn(4, 2, 5, 5), [3], groups=2)
    with pytest.raises(ValueError, match="2 widths"):
        stack(randn(4, 2, 7, 7), [3])
    with pytest.raises(FitError, match="infinite"):
        stack(randn(4, 2, 5, 5) * math.nan, [3])
    with pytest.raises(FitError, match="infinite"):
        refine(corner_stack(randn(2, 2, 5, 5)), randn(2, 2, 5, 5), torch.full((50, 50), math.nan))


# ---- fitting to data -------------------------------------------------------------------------------------------------


def images(count: int, channels: int, size: int, seed: int) -> Tensor:
    """Smooth images whose channels are alike."""
    plain = F.avg_pool2d(randn(count, 6, size + 4, size + 4, seed=seed), 5, 1)
    return F.relu(F.conv2d(plain, randn(channels, 6, 3, 3, seed=77), padding=1)) + 0.01 * randn(
        count, channels, size, size, seed=seed + 1
    )


def patches(x: Tensor, kernel: Sequence[int], groups: int = 1) -> Tensor:
    """[g, rows, F]."""
    unfolded = F.unfold(x, tuple(kernel), padding=tuple(k // 2 for k in kernel))
    return unfolded.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def output_error(weight: Tensor, stages: Sequence[Tensor], x: Tensor, groups: int = 1) -> float:
    """Relative error of what the layer puts out, by running it."""
    padding = [k // 2 for k in weight.shape[2:]]
    wanted = F.conv2d(x, weight, padding=padding, groups=groups)
    found = layers_for(stages, 1, padding, 1, groups, "zeros")(x)
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("shape", "widths", "groups"),
    [
        ((12, 6, 5, 5), [6], 1),
        ((8, 3, 7, 7), [5, 5], 1),
        ((8, 3, 5, 5), [6], 2),
        ((6, 1, 5, 5), [6], 6),
        ((6, 4, 5, 3), [4], 1),
    ],
)
def test_refining_lowers_the_error_of_the_outputs(shape: tuple[int, ...], widths: list[int], groups: int) -> None:
    weight = smooth(shape[0], shape[1], max(shape[2:]))[:, :, : shape[2], : shape[3]]
    seen, unseen = (images(24, shape[1] * groups, 10, seed) for seed in (1, 2))
    rows = patches(seen, shape[2:], groups)
    start = stack(weight, widths, groups)
    refined = refine(start, weight, rows.mT @ rows / rows.shape[1], groups)
    assert [x.shape for x in refined] == [x.shape for x in start]
    assert output_error(weight, refined, seen, groups) < 0.9 * output_error(weight, start, seen, groups)
    assert output_error(weight, refined, unseen, groups) < 0.9 * output_error(weight, start, unseen, groups)


def quadratic(weight: Tensor, stages: Sequence[Tensor], gram: Tensor, groups: int = 1) -> Tensor:
    error = (weight - naive_compose(stages, groups)).unflatten(0, (groups, -1)).flatten(2)
    return torch.einsum("gof,gfh,goh->g", error, gram, error)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 3, 400]),
    groups=st.integers(1, 2),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
    ridge=st.sampled_from([0.0, 1e-2, 10.0]),
    seed=st.integers(0, 100),
)
def test_refining_never_makes_a_group_worse(rows: int, groups: int, scale: float, ridge: float, seed: int) -> None:
    weight = randn(3 * groups, 2, 5, 5, seed=seed)
    data = scale * randn(groups, max(rows, 1), 50, seed=seed + 1) * (rows > 0)
    gram = data.mT @ data
    start = random_stages([(3, 3)] * 2, [2, 2, 3], groups, seed=seed + 2)
    refined = refine(start, weight, gram, groups, ridge=ridge, steps=8)
    level = gram.diagonal(dim1=1, dim2=2).mean(1)
    held = gram + torch.diag_embed(torch.where(level > 0, ridge * level, 1.0)[:, None].expand(groups, 50))
    before, after = quadratic(weight, start, held, groups), quadratic(weight, refined, held, groups)
    assert bool((after <= before * (1 + 1e-9)).all())
    assert all(bool(x.isfinite().all()) for x in refined)


def test_refining_beats_the_exact_last_stage_and_plain_lbfgs() -> None:
    weight, x = smooth(12, 6, 5), images(30, 6, 10, 3)
    rows = patches(x, (5, 5))[0]
    gram = rows.T @ rows / len(rows)
    start = stack(weight, [6])
    units = torch.eye(54, dtype=torch.float64).reshape(54, 6, 3, 3)
    design = naive_compose([start[0], units]).flatten(1) @ rows.T
    last = np.linalg.lstsq(design.T.numpy(), (weight.flatten(1) @ rows.T).T.numpy(), rcond=None)[0]
    solved = [start[0], torch.from_numpy(last.T.copy()).reshape(start[1].shape)]
    refined = refine(start, weight, gram, ridge=1e-6)
    free = [s.clone().requires_grad_() for s in start]
    search = torch.optim.LBFGS(free, max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = quadratic(weight, free, gram[None]).sum()
        loss.backward()
        return loss

    search.step(closure)
    errors = [output_error(weight, [s.detach() for s in stages], x) for stages in (refined, solved, free)]
    assert errors[0] < 0.95 * errors[1]
    assert errors[0] < 0.95 * errors[2]


@pytest.mark.parametrize("seed", [1, 2])
def test_refining_goes_on_where_little_error_is_left(seed: int) -> None:
    """Down to a weight that is a stack, of which it starts a tenth off, and not only until a step brings 1e-9."""
    exact = random_stages([(3, 3)] * 2, [8, 6, 16], seed=seed)
    weight, rows = compose(exact), patches(images(24, 8, 10, 1), (5, 5))
    gram = rows.mT @ rows / rows.shape[1]
    found = refine([x + 0.1 * randn(*x.shape, seed=9) for x in exact], weight, gram)
    nothing = [torch.zeros_like(x) for x in exact]
    assert float(quadratic(weight, found, gram)) < 5e-5**2 * float(quadratic(weight, nothing, gram))


def test_a_large_ridge_keeps_the_stack_near_the_weight() -> None:
    weight, rows = smooth(6, 4, 5), patches(images(2, 4, 8, 1), (5, 5))
    start = stack(weight, [4])
    gram = rows.mT @ rows
    errors = [error_of(weight, refine(start, weight, gram, ridge=ridge)) for ridge in (1e-4, 1e-1, 1e2)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] <= 1.001 * error_of(weight, start)


def test_refining_is_repeatable() -> None:
    weight, rows = smooth(6, 4, 5), patches(images(4, 4, 8, 1), (5, 5))
    start = stack(weight, [4])
    first, again = (refine(start, weight.float(), rows.mT @ rows) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
