"""How small a map shows all that layers do: so much, and no more, is checked in float64 at each site."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from fxcompile.layers import BATCH_NORMS, CONVOLUTIONS, TRANSPOSED

_POINTWISE = (
    *BATCH_NORMS, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.PReLU,
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus,
)  # fmt: skip
"""Layers that treat each pixel by itself, and all of them alike."""


def enough_pixels(layers: Iterable[nn.Module]) -> tuple[int, ...] | None:
    """The size of a map, by axis, that shows all which these layers do one after the other.

    Its middle output sees no padding, and its outer ones see that of one side each; a stride has other pixels to skip.

    Returns:
        None where the layers do not treat all pixels alike, or where none of them is a convolution.
    """
    spans: list[int] = []
    steps: list[int] = []
    pads: list[int] = []
    for layer in layers:
        if type(layer) in _POINTWISE:
            continue
        if type(layer) not in (*CONVOLUTIONS, *TRANSPOSED):
            return None
        size = _by_axis(layer)
        if not spans:
            spans, steps, pads = [1] * len(size), [1] * len(size), [0] * len(size)
        if len(size) != len(spans):
            return None
        for axis, (reach, stride, padding) in enumerate(size):
            spans[axis] += reach * steps[axis]
            pads[axis] = max(pads[axis], padding * steps[axis])
            steps[axis] *= stride
    if not spans:
        return None
    return tuple(max(2 * span + step - 2, pad + 1, 2) for span, step, pad in zip(spans, steps, pads, strict=True))


def _by_axis(layer: Any) -> Sequence[tuple[int, int, int]]:
    """For each axis, in pixels of the layer's input: the reach of its kernel, its stride, its padding."""
    padding = (0,) * len(layer.kernel_size) if isinstance(layer.padding, str) else layer.padding
    sizes = zip(layer.kernel_size, layer.dilation, layer.stride, padding, strict=True)
    if isinstance(layer, TRANSPOSED):
        # its padding cuts so many pixels off each side of what it makes
        return [
            (math.ceil(step * (size - 1) / stride), 1, math.ceil(2 * pad / stride) + 1 if pad else 0)
            for size, step, stride, pad in sizes
        ]
    return [(step * (size - 1), stride, pad) for size, step, stride, pad in sizes]
