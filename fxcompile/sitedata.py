"""Calibration data at the sites of a pass: what goes in there now, what came out in the original, and fits to that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxcompile.calibration import Calibration
from fxcompile.chains import statistics_behind
from fxcompile.cost import samples
from fxcompile.distance import Distance
from fxcompile.drawing import random_like
from fxcompile.errors import CalibrationError
from fxcompile.fitting import LayerStats, collect, refitted, row_count
from fxcompile.layers import CONVOLUTIONS, TRANSPOSED, holds_weights
from fxcompile.program import FEATURE, Program, part_of
from fxcompile.regions import region_inputs, run_region, run_replacement
from fxcompile.rewriting import Pairs, Replacement, Site
from fxcompile.walking import MEMORY, Walk, live_bytes

Batches = list[tuple[Tensor, Tensor]]
"""What goes in and what is to come out, a batch each."""


@dataclass
class SiteData:
    """Calibration data for one pass, walked through the program and the original side by side.

    Attributes:
        walk: through the program as it is rewritten.
        reference: through the original.
        features: the original's nodes by the name under which the program's nodes know them.
        again: for a site whose layer is called again, the program's nodes of those calls, and the original's.
        fit_batches: so many batches are to fit to, the others to measure on.
        fits: whether there is calibration data.
        note: what the user should know about it.
    """

    walk: Walk
    reference: Walk
    features: dict[str, fx.Node]
    again: dict[str, list[tuple[fx.Node, fx.Node]]]
    fit_batches: int
    fits: bool
    note: str | None = None
    _last: tuple[str, list[Batches]] = ("", [])

    @classmethod
    def of(
        cls,
        program: Program,
        original: Program,
        data: Calibration | None,
        sites: Sequence[Site],
        seed: int,
        also: Sequence[fx.Node] = (),
    ) -> SiteData:
        """Data for these sites, to be asked for in the order of the graph; random inputs where there is none.

        Args:
            also: other nodes of the program of which the original's values will be taken, as often as they stand here.
        """
        note = None
        if data is None:
            batches, count = [synthetic_batch(original, seed)], 0
        else:
            fit, held = data.split(seed=seed)
            per_sample = max((live_bytes(program) + live_bytes(original)) // samples(program), 1)
            most = max(8, MEMORY // per_sample)
            fit, held = limited(fit, most * 3 // 4, program), limited(held, most // 4, program)
            if len(fit) + len(held) < len(data):
                note = (
                    f"fitted on {len(fit)} and measured on {len(held)} of {len(data)} calibration samples, "
                    f"which keeps the activations under {MEMORY / 1e9:g} GB"
                )
            first = full_batches(fit, program)
            batches, count = [*first, *full_batches(held, program)], len(first)
        features = {node.meta[FEATURE]: node for node in original.graph.nodes}
        calls = program.calls()
        again = {site.name: later_calls(site, calls, features) for site in sites}
        wanted = [features[name] for site in sites if (name := site.nodes[-1].meta.get(FEATURE)) in features]
        wanted += [features[node.meta[FEATURE]] for node in also]
        wanted += [item for nodes in again.values() for _, node in nodes for item in (node, node.all_input_nodes[0])]
        walks = Walk(program, batches), Walk(original, batches, wanted)
        return cls(*walks, features, again, count, data is not None, note)

    def _calls(self, site: Site) -> list[Batches]:
        """All batches at each call of a site: its inputs as they are now, its outputs as the original had them.

        The inputs of later calls, which may depend on the site itself, are those that the original had, too.
        """
        if self._last[0] != site.name:
            xs = list(self.walk.values_of(region_inputs(site.nodes)[0]))
            feature = self.features.get(site.nodes[-1].meta.get(FEATURE, ""))
            if feature is not None:
                ys = [part_of(y, site.nodes[-1]) for y in self.reference.take(feature)]
            else:
                with torch.no_grad():
                    ys = [run_region(site, (x,)) for x in xs]
            found = [list(zip(xs, ys, strict=True))]
            for own, node in self.again[site.name]:
                xs = [part_of(x, own.all_input_nodes[0]) for x in self.reference.take(node.all_input_nodes[0])]
                ys = [part_of(y, own) for y in self.reference.take(node)]
                found.append(list(zip(xs, ys, strict=True)))
            self._last = (site.name, found)
        return self._last[1]

    def fit_pairs(self, site: Site) -> Pairs:
        """The batches to fit to; none where there is no calibration data."""
        return tuple(pair for call in self._calls(site) for pair in call[: self.fit_batches]) if self.fits else ()

    def held_pairs(self, site: Site) -> Batches:
        """The batches to measure on."""
        return [pair for call in self._calls(site) for pair in call[self.fit_batches :]]

    def error(self, site: Site, replacement: Replacement) -> float:
        """Relative L2 error of a replacement against the original's features, on held-out data."""
        distance = Distance()
        with torch.no_grad():
            for x, y in self.held_pairs(site):
                distance.add(run_replacement(replacement, (x,)), y)
        return distance.value

    def fit(self, site: Site, replacement: Replacement, solve: bool = True) -> tuple[Replacement, float]:
        """Re-solve the last linear layer by least squares; keep whichever is nearer on held-out data.

        Args:
            solve: if not, measure only.
        """
        error = self.error(site, replacement)
        modules = [replacement] if isinstance(replacement, nn.Module) else list(replacement)
        if (
            not solve
            or not self.fits
            or not modules
            or not isinstance(modules[-1], (*CONVOLUTIONS, *TRANSPOSED, nn.Linear))
        ):
            return replacement, error
        solved = [*modules[:-1], refitted(modules[-1], self.statistics(site, modules))]
        solved_error = self.error(site, solved)
        return (solved, solved_error) if solved_error < error else (replacement, error)

    def statistics(self, site: Site, modules: Sequence[nn.Module]) -> LayerStats:
        """What the last of these layers, in the site's place, sees and is to give: from the site's own statistics if
        they were collected and say it, else from the data.
        """
        *first, last = modules
        if site.collected is not None and len(site.nodes) == 1:
            known = statistics_behind(site.collected, site.layer, modules)
            if known is not None:
                return known
        pairs = self.fit_pairs(site)
        with torch.no_grad():
            seen = ((run_replacement(first, (x,)), y) for x, y in pairs)
            return collect(last, seen, sum(row_count(last, y) for _, y in pairs))


def later_calls(
    site: Site, calls: dict[int, list[fx.Node]], features: dict[str, fx.Node]
) -> list[tuple[fx.Node, fx.Node]]:
    """The nodes that call a site's layer once more, and the original's nodes: those calls are rewritten with it."""
    if len(site.nodes) > 1 or not any(map(holds_weights, site.layers)):
        return []
    nodes = (node for node in calls[id(site.layer)] if node is not site.node)
    return [(node, features[name]) for node in nodes if (name := node.meta.get(FEATURE)) in features]


def limited(data: Calibration, samples: int, program: Program) -> Calibration:
    """At most so many samples, but one batch at least where the program takes no smaller one."""
    return data.limit(max(samples, 1 if program.batch_is_free else fixed_batch(program)))


def fixed_batch(program: Program) -> int:
    """Samples in a batch of a program whose batch is not free."""
    shape = program.inputs[0].shape
    return shape[0] if shape else 1


def full_batches(data: Calibration, program: Program, size: int = 32) -> list[tuple[Tensor, ...]]:
    """Calibration data in batches that the program takes: of at most `size` samples, or of the only size it knows.

    Raises:
        CalibrationError: the batch is fixed and there are fewer samples.
    """
    if program.batch_is_free:
        return list(data.batches(size))
    shape, size = program.inputs[0].shape, fixed_batch(program)
    whole = [batch for batch in data.batches(size) if not shape or batch[0].shape[0] == size]
    if not whole:
        raise CalibrationError(
            f"the network takes {size} samples at once and {len(data)} are given for fitting or for measuring",
            mend=f"give at least {4 * size} samples, or a model with a free batch",
        )
    return whole


def synthetic_batch(program: Program, seed: int) -> tuple[Tensor, ...]:
    """Random inputs in the range of the examples."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(random_like(example, list(example.shape), generator) for example in program.examples)
