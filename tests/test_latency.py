"""Times of layers in ONNX Runtime: the files hold the layers, and ratios come from runs side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import conv, outputs, randn, relative
from torch import nn

from fxcompile import latency
from fxcompile.layers import Reorder
from fxcompile.runtime import session_of


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([conv(4, 6, 3, 5, stride=(2, 1), padding=(1, 0), dilation=(1, 2))], (2, 4, 11, 13)),
        ([conv(4, 6, 2, 3, padding="same"), nn.ReLU(), conv(6, 4, 1, 1, groups=2, bias=False)], (1, 4, 7, 6)),
        ([conv(4, 6, 3, padding=1)], (2, 4, 9)),
        ([conv(2, 3, 3, 1, 2)], (2, 2, 5, 4, 4)),
        ([conv(4, 6, 3, 3), nn.ChannelShuffle(3), conv(6, 4, 1, 1, groups=2)], (2, 4, 7, 6)),
        ([nn.ChannelShuffle(2), conv(4, 2, 3)], (2, 4, 9)),
        ([conv(2, 6, 3, 1, 2), nn.ChannelShuffle(2)], (2, 2, 5, 4, 4)),
        ([conv(4, 6, 3, 3), Reorder(torch.tensor([4, 0, 5, 2, 1, 3]), 1), conv(6, 4, 1, 1)], (2, 4, 7, 6)),
        ([Reorder(torch.tensor([3, 1, 0, 2]), -1), nn.Linear(4, 3).double()], (2, 5, 4)),
        ([nn.Linear(5, 4).double(), nn.Linear(4, 3, bias=False).double()], (2, 7, 5)),
    ],
    ids=str,
)
def test_the_file_computes_what_the_layers_do(layers: list[nn.Module], shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    (found,) = session_of(latency.model_of(layers, shape)).run(None, {"x": x.float().numpy()})
    assert relative(torch.from_numpy(found), outputs(nn.Sequential(*layers), x)) < 1e-6


def test_layers_for_one_sample_compute_the_same_with_a_batch() -> None:
    layers, x = [conv(4, 6, 3, 3), Reorder(torch.tensor([4, 0, 5, 2, 1, 3]), 0), conv(6, 4, 1, 1)], randn(4, 7, 6)
    (found,) = session_of(latency.model_of(layers, (1, 4, 7, 6), added=1)).run(None, {"x": x.float().numpy()[None]})
    assert relative(torch.from_numpy(found)[0], outputs(nn.Sequential(*layers), x)) < 1e-6


class Clock:
    """Time that passes only where something is said to take it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds()

        return run


def test_ratios_are_right_whatever_the_machine_does_beside() -> None:
    """All get three times slower half way, and one has an outlier now and then."""
    clock, calls = Clock(), iter(range(10**6))

    def slowed(seconds: float, outlier: float = 0.0) -> Callable[[], float]:
        return lambda: seconds * (1 if next(calls) < 60 else 3) + (outlier if next(calls) % 7 == 0 else 0.0)

    found = latency.interleaved(
        [clock.taking(slowed(s, o)) for s, o in ((0.01, 0.0), (0.02, 1.0), (0.005, 0.0))], clock
    )
    assert found[1] / found[0] == pytest.approx(2, rel=1e-6)
    assert found[2] / found[0] == pytest.approx(0.5, rel=1e-6)
    assert found[0] * (1 + 1e-9) >= 0.01
    assert found[0] <= 0.03 * (1 + 1e-9)


@pytest.mark.parametrize(("seconds", "rounds"), [(10.0, 7), (1e-6, 50), (0.01, 25)])
def test_there_are_as_many_rounds_as_time_allows(seconds: float, rounds: int) -> None:
    clock, calls = Clock(), [0, 0]

    def counted(index: int) -> Callable[[], float]:
        def run() -> float:
            calls[index] += 1
            return seconds

        return run

    latency.interleaved([clock.taking(counted(index)) for index in (0, 1)], clock)
    assert calls == [2 + rounds, 2 + rounds]


def test_what_has_no_form_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def pretended(runs: list[Callable[[], list[np.ndarray]]]) -> list[float]:
        seen.extend(run()[0].shape for run in runs)
        return [1.0, 2.0]

    monkeypatch.setattr(latency, "interleaved", pretended)
    chains = [[conv(4, 6, 3, 3)], [nn.Tanh(), conv(4, 6, 3, 3)], [conv(4, 2, 1, 1), conv(2, 6, 3, 3)]]
    assert latency.times_of(chains, (2, 4, 8, 8)) == [1.0, None, 2.0]
    assert seen == [(2, 6, 6, 6), (2, 6, 6, 6)]
    assert latency.interleaved is pretended


def test_a_single_sample_gets_a_batch() -> None:
    assert latency.batched((4, 8, 8), 2) == (1, 4, 8, 8)
    assert latency.batched((3, 4, 8, 8), 2) == (3, 4, 8, 8)
    assert latency.batched((5,), 0) == (5,)
