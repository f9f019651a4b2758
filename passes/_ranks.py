"""How many channels to put between two layers: by a share of the cost, as a number, or by the energy to keep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fxcompile.rewriting import Pass, Replacement, Site

ROUND_TO = 8
"""ONNX Runtime has blocks of 8 channels with AVX2, 16 with AVX-512. With the latter, on one thread, 32 -> M -> 32 at
14 x 14 takes .41 of the 5x5 layer's time for M = 16, .68 for 18, .75 for 22, .62 for 24 and for 32, 1.02 for 34.
"""


class Draft(NamedTuple):
    """What a pass would put in a layer's place, and the dense weight of the layer's shape that it computes."""

    layers: Sequence[nn.Module]
    weight: Tensor


class WidthPass(Pass):
    """A pass that puts so many channels somewhere: the options that say how many."""

    rank: int | float = Field(
        0.5,
        gt=0,
        description="share of the layer's MACs to spend, as a fraction; or the channels between, as an integer",
    )
    round_to: int | None = Field(
        None,
        ge=1,
        description="round the channels between down (with energy up) to a multiple of this, where that leaves any; by "
        "default to 8 if rank is a share, since ONNX Runtime computes channels in blocks of 8 or 16",
    )
    min_saving: float | None = Field(
        0.0, le=1, description="smallest share of its MACs that a site must save; with 0 some"
    )

    def rewrite(self, site: Site) -> Replacement:
        """The last of the candidates, which knows the most: the data if there are any, else the weights.

        A run compares all candidates, on held-out data or, without calibration, on one random batch.
        """
        return list(self.candidates(site))[-1]

    def differs(self, option: str) -> bool:
        """Whether an option has another value than by default."""
        return bool(getattr(self, option) != type(self).model_fields[option].default)

    @property
    def by_weight(self) -> bool:
        """Whether the weight says how many channels there are, and not its cost or the user."""
        return False

    @property
    def rounding(self) -> int:
        """The multiple that the channels are rounded to."""
        return self.round_to or (ROUND_TO if not self.by_weight and isinstance(self.rank, float) else 1)


class RankedPass(WidthPass):
    """A pass that puts channels between two layers."""

    steps_if_large: ClassVar[bool] = False
    """Whether a fit takes joint steps however large the layer is, and so should a draft."""

    energy: float | None = Field(
        None,
        gt=0,
        le=1,
        description="instead of rank: the fewest channels between that keep this share of the weight's squared norm",
    )

    @model_validator(mode="after")
    def _rank_or_energy(self) -> Self:
        if self.energy is not None and self.differs("rank"):
            raise ValueError("give rank or energy, not both")
        return self

    @property
    def by_weight(self) -> bool:
        """Whether the weight says how many channels there are, and not its cost or the user."""
        return self.energy is not None

    @property
    def takes_steps(self) -> bool:
        """Whether joint steps bring its drafts nearer; not where the closed form is the best for its layers."""
        return True

    def draft(self, site: Site, weight: Tensor, gram: Tensor | None = None, steps: int = 0) -> Draft:
        """What would stand in a site's place, in a fraction of the time of a fit: to tell how near that comes.

        Args:
            weight: to be near, float64, of the shape of the layer's own.
            gram: S [g, F, F] of the layer's inputs, in whose norm it is to be near; by default all count alike.
            steps: of all layers together, after the closed form, where there is S.
        """
        raise NotImplementedError

    def brief(self, site: Site) -> Iterator[Replacement]:
        """The candidates, in a fraction of the time where that takes little from them."""
        return self.candidates(site)

    def alternatives(self, site: Site) -> list[tuple[float, ...]]:
        """What may stand in a site's place under these options, of which the data choose: for each the share of the
        layer's MACs that it costs, and what its channels are. Two passes that agree in this give the same.
        Nothing where there is no form at all.
        """
        raise NotImplementedError

    def pinned(self, site: Site, layers: Sequence[nn.Module]) -> Self:
        """The same pass where it leaves the data no choice but that of these layers, which it drafted, as far as its
        options can say so.
        """
        return self

    def too_costly(self, share: float, groups: int) -> str | None:
        """Why layers that cost this share of the MACs of a site's layer, which has so many groups, are not worth it."""
        if not self.by_weight and isinstance(self.rank, float) and share > self.rank * (1 + 1e-9):
            a_group = " a group" if groups > 1 else ""
            return f"one channel{a_group} between costs {share:.0%} of its MACs already, above rank={self.rank:.3g}"
        return self.too_little(1 - share)


def rank_for(rank: float, unit: float, dense: float, groups: int, round_to: int) -> int:
    """Channels for each group: `rank` in all groups together if an int, else those that cost that share of `dense`.

    Rounded down, so that a share is not exceeded, as `rounded_down` says.

    Args:
        unit: MACs of one channel in every group.
        dense: MACs of the layer.
    """
    each = rank // groups if isinstance(rank, int) else math.floor(rank * dense / unit + 1e-9)
    return rounded_down(int(each), groups, round_to)


def energy_rank(values: Tensor, energy: float) -> int:
    """The smallest rank that keeps this share of the squared singular values [groups, n] in every group."""
    squares = values.square()
    kept = squares.cumsum(1) / squares.sum(1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny)
    short = (kept < energy * (1 - 1e-12)).sum(1)
    return min(int(short.max()) + 1, values.shape[1])


def rounded_down(each: int, groups: int, round_to: int) -> int:
    """Channels for each group, so many or fewer, but one, so that all groups together have a multiple of `round_to`;
    where that leaves none, so many.
    """
    total, step = max(1, each) * groups, math.lcm(groups, round_to)
    return (total // step * step or total) // groups


def rounded_up(each: int, groups: int, round_to: int) -> int:
    """Channels for each group, so many or more, so that all groups together have a multiple of `round_to`."""
    step = math.lcm(groups, round_to) // groups
    return -(-each // step) * step
