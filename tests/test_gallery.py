"""The kit finds every wrong pass of the gallery, shrinks what it found to a file, and leaves the right ones alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from gallery import RIGHT, WRONG

from fxcompile.rewriting import Pass
from fxcompile.testing import PassFailure, Recipe, check_pass


def planted(kind: type[Pass]) -> Sequence[Recipe]:
    """What the author of a pass says of its sites, where they are too rare to be learnt."""
    found: Sequence[Recipe] = getattr(kind, "planted", ())
    return found


def test_the_gallery_holds_forty_wrong_passes_and_the_right_one_of_each_kind() -> None:
    assert len(WRONG) >= 40
    for kind in WRONG:
        assert kind.__doc__
        assert any(issubclass(kind, right) for right in RIGHT)


@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_a_right_pass_is_left_alone(kind: type[Pass]) -> None:
    """On as many networks as the profile says: --hypothesis-profile=deep draws 10,000."""
    summary = check_pass(kind(), seed=1, onnx_examples=1, sites=planted(kind))
    assert summary.with_sites >= (3 if planted(kind) else 7)
    assert summary.invalid <= 0.05 * summary.networks


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_a_wrong_pass_is_found(kind: type[Pass]) -> None:
    with pytest.raises(PassFailure) as failure:
        check_pass(kind(), examples=2000, seed=1, onnx_examples=0, sites=planted(kind))
    assert failure.value.network is None or len(failure.value.network.steps) <= 8
