"""What an error of a layer does to the outputs of the network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from fxcompile.planning import Planning
from fxcompile.walking import Walk

from ._drafts import distance_between

SAMPLES, NOISE = 16, 0.1
"""Samples on which is measured what errors of a layer do to the outputs, and how large those are beside its outputs."""


@dataclass(frozen=True)
class Effect:
    """What errors of a layer do to the outputs of the network, measured on a few samples: layers are asked for in the
    order of the graph.
    """

    planning: Planning

    @cached_property
    def batches(self) -> list[tuple[Tensor, ...]]:
        """The first samples of the first batch."""
        batches = self.planning.batches[:1]
        if self.planning.program.batch_is_free:
            return [tuple(tensor[:SAMPLES] for tensor in batch) for batch in batches]
        return list(batches)

    @cached_property
    def wanted(self) -> list[tuple[Tensor, ...]]:
        """The network's outputs for them."""
        return self.planning.outputs(self.batches)

    @cached_property
    def walk(self) -> Walk:
        """Through the network, over them."""
        return Walk(self.planning.program, self.batches)

    def matters(self, node: fx.Node) -> float:
        """The squared relative error of the outputs for that of a layer, if it is small.

        Errors that differ from pixel to pixel, and such as are alike all over a map, as channels that are missing leave
        them: what averages the ones out keeps the others.
        """
        (ys,) = self.walk.values_of(node)
        axis = -1 if isinstance(self.planning.program.layer(node), nn.Linear) else 1
        others = [item for item in range(ys.dim()) if item != axis % ys.dim()]
        spread = ys.std(others, keepdim=True, correction=0)
        size = float((ys - ys.mean(others, keepdim=True)).double().square().sum())
        generator = torch.Generator().manual_seed(self.planning.seed)
        found = []
        for shape in (ys.shape, [size if item in (0, axis % ys.dim()) else 1 for item, size in enumerate(ys.shape)]):
            noise = (NOISE * torch.randn(list(shape), generator=generator).to(ys) * spread).expand_as(ys)
            error = float(noise.double().square().sum())
            outputs = self.walk.fork(node, [ys + noise]).outputs()
            found.append(distance_between(outputs, self.wanted) * size / error if error > 0 else 0.0)
        return max(found)
