"""Statistics of the last layer of a chain of convolutions, from those of the one convolution that it replaces.

Where nothing stands between the layers, what the last one sees is a linear map of the old layer's patches, zeros around
the map included: x' = D x. So its moments are D S Dᵀ and D C, and the data need not be read again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor, nn

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
    return dataclasses.replace(
        stats,
        channels=chain[-1].in_channels,
        mean_in=design(stats.mean_in.unsqueeze(2)).squeeze(2),
        _scatter=design.moments(gram)[1],
        _cross=design(cross),
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


@dataclass(frozen=True)
class PatchMap:
    """D, the linear map from patches to those of a layer behind a kernel: D[(m, u), (c, w)] = kernel[m, c, w - u].

    It is never made whole: most of it is zeros.

    Attributes:
        kernel: [g, M, C, *k]
        reach: the size of the layer's own kernel, the range of u.
    """

    kernel: Tensor
    reach: tuple[int, ...]

    def __call__(self, values: Tensor) -> Tensor:
        """D V, [g, M |reach|, n], for V [g, F, n] with F = C |k + reach - 1|."""
        groups, rows, columns, *extent = self.kernel.shape
        full = [k + n - 1 for k, n in zip(extent, self.reach, strict=True)]
        field, kernel = values.unflatten(1, (columns, *full)), self.kernel.flatten(2)
        made = values.new_empty(groups, rows, math.prod(self.reach), values.shape[2])
        for number, shift in enumerate(product(*map(range, self.reach))):
            made[:, :, number] = kernel @ _window(field, 2, shift, extent).flatten(1, -2)
        return made.flatten(1, 2)

    def moments(self, gram: Tensor) -> tuple[Tensor, Tensor]:
        """D S and D S Dᵀ, the second exactly symmetric, for second moments S [g, F, F] of the patches."""
        with_inputs = self(gram)
        seen = self(with_inputs.mT)
        return with_inputs, (seen + seen.mT) / 2


def compose(kernels: Sequence[Tensor]) -> Tensor:
    """The kernel [g, O, C, *k] of a chain of kernels [g, M_i, M_(i-1), *k_i] without strides; zeros stay zero."""
    whole = kernels[0]
    for kernel in kernels[1:]:
        extent, rows = whole.shape[3:], whole.flatten(2)
        full = [k + n - 1 for k, n in zip(extent, kernel.shape[3:], strict=True)]
        made = rows.new_zeros(*kernel.shape[:2], whole.shape[2], *full)
        for number, shift in enumerate(product(*map(range, kernel.shape[3:]))):
            tap = kernel.flatten(3)[..., number] @ rows
            _window(made, 3, shift, extent).add_(tap.unflatten(2, whole.shape[2:]))
        whole = made
    return whole


def _window(values: Tensor, axis: int, shift: Sequence[int], extent: Sequence[int]) -> Tensor:
    """A view of the part of this extent that begins at `shift`, on the axes from this one on."""
    for at, (start, length) in enumerate(zip(shift, extent, strict=True), start=axis):
        values = values.narrow(at, start, length)
    return values


def patch_map(chain: Sequence[Any]) -> PatchMap:
    """What the last layer of a chain sees of the patches of the one convolution that it is: float64."""
    *before, last = chain
    kernels = [item.weight.detach().double().unflatten(0, (item.groups, -1)) for item in before]
    return PatchMap(compose(kernels), tuple(last.kernel_size))
