"""Inputs are drawn, realised and shrunk as the contract says, and rounding is told from error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fxcompile.calibration import as_calibration
from fxcompile.contracts import tolerance
from fxcompile.manager import PassManager
from fxcompile.program import InputSpec
from fxcompile.tracing import trace
from fxcompile.verification import (
    KINDS,
    Broken,
    Case,
    Inputs,
    cases,
    compare,
    compare_noisy,
    draw,
    random_like,
    relative_maximum,
    rounding_reach,
    run_double,
    search,
)

SPEC = InputSpec("x", (2, 3, 4, 5), torch.float32)


def test_an_impulse_is_one_pixel_of_the_first_sample() -> None:
    inputs = Inputs([SPEC], [torch.zeros(2, 3, 4, 5)])
    (first,) = inputs.make(Case("impulse", 3, 0.0))
    assert first.shape == (3, 3, 4, 5)
    assert first[0, 0, 0, 0] == 1
    assert first.count_nonzero() == 1
    (last,) = inputs.make(Case("impulse", 3, 1.0))
    assert last[0, 2, 3, 4] == 1
    assert last.count_nonzero() == 1


def test_kinds_have_their_magnitudes() -> None:
    inputs = Inputs([SPEC], [torch.randn(2, 3, 4, 5)])
    made = {kind: inputs.make(Case(kind, 2, 0.75, seed=1))[0] for kind in KINDS if kind != "calibration"}
    assert torch.equal(made["constant"], torch.full((2, 3, 4, 5), 0.5))
    assert 300 < made["large"].std() / made["normal"].std() < 3000
    assert made["tiny"].abs().max() < 1e-4
    assert made["normal"].std() > 0.5


def test_calibration_samples_are_taken_from_the_data() -> None:
    data = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 3, 4, 5)
    inputs = Inputs([SPEC], [torch.zeros(2, 3, 4, 5)], as_calibration(data, [SPEC]))
    (made,) = inputs.make(Case("calibration", 3, 1.0))
    assert made[:, 0, 0, 0].tolist() == [9, 0, 1]


def test_integer_inputs_stay_in_the_range_of_the_examples() -> None:
    example = torch.tensor([[2, 7, 3]])
    spec = InputSpec("ids", (1, 3), torch.int64)
    inputs = Inputs([spec], [example])
    assert inputs.kinds() == ("normal",)
    (made,) = inputs.make(Case("normal", 50))
    assert made.dtype == torch.int64
    assert made.min() >= 2
    assert made.max() <= 7
    assert random_like(torch.tensor([True, False]), (9,), torch.Generator()).dtype == torch.bool


def test_a_fixed_batch_stays_fixed() -> None:
    spec = InputSpec("x", (2, 3), torch.float32, batch_axis=None)
    assert Inputs([spec], [torch.zeros(2, 3)]).make(Case("normal", 1))[0].shape == (2, 3)


def test_search_shrinks_to_one_sample_and_the_first_corner() -> None:
    def check(case: Case) -> None:
        if case.samples >= 2 or case.kind == "normal":
            raise Broken(f"{case.kind}")

    found = search(check, cases(), 100, seed=0)
    assert found is not None
    assert found[0] == Case("impulse", 2, 0.0, 0)
    assert found[1] == "impulse"
    assert search(lambda case: None, cases(), 20, seed=0) is None


def test_draws_are_the_same_for_one_seed_and_differ_between_seeds() -> None:
    assert draw(cases(), 10, 1) == draw(cases(), 10, 1)
    assert draw(cases(), 10, 1) != draw(cases(), 10, 2)


def test_compare_is_relative_to_the_largest_value() -> None:
    wanted = torch.tensor([1000.0, 1e-3])
    compare(torch.tensor([1000.0, 2e-3]), wanted, 1e-5)
    with pytest.raises(Broken, match=r"differs by 1\.00e-03"):
        compare(torch.tensor([1001.0, 1e-3]), wanted, 1e-5)
    with pytest.raises(Broken, match="shape"):
        compare(torch.zeros(2), torch.zeros(3), 1.0)
    with pytest.raises(Broken, match="1 of 2 elements"):
        compare(torch.tensor([1, 2]), torch.tensor([1, 3]), 1.0)


def test_non_finite_values_must_be_at_the_same_places() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert relative_maximum(nan, nan) == 0
    assert relative_maximum(torch.tensor([1.0, 2.0]), nan) == float("inf")
    assert relative_maximum(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_maximum(torch.ones(2), torch.zeros(2)) == float("inf")


def test_complex_numbers_differ_by_both_of_their_parts() -> None:
    ours, theirs = torch.tensor([3 + 4j, 1.0]), torch.tensor([3 + 3j, 4 + 3j])
    assert relative_maximum(ours, theirs) == pytest.approx(18**0.5 / 5)


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
