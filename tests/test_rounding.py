"""Rounding is told from error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fxcompile.comparing import Broken, relative_maximum
from fxcompile.contracts import tolerance
from fxcompile.manager import PassManager
from fxcompile.rounding import compare_noisy, rounding_reach, run_double
from fxcompile.tracing import trace


def test_double_run_equals_the_module_in_double() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 4 * 6, 5)
    ).eval()
    x = torch.randn(2, 3, 6, 8)
    program = trace(model, x)
    (given,) = run_double(program, (x,))
    assert given.dtype == torch.float64
    wanted = model.double()(x.double())
    assert relative_maximum(given, wanted) < 1e-15


def test_amplified_rounding_passes_and_a_real_error_does_not() -> None:
    """An instance norm of a nearly constant map blows rounding up; a wrong eps is far beyond that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, eps=1e-12)).eval()
    x = torch.full((1, 3, 6, 6), 100.0) + 1e-3 * torch.randn(1, 3, 6, 6)
    program = trace(model, x)
    own, exact = program.outputs(x), run_double(program, (x,))
    (reach,) = rounding_reach(program, (x,), exact)
    assert reach > 10 * tolerance(torch.float32)
    seen = compare_noisy([exact[0].float()], own, program, (x,))
    assert seen.error == 0
    assert seen.amplified == pytest.approx(relative_maximum(exact[0], own[0]), rel=1e-3)
    assert seen.amplified > tolerance(torch.float32)
    with pytest.raises(Broken, match="rounding reaches"):
        compare_noisy([exact[0].float() * 1.5], own, program, (x,))
    within = compare_noisy([own[0] * (1 + 2e-6)], own, program, (x,))
    assert within.amplified == 0
    assert within.error == pytest.approx(2e-6, rel=0.1)


def test_amplified_rounding_is_written_into_the_report(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4, eps=1e-12)
    )
    with torch.no_grad():
        model[2].weight.mul_(1e-5)
    nearly_flat = torch.full((2, 3, 6, 6), 100.0) + 1e-3 * torch.randn(2, 3, 6, 6)
    manager = PassManager("fold-batchnorm", calibration=nearly_flat)
    result = manager.run(trace(model.eval(), nearly_flat[:1]))
    result.save_onnx(tmp_path / "flat.onnx")
    assert result.record.amplified > tolerance(torch.float32)
    assert "rounding alone, amplified by the network, moves an output by" in result.record.text()


def squeezed(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 1), activation, nn.Conv2d(3, 2, 1, bias=False)).eval()


def test_a_sigmoid_that_is_zero_far_out_is_rounding_and_a_scale_is_not() -> None:
    """ONNX Runtime's sigmoid of -30 is 0, torch's 9e-14: right to a share of 1. On the way on it is no excuse."""
    torch.manual_seed(0)
    model = squeezed(nn.Sigmoid())
    far, near = torch.full((1, 2, 3, 3), -1.0), torch.randn(1, 2, 3, 3)
    with torch.no_grad():
        model[0].weight.fill_(15.0)  # type: ignore[union-attr]
    program = trace(model, near)
    own = program.outputs(far)
    assert 0 < own[0].abs().max() < 1e-12
    compare_noisy([torch.zeros_like(own[0])], own, program, (far,))
    with pytest.raises(Broken, match="rounding reaches"):
        compare_noisy([own[0] + 1e-5], own, program, (far,))
    (clear,) = program.outputs(near)
    with pytest.raises(Broken, match="rounding reaches"):
        compare_noisy([clear * (1 + 5e-5)], (clear,), program, (near,))


@pytest.mark.parametrize(("activation", "place"), [(nn.SiLU(), -20.0), (nn.GELU(), -5.0)])
def test_tails_of_gates_are_right_to_a_share_of_their_input(activation: nn.Module, place: float) -> None:
    program = trace(nn.Sequential(activation), torch.randn(1, 64))
    x = torch.full((1, 64), place)
    exact = run_double(program, (x,))
    (reach,) = rounding_reach(program, (x,), exact)
    largest, epsilon = float(exact[0].abs().max()), torch.finfo(torch.float32).eps
    assert largest < 1e-5
    assert 0.9 * epsilon * -place < reach * largest <= epsilon * -place + 1e-6 * largest


def test_other_layers_have_no_floor() -> None:
    program = trace(nn.Sequential(nn.Tanh()), torch.randn(1, 4))
    x = torch.full((1, 4), 1e-20)
    (reach,) = rounding_reach(program, (x,), run_double(program, (x,)))
    assert reach <= 1e-6 * (1 + 1e-6)


def test_what_lies_below_the_normal_numbers_is_not_told_from_zero() -> None:
    """Mish of -100 is -3.7e-42 in float32, of two digits; ONNX Runtime's are others."""
    program = trace(nn.Sequential(nn.Mish()), torch.randn(1, 4))
    x = torch.full((1, 4), -100.0)
    own = program.outputs(x)
    assert 0 < float(own[0].abs().max()) < torch.finfo(torch.float32).tiny
    compare_noisy([own[0] * 0.9], own, program, (x,))
    near = program.outputs(x + 20)
    with pytest.raises(Broken, match="rounding reaches"):
        compare_noisy([near[0] * 0.9], near, program, (x + 20,))


def test_products_that_cancel_keep_the_rounding_of_what_cancels() -> None:
    """The sum is a thousandth of its terms: each kernel adds them in its own order."""
    torch.manual_seed(0)
    for layer, x in ((nn.Linear(64, 1, bias=False), torch.randn(1, 64)), (nn.Conv1d(8, 1, 8), torch.randn(1, 8, 8))):
        with torch.no_grad():
            row, values = layer.weight.flatten().double(), x.flatten().double()
            if layer.bias is not None:
                layer.bias.zero_()
            values += (1e-3 * row.norm() * values.norm() / 8 - row @ values) * row / (row @ row)
            x.copy_(values.reshape(x.shape))
        program = trace(layer.eval(), torch.randn(x.shape))
        own, (exact,) = program.outputs(x), run_double(program, (x,))
        typical = float(layer.weight.detach().norm()) * float(x.norm()) / 8
        assert float(exact.abs().max()) == pytest.approx(1e-3 * typical, rel=0.2)
        epsilon = torch.finfo(torch.float32).eps
        compare_noisy([(exact + epsilon * typical).float()], own, program, (x,))
        with pytest.raises(Broken, match="rounding reaches"):
            compare_noisy([(exact + 40 * epsilon * typical).float()], own, program, (x,))


def test_who_is_within_the_tolerance_of_float64_is_right_whatever_the_other_one_is() -> None:
    program = trace(nn.Sequential(nn.Tanh()), torch.randn(1, 4))
    x = torch.randn(1, 4)
    exact = run_double(program, (x,))[0].float()
    compare_noisy([exact], (exact * (1 + 5e-5),), program, (x,))
    with pytest.raises(Broken, match="rounding reaches"):
        compare_noisy([exact * (1 + 5e-5)], (exact,), program, (x,))
