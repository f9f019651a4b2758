"""Replaces a large convolution by a stack of 3x3 ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

from fxcompile.contracts import Approximate
from fxcompile.layer_stats import check_finite
from fxcompile.layers import CONVOLUTIONS, TRANSPOSED
from fxcompile.program import Program
from fxcompile.rewriting import Replacement, Site, Skip

from ._chain_fitting import drafted, fit_statistics, fitted
from ._convolutions import IS_TRANSPOSED, chain, float64, why_tied
from ._ranks import Draft, RankedPass
from ._relus import WithRelus
from ._stacking import compose, energy_widths, stack, stack_macs, widths_for

SWEEPS = 12
"""Of alternating least squares in a draft: the joint steps behind end as low after 12 as after 200."""


class StackKernels(WithRelus, RankedPass):
    """conv[O, C, k, k]  =>  conv[M, C, 3, 3], ..., conv[O, M, 3, 3]      for odd k >= 5, (k - 1) / 2 layers

    Kernels compose by full convolution, W[o, c] = sum over m of A[m, c] * B[o, m], and their sizes add as k1 + k2 - 1
    (Simonyan and Zisserman 2015 stack them; here the stack is solved for). The weights come from alternating least
    squares; with calibration data, all of them together from the error of the outputs, tr(E S E^T) with the Gram matrix
    S of the layer's inputs and E what the stack lacks of the best dense weight. Where S would be larger than 4608
    squared, only the last layer is fitted to the data.

    The first layer takes the whole padding, with its mode, and the others none: sharing it out, (1, 1) for (2, 0),
    would zero what the first layer computes outside the map. The stride goes to the last layer, the dilation to all,
    and groups stay. Nothing but the last layer has a bias, unless `activation` puts a ReLU between: then the inner
    biases lift the calibrated range above zero, so that fine-tuning starts from the same function.

    Kernels of any number of dimensions, non-square ones too; an axis of 1 stays 1.
    """

    name: ClassVar = "stack-kernels"
    contract: ClassVar = Approximate(
        exact_when="rank gives M >= min(C, O) channels a group between, and so many that the stack has at least M^2 "
        "weights more for each M between than the layer, as a rule; for C = O that is 1.52 C for 5x5 and 1.66 C for 7x7"
    )
    steps_if_large: ClassVar = True

    kernel: int | None = Field(
        None, ge=5, description="only kernels whose largest side is this, an odd number; by default all"
    )
    activation: Literal["none", "relu"] = Field("none", description="what stands between; relu wants fine-tuning")

    @field_validator("kernel")
    @classmethod
    def _odd(cls, kernel: int | None) -> int | None:
        if kernel is not None and kernel % 2 == 0:
            raise ValueError("3x3 kernels compose to odd sizes")
        return kernel

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Convolutions with a side of 5 or more, all sides odd."""
        tied = program.tied()
        for node, conv in program.layers(*CONVOLUTIONS, *TRANSPOSED):
            largest = max(conv.kernel_size)
            if largest < 5 or (self.kernel is not None and largest != self.kernel):
                continue
            if isinstance(conv, TRANSPOSED):
                yield Skip.of(node, IS_TRANSPOSED)
                continue
            even = [size for size in conv.kernel_size if size % 2 == 0]
            site = Site.of(program, node)
            reason = why_tied(program, node, tied)
            if even:
                reason = f"3x3 kernels compose to odd sizes, and {even[0]} is even"
            elif reason is None and not self.by_weight:
                reason = self.too_costly(self.macs_share(site), conv.groups)
            yield Skip.of(node, reason) if reason else site

    def macs_share(self, site: Site) -> float:
        """What the stack costs, as a share of what the layer costs."""
        shape = shape_of_work(site)
        dense = math.prod(shape["out_size"]) * math.prod(shape["weight_shape"])
        return stack_macs(**shape, widths=self.widths(site)) / dense if dense else 1.0

    def widths(self, site: Site) -> list[int]:
        """Channels between the layers."""
        if self.energy is not None:
            return energy_widths(float64(site.layer)[0], self.energy, site.layer.groups, self.rounding)
        return widths_for(**shape_of_work(site), rank=self.rank, round_to=self.rounding)

    def candidates(self, site: Site) -> Iterator[Replacement]:
        """What the weights alone give, and what the data do from there."""
        conv = site.layer
        check_finite(conv.weight, "weights")
        weight, bias = float64(conv)
        blind, stats = stack(weight, self.widths(site), conv.groups), fit_statistics(site)  # once for both candidates
        yield self.activated(self.layers(conv, blind, bias), site)
        if stats is not None:
            yield self.activated(self.layers(conv, *fitted(stats, weight, bias, conv.groups, lambda *_: blind)), site)

    def draft(self, site: Site, weight: Tensor, gram: Tensor | None = None, steps: int = 0) -> Draft:
        """A few sweeps towards the weight, and so many joint steps."""
        conv = site.layer
        stages = stack(weight, self.widths(site), conv.groups, sweeps=SWEEPS)
        stages = drafted(stages, weight, gram, conv.groups, steps, near=False)
        return Draft(self.layers(conv, stages, float64(conv)[1]), compose(stages, conv.groups))

    def alternatives(self, site: Site) -> list[tuple[float, ...]]:
        """One, with its widths."""
        return [(self.macs_share(site), *self.widths(site))]

    def layers(self, conv: Any, stages: Sequence[Tensor], bias: Tensor | None) -> list[nn.Module]:
        """The layers with these weights: the first has the padding, the last the stride."""
        dims = len(conv.kernel_size)
        return chain(conv, stages, bias, [len(stages) - 1] * dims, [0] * dims)


def shape_of_work(site: Site) -> dict[str, Any]:
    """What decides the cost of a convolution: the arguments that `widths_for` and `stack_macs` share."""
    conv: Any = site.layer
    dims = len(conv.kernel_size)
    return {
        "weight_shape": tuple(conv.weight.shape),
        "padded_size": tuple(n + 2 * p for n, p in zip(site.input_shape[-dims:], conv.padding, strict=True)),
        "out_size": site.output_shape[-dims:],
        "groups": conv.groups,
        "dilation": conv.dilation,
    }
