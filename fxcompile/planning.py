"""What a pass sees that decides on all its sites together, before the first of them is rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fxcompile.calibration import Calibration
from fxcompile.cost import samples
from fxcompile.program import Program
from fxcompile.progress import Progress
from fxcompile.rewriting import Pass, Site
from fxcompile.sitedata import full_batches, limited, synthetic_batch
from fxcompile.walking import MEMORY, Walk, live_bytes


@dataclass(frozen=True)
class Planning:
    """A program that a pass is about to rewrite, and data to run through it.

    Attributes:
        program: not to be changed.
        data: calibration samples, if there are any.
        seed: of everything random.
        progress: to be called as work goes on.
        notes: for what the user should know, a sentence each.
    """

    program: Program
    data: Calibration | None
    seed: int
    progress: Progress
    notes: list[str]

    def sites(self, pass_: Pass) -> list[Site]:
        """The sites that a pass may touch, in the order of the graph."""
        order = {node: index for index, node in enumerate(self.program.graph.nodes)}
        found = [site for site in pass_.sites(self.program) if isinstance(site, Site) and pass_.selects(site.name)]
        return sorted(found, key=lambda site: order[site.node])

    @cached_property
    def batches(self) -> Sequence[tuple[Tensor, ...]]:
        """What is to be looked at: samples of the calibration data that are fitted to, or random inputs."""
        if self.data is None:
            return [synthetic_batch(self.program, self.seed)]
        per_sample = max(live_bytes(self.program) // samples(self.program), 1)
        fit, _ = self.data.split(seed=self.seed)
        return full_batches(limited(fit, max(8, MEMORY // (2 * per_sample)), self.program), self.program)

    def outputs(self, batches: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """The program's flat outputs on some batches."""
        return [self.program.outputs(*batch) for batch in batches]

    def walk(self) -> Walk:
        """Through the program, over the batches."""
        return Walk(self.program, self.batches)
