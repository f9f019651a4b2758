"""Zeros of a weight that stay zero in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

MARK = "fxcompile_keeps_zeros"
"""Attribute of a layer whose weight's zeros are to stay."""

SPARSE = "fxcompile_sparse"
"""Attribute of a layer that is to be run by a sparse product in Python."""


class Mask(nn.Module):
    """The parametrization of a weight some of which stay zero.

    Args:
        stays: of the weight's shape, which may be other than zero.
    """

    stays: Tensor

    def __init__(self, stays: Tensor) -> None:
        super().__init__()
        self.register_buffer("stays", stays)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its zeros; no gradient goes into them."""
        return torch.where(self.stays, weight, 0.0)  # a product would give zeros with a sign


def keeping_zeros(layer: Any) -> nn.Module:
    """The layer, marked: where a program becomes a module to be trained, its zeros get a mask."""
    setattr(layer, MARK, True)
    marked: nn.Module = layer
    return marked


def keeps_zeros(layer: nn.Module) -> bool:
    """Whether a layer is marked, or has such a mask already."""
    return bool(getattr(layer, MARK, False)) or (
        parametrize.is_parametrized(layer, "weight")
        and any(isinstance(item, Mask) for item in layer.parametrizations.weight)  # type: ignore[union-attr]
    )


def put_masks(module: nn.Module) -> None:
    """Give every marked layer of a module a mask of the zeros that its weight has now."""
    for layer in list(module.modules()):
        if getattr(layer, MARK, False) and isinstance(layer.weight, Tensor) and not torch.all(layer.weight != 0):
            parametrize.register_parametrization(layer, "weight", Mask(layer.weight.detach() != 0))
