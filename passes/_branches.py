"""Layers side by side, over the same input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._call import Call


class Branches(nn.Module):
    """Layers over the same input; their outputs are added, or joined along the channels and put in order.

    Attributes:
        order: where each channel of the outputs is among the joined ones; None where they are in order.
        axis: of the channels.
    """

    order: Tensor | None

    def __init__(self, branches: Sequence[nn.Module], order: Tensor | None = None, axis: int = 1) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.joined = order is not None
        self.axis = axis
        in_order = order is None or torch.equal(order, torch.arange(len(order)))
        self.register_buffer("order", None if in_order else order)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, *positions] -> [N, O, *positions]"""
        outputs = [branch(x) for branch in self.branches]
        if not self.joined:
            total: Tensor = sum(outputs[1:], start=outputs[0])
            return total
        joined = torch.cat(outputs, self.axis)
        return joined if self.order is None else torch.index_select(joined, self.axis, self.order)


def pad_ahead(sides: Sequence[tuple[int, int]]) -> Call:
    """Zeros before and after each axis; where there are to be fewer than none, the map is cut."""
    return Call(functional.pad, [amount for pair in reversed(sides) for amount in pair])
