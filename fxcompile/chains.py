"""Statistics of the last layer of a chain of convolutions, from those of the one convolution that it replaces.

Where nothing stands between the layers, what the last one sees is a linear map of the old layer's patches, zeros around
the map included: x' = D x. So its moments are D S Dᵀ and D C, and the data need not be read again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxcompile.layer_stats import LayerStats
from fxcompile.layers import CONVOLUTIONS
from fxcompile.patches import padding_amounts


def statistics_behind(stats: LayerStats, layer: nn.Module, chain: Sequence[Any]) -> LayerStats | None:
    """What the last layer of a chain sees, or None where that is no linear map of the patches of `layer`.

    Args:
        stats: of `layer`.
        layer: the convolution that the chain replaces.
        chain: its convolutions, in order.
    """
    if not splits_patches(layer, chain):
        return None
    if len(chain) == 1:
        return stats
    design = patch_map(chain)
    gram, cross, energy = stats.centred()
    seen = design @ gram @ design.mT
    return dataclasses.replace(
        stats,
        channels=chain[-1].in_channels,
        mean_in=(design @ stats.mean_in.unsqueeze(2)).squeeze(2),
        _scatter=(seen + seen.mT) / 2,
        _cross=design @ cross,
        _energy=energy.clone(),
        _layer=None,
    )


def splits_patches(layer: Any, chain: Sequence[Any]) -> bool:
    """Whether each output of the chain sees one patch of `layer`, linearly: no bias before the last layer, the stride
    on the last, the padding on the first or, on an axis along which nothing was mixed before, on a later one.
    """
    if not all(type(item) is type(layer) and isinstance(item, CONVOLUTIONS) for item in chain):
        return False
    if any(item.groups != layer.groups or item.dilation != layer.dilation for item in chain):
        return False
    if any(item.bias is not None or max(item.stride) > 1 for item in chain[:-1]) or chain[-1].stride != layer.stride:
        return False
    for axis, size in enumerate(layer.kernel_size):
        if size - 1 != sum(item.kernel_size[axis] - 1 for item in chain):
            return False
        padded = [item for item in chain if any(padding_amounts(item)[axis])]
        if any(padding_amounts(item)[axis] != padding_amounts(layer)[axis] for item in padded):
            return False
        if not padded:
            if any(padding_amounts(layer)[axis]):
                return False
            continue
        before = chain[: chain.index(padded[0])]
        modes = {padded[0].padding_mode, layer.padding_mode}
        if len(padded) > 1 or len(modes) > 1 or any(item.kernel_size[axis] > 1 for item in before):
            return False
    return True


def patch_map(chain: Sequence[Any]) -> Tensor:
    """D, [groups, F', F] in float64: the chain without its last layer, run on each unit patch."""
    groups, channels = chain[0].groups, chain[0].in_channels // chain[0].groups
    kernel = [1 + sum(item.kernel_size[axis] - 1 for item in chain) for axis in range(len(chain[0].kernel_size))]
    features = channels * math.prod(kernel)
    units = torch.eye(features, dtype=torch.float64).reshape(features, 1, channels, *kernel)
    value = units.expand(features, groups, channels, *kernel).flatten(1, 2)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(kernel) - 1]
    for item in chain[:-1]:
        value = convolve(value, item.weight.detach().double(), groups=groups)
    found: Tensor = value.unflatten(1, (groups, -1)).flatten(2).permute(1, 2, 0).contiguous()
    return found
