"""Replaces what makes maps smaller by a strided convolution beside a pooling, as the reductions of Inception do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field
from torch import fx

from fxcompile.contracts import Trained
from fxcompile.layer_stats import check_finite
from fxcompile.layers import CONVOLUTIONS
from fxcompile.program import Program
from fxcompile.rewriting import Replacement, Site, Skip

from ._chain_fitting import MOST_FEATURES, too_large
from ._convolutions import why_tied
from ._grid import Mix
from ._grid_layers import Grid, Kind
from ._grid_sites import MAX_POOLS, alone, to_pooling, unfit
from ._ranks import WidthPass, rank_for


class ReduceGrid(WidthPass):
    """conv[O, C, k, k]/s                 =>  [conv[M, C, k, k]/s (x), pool/s (x)]
    conv[O, C, k, k], norm, ReLU, pool/s  =>  [conv[M, C, k, k]/s (x), pool/s (x)], ReLU

    Side by side and concatenated, as Inception makes a map smaller (Szegedy et al. 2016, "efficient grid size
    reduction"; Inception-v4 likewise): instead of a convolution that gives all O outputs, or of one at full resolution
    ahead of a pooling, which costs s x s times as much.

    Layers behind expect the O outputs that there were. `mix=none`: M of them are convolved anew, each of the others is
    an input channel of its own, pooled, times a scale, plus an offset. `mix=pooled`: the others are sums of all pooled
    channels, by a 1x1 convolution. `mix=all`: all outputs are sums of M convolved and all C pooled channels, by a 1x1
    convolution behind both. Which outputs the pooling gives, the scales and sums, or the M convolved channels, by
    reduced-rank regression (Anderson 1951), are the best there are in the least-squares sense: on calibration data, or
    without any where the pixels of the input vary alike and by themselves.

    A batch norm between is folded into the convolution. A ReLU, ReLU6 or Hardtanh comes last, and the branches are
    fitted to the outputs behind it. The window of the pooling is s or s + 1 wide, and in the middle of what was seen.

    With `pools`, a pooling that no convolution precedes is taken for one behind a 1x1 convolution that changes nothing,
    of whose MACs `rank` is the share then: a part of the channels is convolved over the window from there on.
    """

    name: ClassVar = "reduce-grid"
    contract: ClassVar = Trained()

    rank: int | float = Field(
        0.5,
        gt=0,
        description="share of the MACs to spend, as a fraction; or the channels of the convolution, as an integer",
    )
    pool: Kind | None = Field(
        None, description="the pooling beside the convolution; by default whichever comes nearer on calibration data"
    )
    mix: Mix = Field("none", description="where a 1x1 convolution mixes: nowhere, behind the pooling, behind both")

    kernel: Literal["own", "whole"] | None = Field(
        None,
        description="where a pooling follows: a kernel as large as it was, or one over all that the two saw; by "
        "default whichever comes nearer, if rank is a share, else its own",
    )

    pools: bool = Field(
        False, description="also poolings by themselves, which adds to the cost: for training something better"
    )

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Convolutions with a stride, and those with none that a pooling with a stride follows; other poolings."""
        tied = program.tied()
        found: list[tuple[fx.Node, Site | Skip]] = []
        taken: set[fx.Node] = set()
        for node, conv in program.layers(*CONVOLUTIONS):
            nodes = [node] if max(conv.stride) > 1 else to_pooling(program, node)
            if nodes:
                site = Site.of(program, *nodes)
                reason = why_tied(program, node, tied) or self.why_left(site)
                found.append((node, Skip.of(node, reason) if reason else site))
                taken.update(nodes)
        for site in alone(program, taken):
            reason = (
                self.why_left(site)
                if self.pools
                else "no convolution of stride 1 leads to it alone, and it costs nothing by itself"
            )
            found.append((site.node, Skip(site.name, reason) if reason else site))
        order = {node: index for index, node in enumerate(program.graph.nodes)}
        yield from (item for _, item in sorted(found, key=lambda pair: order[pair[0]]))

    def why_left(self, site: Site) -> str | None:
        """Why a site has no such form, or None."""
        reason = unfit(site)
        if reason is None and not self.grids(site):
            reason = self.too_narrow(self.all_grids(site)[0])
        return reason

    def all_grids(self, site: Site) -> list[Grid]:
        """The kernels to choose from."""
        if isinstance(site.layers[-1], CONVOLUTIONS):
            return [Grid.of(site)]
        if self.kernel is None and len(site.nodes) == 1:
            return [Grid.of(site, whole=True)]
        kernels = [self.kernel or "own"]
        if self.kernel is None and isinstance(self.rank, float):
            kernels.append("whole")
        return [Grid.of(site, whole=kernel == "whole") for kernel in kernels]

    def grids(self, site: Site) -> list[Grid]:
        """Those that can cost as little as they must."""
        return [grid for grid in self.all_grids(site) if self.too_narrow(grid) is None]

    def too_narrow(self, grid: Grid) -> str | None:
        """Why no number of convolved channels does, or None."""
        low, high = grid.bounds(self.mix)
        if low > high:
            return "one output" + (" a group" if grid.groups > 1 else "") + " is nothing to share between two branches"
        if isinstance(self.rank, int):
            short = max(1, self.rank // grid.groups) < low
            return (
                f"{grid.channels} channels can pass, which leaves more than rank={self.rank} outputs" if short else None
            )
        share = grid.share(low, self.mix)
        if share <= self.rank * (1 + 1e-9):
            return None
        few = f"{low * grid.groups} channels, the fewest there can be, beside the pooling"
        return f"a convolution of {few} costs {share:.0%} of its MACs, above rank={self.rank:.3g}"

    def width(self, grid: Grid) -> int:
        """Channels of the convolution for each group."""
        unit, fixed = grid.costs(self.mix)
        low, high = grid.bounds(self.mix)
        if unit <= 0:
            return high
        left = max(grid.dense - fixed / self.rank, 0.0)
        return min(max(rank_for(self.rank, unit, left, grid.groups, self.rounding), low), high)

    def candidates(self, site: Site) -> Iterator[Replacement]:
        """What the weights alone give, and what the data do with either pooling."""
        for grid in self.grids(site):
            check_finite(grid.weight, "weights")
            width, kinds = self.width(grid), self.kinds(site)
            yield grid.from_weights(width, self.mix, kinds[0])
            if site.pairs and grid.features <= MOST_FEATURES:
                for kind in kinds if not too_large(grid.weight) else kinds[:1]:
                    yield grid.from_data(width, self.mix, kind, site.pairs)

    def kinds(self, site: Site) -> tuple[Kind, ...]:
        """The poolings to choose from; first that which stands there, or the one that is linear."""
        if self.pool is not None:
            return (self.pool,)
        return ("max", "avg") if isinstance(site.layers[-1], MAX_POOLS) else ("avg", "max")
