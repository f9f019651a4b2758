"""Channels put in another order, by the layer that networks write for it where there is one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxcompile.layers import Reorder


def reorder(order: Tensor, axis: int) -> list[nn.Module]:
    """What puts channels in this order; nothing where they are in it."""
    return [] if torch.equal(order, torch.arange(len(order))) else [Reorder(order, axis)]


def shuffle(groups: int, ins: int, outs: int, width: int, axis: int) -> nn.Module:
    """Channels (g, a, b, r) in the order (g, b, r, a), for each of so many groups; a channel shuffle where there is one
    group, and samples in a batch.
    """
    if groups == 1 and axis == 1:
        return nn.ChannelShuffle(ins)
    order = torch.arange(groups * ins * outs * width).reshape(groups, ins, outs * width)
    return Reorder(order.mT.flatten(), axis)
