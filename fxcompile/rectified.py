"""Fits of layers towards what is seen of their outputs: the sum that they are added to, and what a ReLU leaves of it.

The last layer of a residual branch can give back what the stream beside it has lost; and outputs that a ReLU cuts off
need only stay below zero, which leaves a layer with few channels more to spend on the others (Zhang et al. 2015).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fxcompile.distance import Distance
from fxcompile.fitting import RIDGE, LayerStats, collect, enough_rows, refitted, row_count, with_parameters
from fxcompile.layer_stats import grouped
from fxcompile.layers import with_weights
from fxcompile.patches import weight_matrix
from fxcompile.program import FEATURE, Program, part_of, shape_of
from fxcompile.rewriting import Site
from fxcompile.sitedata import SiteData

STEPS = 12
"""Steps of a fit to what a ReLU leaves: they find more than four fifths of what is to be had."""


class Sample(NamedTuple):
    """A batch of a layer's inputs, what its outputs and what is added to them are to give together, and the latter."""

    x: Tensor
    total: Tensor
    beside: Tensor | None

    def seen(self, layer: Any) -> Tensor:
        """What a layer gives, with what is added."""
        y: Tensor = layer(self.x)
        return y if self.beside is None else y + self.beside


@dataclass(frozen=True)
class Behind:
    """What is made of a layer's outputs.

    Attributes:
        total: the node that adds them to what is known before, or None.
        beside: the node of that.
        rectified: whether all else that is seen of them is what a ReLU leaves.
    """

    total: fx.Node | None
    beside: fx.Node | None
    rectified: bool

    @classmethod
    def of(cls, program: Program, original: Program, node: fx.Node) -> Behind:
        """What stands behind a node. A ReLU is found behind a concatenation or a maximum pooling, too: it may as well
        stand before it.

        Args:
            original: must have the sum, too.
        """
        total, beside = added(node)
        if total is not None and total.meta.get(FEATURE) not in {
            item.meta.get(FEATURE) for item in original.graph.nodes
        }:
            total = beside = None
        last: fx.Node | None = total or node
        while last is not None:
            last = only_user(last)
            layer = None if last is None else program.layer(last)
            if isinstance(layer, nn.ReLU):
                return cls(total, beside, True)
            if not isinstance(layer, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)) and (
                last is None or last.target is not torch.cat
            ):
                break
        return cls(total, beside, False)


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that takes a node's value; None where there are several or none."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def added(node: fx.Node) -> tuple[fx.Node, fx.Node] | tuple[None, None]:
    """The sum of a node and another of its shape that is computed before it, and that one."""
    total = only_user(node)
    if total is None or total.target is not operator.add or len(total.all_input_nodes) != 2:
        return None, None
    (beside,) = (item for item in total.all_input_nodes if item is not node)
    return (total, beside) if beside < node and shape_of(beside) == shape_of(node) else (None, None)


def fit_behind(data: SiteData, site: Site, behind: Behind, solve: bool) -> tuple[Any, float]:
    """The layer at a site fitted to what is seen of it; whichever is nearest on held-out data: itself, the least
    squares, or what comes of these in view of the ReLU.

    Args:
        solve: if not, measure only.

    Returns:
        The layer and its relative error there.
    """
    layer = site.layer
    pairs, held = list(data.fit_pairs(site)), data.held_pairs(site)
    if behind.total is not None and behind.beside is not None:
        totals = [part_of(y, behind.total) for y in data.reference.take(data.features[behind.total.meta[FEATURE]])]
        beside = data.walk.values_of(behind.beside)
        samples = [Sample(x, *item) for (x, _), *item in zip([*pairs, *held], totals, beside, strict=True)]
    else:
        samples = [Sample(x, y, None) for x, y in (*pairs, *held)]
    fit, measured = samples[: len(pairs)], samples[len(pairs) :]
    layers = [layer]
    if solve and fit:
        wanted = ((x, total if beside is None else total - beside) for x, total, beside in fit)
        stats = collect(layer, wanted, sum(row_count(layer, total) for _, total, _ in fit))
        layers.append(refitted(layer, stats))
        if behind.rectified:
            layers.append(rectified(layers[-1], stats, fit))
    errors = [error_behind(item, measured, behind.rectified) for item in layers]
    best = min(errors)
    return layers[errors.index(best)], best


@torch.no_grad()
def error_behind(layer: Any, samples: Sequence[Sample], relu: bool) -> float:
    """Relative L2 error of what is seen of a layer."""
    distance = Distance()
    for sample in samples:
        seen = sample.seen(layer)
        distance.add(seen.relu() if relu else seen, sample.total.relu() if relu else sample.total)
    return distance.value


def rectified(layer: Any, stats: LayerStats, samples: Sequence[Sample], steps: int = STEPS) -> Any:
    """A layer nearer to what a ReLU leaves of the wanted sums t.

    Descends on the convex sum of (s - t)² where t > 0 and of relu(s)² elsewhere, s = W x + b + what is added: by steps
    that would be least squares if no s were cut off, S⁻¹ times the slope, with Nesterov's momentum.

    Args:
        layer: where to begin.
        stats: of its inputs.
        samples: of which are taken as many rows as a fit of the layer needs.
    """
    rows_of_one = row_count(layer, samples[0].total[:1])
    each = math.ceil(enough_rows(stats.features) / (len(samples) * max(rows_of_one, 1)))
    parts = [Sample(*(None if item is None else item[:each] for item in sample)) for sample in samples]  # type: ignore[arg-type]
    centred = layer.bias is not None
    system = (stats.centred() if centred else stats.raw()).gram / stats.rows
    size = system.diagonal(dim1=1, dim2=2).mean(1)
    system.diagonal(dim1=1, dim2=2).add_((RIDGE * size).clamp_min(1e-290).unsqueeze(1))
    factor = torch.linalg.cholesky(system)
    mean = stats.mean_in.unsqueeze(1) if centred else 0.0
    weight = ahead = grouped(weight_matrix(layer).detach().double(), stats)
    bias = bias_ahead = layer.bias.detach().double() if centred else None
    pace = 1.0
    for _ in range(steps):
        slope, bias_slope = slopes(with_parameters(layer, ahead.flatten(0, 1), bias_ahead), parts)
        about_mean = grouped(slope, stats)
        if bias_slope is not None:
            about_mean = about_mean - bias_slope.reshape(stats.groups, -1, 1) * mean
        step = torch.cholesky_solve(about_mean.mT, factor).mT
        faster = (1 + math.sqrt(1 + 4 * pace**2)) / 2
        momentum = (pace - 1) / faster
        weight, ahead = ahead - step, ahead - step + momentum * (ahead - step - weight)
        if bias is not None and bias_ahead is not None and bias_slope is not None:
            moved = bias_ahead - bias_slope + (step * mean).sum(2).flatten()
            bias, bias_ahead = moved, moved + momentum * (moved - bias)
        pace = faster
    return with_parameters(layer, weight.flatten(0, 1), bias)


def slopes(layer: Any, samples: Sequence[Sample]) -> tuple[Tensor, Tensor | None]:
    """Half the slope of the mean over rows of (s - t)² where t > 0 and relu(s)² elsewhere, by W [O, F] and b [O]."""
    layer.requires_grad_()
    own = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    sums, rows = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in own], 0
    for sample in samples:
        with torch.enable_grad():
            seen = sample.seen(layer)
            gap = torch.where(sample.total > 0, seen - sample.total, seen.relu()).detach()
            for total, part in zip(sums, torch.autograd.grad(seen, own, gap), strict=True):
                total += part
        rows += row_count(layer, sample.total)
    found = [total / max(rows, 1) for total in sums]
    return weight_matrix(with_weights(layer, found[0], None)).detach().double(), found[1] if len(found) > 1 else None
