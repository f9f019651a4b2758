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
    """Whether each output of the chain sees one patch of `layer`, linearly: no bias before the last layer, and along
    each axis the padding on a layer before which nothing was mixed, the stride on one after which nothing is.
    """
    if not all(type(item) is type(layer) and isinstance(item, CONVOLUTIONS) for item in chain):
        return False
    if any(item.groups != layer.groups for item in chain):
        return False
    if any(item.bias is not None for item in chain[:-1]):
        return False
    return all(_splits_axis(layer, chain, axis) for axis in range(len(layer.kernel_size)))


def _splits_axis(layer: Any, chain: Sequence[Any], axis: int) -> bool:
    wanted = padding_amounts(layer)[axis]
    mixing = [at for at, item in enumerate(chain) if item.kernel_size[axis] > 1]
    padded = [at for at, item in enumerate(chain) if any(padding_amounts(item)[axis])]
    strided = [at for at, item in enumerate(chain) if item.stride[axis] > 1]
    if layer.kernel_size[axis] - 1 != sum(item.kernel_size[axis] - 1 for item in chain):
        return False
    if [padding_amounts(chain[at])[axis] for at in padded] != ([wanted] if any(wanted) else []):
        return False
    if [chain[at].stride[axis] for at in strided] != ([layer.stride[axis]] if layer.stride[axis] > 1 else []):
        return False
    if any(chain[at].dilation[axis] != layer.dilation[axis] for at in mixing):
        return False
    if any(chain[at].padding_mode != layer.padding_mode for at in padded):
        return False
    first, last = min(mixing, default=len(chain)), max(mixing, default=-1)
    return all(at <= min([first, *strided]) for at in padded) and all(at >= last for at in strided)


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
