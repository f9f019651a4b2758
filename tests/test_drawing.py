"""Inputs are drawn, realised and shrunk as the contract says."""

from __future__ import annotations

import torch

from fxcompile.calibration import as_calibration
from fxcompile.comparing import Broken
from fxcompile.drawing import KINDS, Case, Inputs, cases, draw, random_like, search
from fxcompile.program import InputSpec

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
