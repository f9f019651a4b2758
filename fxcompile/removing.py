"""One pass that takes channels out: all at once, then fitted layer by layer in the order of the data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fxcompile.channel_graph import ChannelGraph
from fxcompile.channel_labels import Role
from fxcompile.channel_removal import remove_channels
from fxcompile.contracts import Exact
from fxcompile.cost import Cost, nodes_cost, samples
from fxcompile.errors import FitError
from fxcompile.labels import describe_layer
from fxcompile.layers import CONVOLUTIONS, TRANSPOSED, shallow_copy
from fxcompile.masks import keeps_zeros
from fxcompile.planning import Planning
from fxcompile.program import Program, fetch
from fxcompile.rectified import Behind, fit_behind
from fxcompile.report import SiteReport
from fxcompile.rewriting import ChannelPass, GroupSite, Removal, Site, Skip
from fxcompile.sitedata import SiteData
from fxcompile.trees import place

if TYPE_CHECKING:
    from fxcompile.running import Run


def take_out(run: Run, pass_: ChannelPass, limit: int | None = None) -> list[SiteReport]:
    """Take out what the pass names at each site, fit what is left, and put back what costs or saves the wrong amount.

    Args:
        limit: so many sites at most.
    """
    merged: dict[str, SiteReport] = {}
    for step in pass_.rounds():
        planning = Planning(run.program, run.data, run.seed, run.progress, run.record.notes)
        planned = step.plan(planning)
        assert isinstance(planned, ChannelPass)
        more = True
        while more:
            reports = one_round(run, planned, limit)
            for report in reports:
                merged[report.name] = followed(merged.get(report.name), report)
            more = planned.until_done and limit is None and any(report.outcome == "kept" for report in reports)
    return list(merged.values())


def followed(first: SiteReport | None, second: SiteReport) -> SiteReport:
    """What two rounds have done at a site."""
    if first is None or first.outcome != "kept":
        return second
    if second.outcome != "kept":
        return first
    change = f"{first.change.partition(' -> ')[0]} -> {second.change.partition(' -> ')[2]}"
    after = first.after - (second.before - second.after)  # a layer may count at another site the second time
    return replace(second, change=change, before=first.before, after=after, seconds=first.seconds + second.seconds)


def one_round(run: Run, pass_: ChannelPass, limit: int | None = None) -> list[SiteReport]:
    """Take out what the pass names, once."""
    started = time.perf_counter()
    found = [
        item
        for item in pass_.sites(run.program)
        if (pass_.selects_group(item.group) if isinstance(item, GroupSite) else pass_.selects(item.name))
    ]
    reports = {item.name: SiteReport(item.name, "left", reason=item.reason) for item in found if isinstance(item, Skip)}
    removals: dict[str, Removal] = {}
    sites: dict[str, GroupSite] = {}
    for site in found:
        if isinstance(site, GroupSite) and (limit is None or len(removals) < limit):
            reports[site.name] = SiteReport(site.name, "left")
            try:
                removal = pass_.removal(site)
            except FitError as unfit:
                reports[site.name].reason = f"it could not be fitted: {unfit.problem}"
                continue
            sites[site.name] = site
            if removal.units:
                removals[site.name] = removal
    while removals:
        attempt = Attempt.of(run, pass_, sites, removals)
        for name, reason in attempt.refused(pass_).items():
            reports[name].reason = reason
            del removals[name]
        if removals.keys() == attempt.bills.keys():
            for name, (before, after) in attempt.bills.items():
                report = reports[name]
                report.outcome, report.error = "kept", attempt.errors.get(name)
                report.before, report.after = before, after
                report.change = attempt.changes[name]
                report.layers = attempt.layers[name]
            run.program = attempt.program
            break
    kept = [report for report in reports.values() if report.outcome == "kept"]
    for report in kept:
        report.seconds = (time.perf_counter() - started) / len(kept)
    return [reports[item.name] for item in found if item.name in reports]


@dataclass(frozen=True)
class Attempt:
    """What comes of taking some channels out.

    Attributes:
        program: without them.
        errors: by site, the relative error of the worst output of a layer that took some of its channels.
        bills: by site, what its layers cost before and after; a layer counts at the first site that it belongs to.
        changes: by site, its first layer before and after.
        layers: by site, all of its layers.
    """

    program: Program
    errors: Mapping[str, float]
    bills: Mapping[str, tuple[Cost, Cost]]
    changes: Mapping[str, str]
    layers: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(
        cls, run: Run, pass_: ChannelPass, sites: Mapping[str, GroupSite], removals: Mapping[str, Removal]
    ) -> Attempt:
        """Take them out of a copy of the program as it stands."""
        program = run.program.snapshot()
        values = changed(program, removals.values())
        graph = ChannelGraph.of(program)
        layers = {name: tuple(graph.layers(graph.group(name))) for name in removals}
        remove_channels(graph, {name: removal.units for name, removal in removals.items()}, values)
        errors: dict[str, float] = {}
        if not isinstance(pass_.promise, Exact):
            fits = fit_takers(run, pass_, program, [sites[name] for name in removals])
            takers = {name: {member.owner for member in sites[name].group.of(Role.INPUT)} for name in removals}
            others = set().union(*takers.values()) - fits.keys()
            # What a recurrent layer, say, makes of it is in the outputs.
            fits |= dict.fromkeys(others, run.output_error_of(program) if others else 0.0)
            errors = {name: max((fits[taker] for taker in own), default=0.0) for name, own in takers.items()}
        owned = shared_out([sites[name] for name in removals])
        batch = samples(program)
        bills, changes = {}, {}
        for name in removals:
            before, after = (
                [node for node in item.graph.nodes if node.op == "call_module" and node.target in owned[name]]
                for item in (run.program, program)
            )
            bills[name] = nodes_cost(run.program.module, before, batch), nodes_cost(program.module, after, batch)
            first = sites[name].group.members[0].owner
            old, new = (describe_layer(item.module.get_submodule(first)) for item in (run.program, program))
            changes[name] = f"{old} -> {new}"
        return cls(program, errors, bills, changes, layers)

    def refused(self, pass_: ChannelPass) -> dict[str, str]:
        """The sites that are beyond the user's limits, and why; of errors only the larger half: what they have brought
        to the others goes with them.
        """
        reasons: dict[str, str] = {}
        far: list[tuple[float, str]] = []
        for name, (before, after) in self.bills.items():
            error = self.errors.get(name)
            little = pass_.too_little(1 - after.macs / before.macs if before.macs else None)
            if little is not None:
                reasons[name] = little
            elif pass_.max_error is not None and error is not None and not error <= pass_.max_error:
                far.append((-error, name))
        for error, name in sorted(far)[: (len(far) + 1) // 2]:
            reasons[name] = f"its error {-error:.3g} is above max_error={pass_.max_error:g}"
        return reasons


def changed(program: Program, removals: Iterable[Removal]) -> dict[str, Tensor]:
    """By path what stored tensors are to hold, in float64; layers get the biases that they do not have, of zeros."""
    values: dict[str, Tensor] = {}
    for path, change in ((path, change) for removal in removals for path, change in removal.changes.items()):
        held = fetch(program.module, path)
        if held is None:
            owner, _, name = path.rpartition(".")
            layer: Any = shallow_copy(program.module.get_submodule(owner))
            held = nn.Parameter(layer.weight.new_zeros(change.shape), layer.weight.requires_grad)
            layer.register_parameter(name, held)
            place(program.module, owner, layer)
        values[path] = values.get(path, held.detach().double()) + change
    return values


def shared_out(sites: Sequence[GroupSite]) -> dict[str, set[str]]:
    """For each site its layers, each layer at one site: the first that makes its outputs, else the first there is."""
    found: dict[str, str] = {}
    for roles in ((Role.OUTPUT,), (Role.OUTPUT, Role.OWN, Role.INPUT)):
        for site in sites:
            for owner, role in site.group.holders:
                if role in roles:
                    found.setdefault(owner, site.name)
    owned: dict[str, set[str]] = {site.name: set() for site in sites}
    for owner, name in found.items():
        owned[name].add(owner)
    return owned


def fit_takers(run: Run, pass_: ChannelPass, program: Program, sites: Sequence[GroupSite]) -> dict[str, float]:
    """Fit the layers that took what is gone, in the order of the data, towards what is seen of them behind additions
    and ReLUs; the relative error of each there, by its target.
    """
    targets = {member.owner for site in sites for member in site.group.of(Role.INPUT)}
    takers: list[Site] = []
    for node, layer in program.layers(*CONVOLUTIONS, *TRANSPOSED, nn.Linear):
        if str(node.target) in targets:
            takers.append(Site((node,), (layer,), str(node.target)))
    behind = {site.name: Behind.of(program, run.original, site.node) for site in takers}
    totals = [item.total for item in behind.values() if item.total is not None]
    data = SiteData.of(program, run.original, run.data, takers, run.seed, totals)
    if data.note is not None and data.note not in run.record.notes:
        run.record.notes.append(data.note)
    errors: dict[str, float] = {}
    for index, site in enumerate(takers):
        run.progress(pass_.name, index, len(takers))
        solve = pass_.repairs and not keeps_zeros(site.layer)
        if data.again[site.name]:
            (new,), error = data.fit(site, [site.layer], solve=solve)  # type: ignore[misc]
        else:
            new, error = fit_behind(data, site, behind[site.name], solve=solve)
        if new is not site.layer:
            place(program.module, site.name, new)
        errors[site.name] = error
    program.module.recompile()
    return errors
