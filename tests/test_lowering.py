"""What a raw graph holds reaches the canonical one under names that do not collide."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from forms import Written, roads
from torch import Tensor

from fxcompile.tracing import trace


def scaled(x: Tensor) -> Tensor:
    return torch.where(x > 0, x * torch.tensor([2.0, 3.0]), torch.tensor(-5.0)) + torch.tensor([7.0, 0.5])


def test_constants_written_in_forward_keep_their_values() -> None:
    x = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    for road, program in roads(Written(scaled), (x,)).items():
        assert torch.equal(program(x), scaled(x)), road


def padded(x: Tensor) -> Tensor:
    amount = 2 if x.shape[-1] > 4 else 1  # symbolic tracing cannot follow this
    y = F.pad(x, (amount, amount), "reflect")
    assert (y[..., amount:-amount] == x).all(), "the middle changed"
    return y * 2


def test_assertions_about_values_are_no_obstacle() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(trace(Written(padded), x)(x), padded(x))
