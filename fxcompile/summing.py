"""What a kernel makes of a mean, a sum or a norm that adds up one number after another in float32.

ONNX Runtime sums like that, a few lanes of a vector side by side; torch sums in pairs or in float64. On a map of one
value nothing cancels: measured, the mean of 32 x 32 x 32 equal pixels is off by 5e-5 of itself, of 1,024 x 1,024 by
1.5e-3, and an instance norm, which divides what is left of such a map by sqrt(eps), is off by 5e-3 and 0.2. On maps
that vary about zero both are off by a hundredth of that. So it is not bounded but computed, on the input at hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxcompile.layers import INSTANCE_NORMS

LANES = (4, 8, 16, 32)
"""How many numbers kernels add side by side, by the width of the machine's vectors."""

_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def sum_in_order(rows: Tensor) -> Tensor:
    """The sums over the last axis, added up in float32, each lane by itself: [..., L] -> [...], float64.

    Of the sums with each of `LANES` the one that is furthest off: on some maps the roundings of one happen to cancel.
    """
    single = rows.float()
    exact = single.double().sum(-1)
    worst = torch.zeros_like(exact)
    for lanes in LANES:
        stacked = functional.pad(single, (0, -rows.shape[-1] % lanes)).unflatten(-1, (-1, lanes))
        partial = np.add.accumulate(stacked.numpy(), axis=-2)[..., -1, :]
        off = torch.from_numpy(partial.astype(np.float64)).sum(-1) - exact
        worst = torch.where(off.abs() > worst.abs(), off, worst)
    return rows.sum(-1) + worst


def layer_in_order(layer: nn.Module, x: Tensor) -> Tensor | None:
    """What a norm, or a pool over whole maps, gives with such sums, all else in float64; None for other layers.

    Args:
        layer: in float64.
        x: its input, float64, not empty.
    """
    if isinstance(layer, _POOLS):
        if any(size != 1 for size in _sizes(layer.output_size)):
            return None
        spatial = _POOLS.index(type(layer)) + 1
        return function_in_order(torch.mean, x, tuple(range(x.dim() - spatial, x.dim())), True)
    if isinstance(layer, nn.LayerNorm):
        return _norm_in_order(x.flatten(-len(layer.normalized_shape)), x, layer, ())
    if isinstance(layer, nn.GroupNorm):
        return _norm_in_order(x.reshape(x.shape[0], layer.num_groups, -1), x, layer, (1,) * (x.dim() - 2))
    if isinstance(layer, INSTANCE_NORMS) and not layer.track_running_stats:
        spatial = INSTANCE_NORMS.index(type(layer)) + 1
        return _norm_in_order(x.flatten(-spatial), x, layer, (1,) * spatial)
    return None


def function_in_order(function: object, x: Tensor, *options: Any) -> Tensor | None:
    """What `torch.mean` and `torch.sum` give with such sums, as canonical form calls them; None for other functions.

    Args:
        x: float64, not empty.
        options: the axes, counted from 0, by default all; and whether they stay as axes of size one.
    """
    if function not in (torch.mean, torch.sum) or not x.dim():
        return None
    summed = sorted(options[0]) if options and options[0] else list(range(x.dim()))
    keepdim = len(options) > 1 and options[1]
    rows = x.movedim(summed, [*range(-len(summed), 0)]).flatten(-len(summed))
    value = sum_in_order(rows) / (rows.shape[-1] if function is torch.mean else 1)
    for axis in summed if keepdim else ():
        value = value.unsqueeze(axis)
    return value


def _sizes(size: Any) -> tuple[Any, ...]:
    return size if isinstance(size, tuple) else (size,)


def _norm_in_order(rows: Tensor, x: Tensor, layer: Any, ones: tuple[int, ...]) -> Tensor:
    """A norm over the last axis of `rows`, a view of `x`; its weight is given so many axes of size one."""
    length = rows.shape[-1]
    centred = rows - (sum_in_order(rows) / length).unsqueeze(-1)
    variance = (sum_in_order(centred.square()) / length).unsqueeze(-1)
    value: Tensor = (centred / (variance + layer.eps).sqrt()).reshape(x.shape)
    if layer.weight is not None:
        value = value * layer.weight.reshape(*layer.weight.shape, *ones)
    if layer.bias is not None:
        value = value + layer.bias.reshape(*layer.bias.shape, *ones)
    return value
