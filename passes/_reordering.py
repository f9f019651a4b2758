"""Channels put in another order: by the layer that networks write for it, and in the weights of any other layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxcompile.layers import TRANSPOSED, Reorder, shallow_copy, with_weights

from ._call import Call


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


def within_groups(order: Tensor, groups: int) -> Tensor | None:
    """The order within each of so many groups, [groups, n], or None where it mixes them."""
    local = order.reshape(groups, -1)
    each = local.shape[1]
    local = local - each * torch.arange(groups).unsqueeze(1)
    return local if bool(((local >= 0) & (local < each)).all()) else None


def with_outputs(layer: Any, order: Tensor) -> nn.Module:
    """A layer, or an order, that gives its outputs in another order."""
    if isinstance(layer, Reorder):
        return Reorder(layer.order[order], layer.axis)
    weight = by_columns(layer, order) if isinstance(layer, TRANSPOSED) else layer.weight[order]
    return with_weights(layer, weight, None if layer.bias is None else layer.bias[order])


def with_inputs(layer: Any, order: Tensor) -> nn.Module:
    """A layer that takes as input i what it took as order[i]."""
    weight = layer.weight[order] if isinstance(layer, TRANSPOSED) else by_columns(layer, order)
    return with_weights(layer, weight, layer.bias)


def by_columns(layer: Any, order: Tensor) -> Tensor:
    """A weight [rows, columns / groups, ...] with the columns of each group in another order."""
    groups = getattr(layer, "groups", 1)
    local = within_groups(order, groups)
    assert local is not None
    parts = zip(layer.weight.detach().chunk(groups), local, strict=True)
    return torch.cat([part[:, own] for part, own in parts])


def in_order(layer: nn.Module, order: Tensor) -> nn.Module:
    """A layer with the numbers that it has for each channel in another order; itself where it has none."""
    if isinstance(layer, (Call, nn.ChannelShuffle)) or not [*layer.parameters(), *layer.buffers()]:
        return layer
    copied = shallow_copy(layer)
    for name, value in layer.named_parameters(recurse=False):
        if len(value) == len(order):
            copied.register_parameter(name, nn.Parameter(value.detach()[order], requires_grad=value.requires_grad))
    for name, buffer in layer.named_buffers(recurse=False):
        if buffer.dim() and len(buffer) == len(order):
            copied.register_buffer(name, buffer[order])
    return copied
