"""One run of a pipeline: each pass's sites rewritten, fitted and checked one by one, then the network as a whole."""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, fx, nn

from fxcompile.calibration import Calibration
from fxcompile.comparing import Broken
from fxcompile.contracts import Exact, Trained
from fxcompile.cost import Cost, nodes_cost, program_cost, samples
from fxcompile.distance import distances
from fxcompile.drawing import Case, Inputs, cases, draw, most_samples, search
from fxcompile.errors import ContractError, FitError, did_you_mean
from fxcompile.exactness import broken_case
from fxcompile.given import Given
from fxcompile.gradients import unreached
from fxcompile.labels import describe_layer, function_name, node_name
from fxcompile.layers import is_finite
from fxcompile.planning import Planning
from fxcompile.program import Program
from fxcompile.progress import Progress
from fxcompile.removing import take_out
from fxcompile.report import PassReport, Report, SiteReport
from fxcompile.rewriting import ChannelPass, Pass, Replacement, Site, Skip
from fxcompile.rounding import Seen, compare_noisy
from fxcompile.sitedata import SiteData, full_batches, limited, synthetic_batch
from fxcompile.splice import Fragment, Splicer, finish, fragment_of
from fxcompile.timing import Stopwatch

Verify = Literal["raise", "rollback", "keep", "off"]
"""What a broken contract does: it stops the run, or is undone, or is only written down, or is not looked for."""

SITE_CASES = 3
"""Drawn inputs for each exact site, beside those for the whole network."""


Fitted = tuple[Replacement, float | None]
"""A replacement and its error on held-out data, None where it is exact."""


@dataclass
class Run:
    """The state of one run: the program as it is now, and the original that it is held against."""

    original: Program
    program: Program
    data: Calibration | None
    inputs: Inputs
    record: Report
    seed: int
    verify: Verify
    examples: int
    progress: Progress
    watch: Stopwatch
    references: dict[Case, tuple[Tensor, ...]] = field(default_factory=dict)
    given: Given = field(default_factory=Given)
    made: dict[str, Fitted] = field(default_factory=dict)
    known: Mapping[str, Fitted] = field(default_factory=dict)
    planned: Pass | None = None

    def apply(self, pass_: Pass, known: Mapping[str, Fitted] | None = None) -> PassReport:
        """Run one pass; what it breaks is raised or rolled back.

        Args:
            known: what an earlier run made of the first sites, as `made` has it after that run, in the order of the
                sites and by the names of their last nodes: they are not rewritten and fitted again.
        """
        started = time.perf_counter()
        self.made, self.known = {}, known or {}
        self._note_globs(pass_)
        with self.watch.stage(pass_.name):
            notes = self.record.notes
            pass_ = self.planned = pass_.plan(Planning(self.program, self.data, self.seed, self.progress, notes))
            with self.watch.stage("analysis"):
                report = PassReport(str(pass_), pass_.promise.name, before=program_cost(self.program))
                snapshot = self.program.snapshot()
            report.sites = self._rewrite(pass_)
            kept = [site.name for site in report.sites if site.outcome == "kept"]
            broken = self._verify(pass_, snapshot, report) if kept else None
            found = self.verify == "keep" and any(site.reason for site in report.sites if site.outcome == "kept")
            if broken is not None and not found:
                self._roll_back(pass_, snapshot, report, kept, broken)
            if not any(site.outcome == "kept" for site in report.sites) and report.outcome == "kept":
                report.outcome = "left"
            with self.watch.stage("analysis"):
                report.after = program_cost(self.program)
        report.seconds = time.perf_counter() - started
        return report

    def _note_globs(self, pass_: Pass) -> None:
        """Say which globs of `only` and `skip` match no layer: a misspelt one would be ignored in silence."""
        names = {node_name(node) for node in self.program.graph.nodes}
        for option in ("only", "skip"):
            for glob in getattr(pass_, option):
                if not fnmatch.filter(names, glob):
                    hint = did_you_mean(glob, names) if len(names) < 1000 else ""
                    self.record.notes.append(f"{pass_.name}: {option}={glob} matches no layer; {hint}".rstrip("; "))

    # rewriting

    def _rewrite(self, pass_: Pass, limit: int | None = None) -> list[SiteReport]:
        """Rewrite all sites in the order of the data, or until `limit` of them were kept."""
        if isinstance(pass_, ChannelPass):
            return take_out(self, pass_, limit)
        found = [item for item in pass_.sites(self.program) if pass_.selects(item.name)]
        sites = [item for item in found if isinstance(item, Site)]
        data = None
        if sites and not isinstance(pass_.promise, Exact):
            order = {node: index for index, node in enumerate(self.program.graph.nodes)}
            sites.sort(key=lambda site: order[site.node])
            new = [site for site in sites if site.nodes[-1].name not in self.known]
            data = SiteData.of(self.program, self.original, self.data, new, self.seed)
            if data.note is not None and data.note not in self.record.notes:
                self.record.notes.append(data.note)
        splicer = Splicer(self.program)
        most = 2 if self.program.batch_is_free else 1
        drawn = self.examples and isinstance(pass_.promise, Exact)
        local = draw(cases(self.inputs.kinds(), most), SITE_CASES, self.seed) if drawn else []
        reports = {
            id(item): SiteReport(item.name, "left", reason=item.reason) for item in found if isinstance(item, Skip)
        }
        kept = 0
        for index, site in enumerate(sites):
            self.progress(pass_.name, index, len(sites))
            if limit is not None and kept >= limit:
                break
            report = reports[id(site)] = self._rewrite_site(pass_, site, splicer, data, local)
            kept += report.outcome == "kept"
        with self.watch.stage("analysis"):
            finish(self.program)
        return [reports[id(item)] for item in found if id(item) in reports]

    def _rewrite_site(
        self, pass_: Pass, site: Site, splicer: Splicer, data: SiteData | None, local: Sequence[Case]
    ) -> SiteReport:
        started = time.perf_counter()
        report = SiteReport(site.name, "left", reason=splicer.obstacle(site) or "")
        try:
            if not report.reason:
                self._try_site(pass_, site, splicer, data, local, report)
        except _RolledBack as rolled_back:
            report.outcome, report.reason = "rolled back", str(rolled_back)
        except FitError as error:
            report.reason = f"it could not be fitted: {error.problem}"
        if report.outcome != "kept":
            report.after = report.before
        report.seconds = time.perf_counter() - started
        return report

    def _try_site(
        self,
        pass_: Pass,
        site: Site,
        splicer: Splicer,
        data: SiteData | None,
        local: Sequence[Case],
        report: SiteReport,
    ) -> None:
        """Rewrite, fit and check a site; splice it in if it keeps the pass's contract and the user's limits."""
        key = site.nodes[-1].name
        known = self.known.get(key)
        if data is not None and known is None:
            site = site.with_pairs(data.fit_pairs(site))
        batch = samples(self.program)
        report.before = nodes_cost(self.program.module, site.nodes, batch)
        fits: list[Fitted] = []
        tried: list[tuple[Replacement, Fragment]] = []
        for choice in _choices(pass_, site, data) if known is None else [known[0]]:
            tried.append((choice, fragment_of(site, choice)))
            report.after = _cost(tried[-1][1], batch)
            saving = 1 - report.after.macs / report.before.macs if report.before.macs else None
            report.reason = pass_.too_little(saving) or ""
            if report.reason:
                continue
            if known is not None:
                fits.append(known)
            else:
                fits.append((choice, None) if data is None else data.fit(site, choice, solve=pass_.refit))
        if not fits:
            return
        replacement, report.error = min(fits, key=_distance)
        same = (fragment for choice, fragment in tried if choice is replacement)
        fragment = next(same, None) or fragment_of(site, replacement)
        report.after, report.reason = _cost(fragment, batch), ""
        if data is not None:
            if pass_.max_error is not None and report.error is not None and report.error > pass_.max_error:
                report.reason = f"its error {report.error:.3g} is above max_error={pass_.max_error:g}"
                return
        elif self.examples and known is None:
            with self.watch.stage("verification"):
                report.reason = self._check_exact(pass_, site, local)
        following = site.nodes[-1].next
        resumed = first_outside(data.walk.next, site) if data is not None else None
        made = splicer.replace(site, fragment)
        self.made[key] = replacement, report.error
        if data is not None and resumed is not None:
            data.walk.resume_at(made[0] if made and resumed is following else resumed)
        report.outcome, report.change = "kept", describe_change(site, replacement)

    # verification

    def _check_exact(self, pass_: Pass, site: Site, drawn: Sequence[Case]) -> str:
        """Hold a site's replacement against the site; what broke, where it is kept all the same."""
        found = broken_case(pass_, site, drawn, self.program.batch_is_free, self.seed)
        if found is None:
            return ""
        error = self._contract_error(pass_, site.name, *found)
        if self.verify != "keep":
            raise error
        return str(error)

    def _contract_error(self, pass_: Pass, site: str, case: Case, evidence: str) -> Exception:
        problem = (
            f"pass '{pass_.name}' breaks its contract ({pass_.promise.name.lower()}) there: {evidence}; "
            f"the smallest input found is {case}"
        )
        if self.verify != "raise":
            return _RolledBack(problem)
        mend = f"leave the layer out with {pass_.name}(skip={site}), or pass --verify rollback"
        return ContractError(problem, place=f"layer '{site}'", mend=mend)

    def _verify(self, pass_: Pass, before: Program, report: PassReport) -> tuple[Case, str] | None:
        """Search for an input on which the whole network breaks the pass's contract."""
        with self.watch.stage("verification"):
            return self._search(pass_, before, report)

    def _search(self, pass_: Pass, before: Program, report: PassReport) -> tuple[Case, str] | None:
        self.given = Given()
        if not isinstance(pass_.promise, Exact):
            report.error, report.measured_on = self._output_error()
        if not self.examples:
            return None
        report.examples = self.examples
        strategy = cases(self.inputs.kinds(), most_samples(self.program, self.examples))
        exact = isinstance(pass_.promise, Exact)
        # Layers that the model itself keeps from training, under whose names their replacements stand.
        frozen = unreached(before, before.examples) if isinstance(pass_.promise, Trained) else []
        untrained = tuple(f"{name.rpartition('.')[0]}." for name in frozen if "." in name)

        seen = Seen()

        def check(case: Case) -> None:
            tensors = self.inputs.make(case)
            if case not in self.references:
                self.references[case] = before.outputs(*tensors)
            reference = self.references[case]
            if not all(map(is_finite, reference)):
                return  # the network itself overflows on this input
            ours = self.program.outputs(*tensors)
            self.given.add(case, ours)
            if exact:
                seen.add(compare_noisy(ours, reference, before, tensors))
                return
            for name, given, wanted in zip(self.program.output_names, ours, reference, strict=True):
                if given.shape != wanted.shape or given.dtype != wanted.dtype:
                    raise Broken(f"'{name}' has shape {tuple(given.shape)} instead of {tuple(wanted.shape)}")
                if not is_finite(given):
                    raise Broken(f"'{name}' is not finite")
            if isinstance(pass_.promise, Trained):
                lost = [
                    name
                    for name in unreached(self.program, tensors)
                    if name not in frozen and not name.startswith(untrained)
                ]
                if lost:
                    raise Broken(f"no gradient reaches parameter '{lost[0]}'")

        broken = search(check, strategy, self.examples, self.seed)
        self.record.amplified = max(self.record.amplified, seen.amplified)
        if not exact or broken is not None:
            self.references.clear()
        return broken

    def output_error_of(self, program: Program) -> float:
        """That of another program, in the place of this one."""
        return replace(self, program=program)._output_error()[0]

    def _output_error(self) -> tuple[float, str]:
        """Relative L2 error of the worst output against the original's, on held-out calibration data or drawn inputs.

        Not of all together: boxes a thousand times larger than scores would hide what becomes of the scores.
        """
        if self.data is not None:
            _, held = self.data.split(seed=self.seed)
            held = limited(held, 256, self.program)
            batches = full_batches(held, self.program)
            what = self.data.held_out_text(len(held))
        else:
            batches, what = [synthetic_batch(self.original, self.seed)], "random inputs (no calibration data)"
        ours = (self.program.outputs(*batch) for batch in batches)
        wanted = (self.original.outputs(*batch) for batch in batches)
        return max((item.value for item in distances(ours, wanted) if not item.counts), default=0.0), what

    def _roll_back(
        self, pass_: Pass, snapshot: Program, report: PassReport, kept: list[str], broken: tuple[Case, str]
    ) -> None:
        """Each site held by itself, and yet the network does not: find the site by bisection, then raise or undo."""
        rewritten = self.program
        low, high, found = 0, len(kept), broken  # the first `low` sites are right together, the first `high` are not
        while high - low > 1:
            middle = (low + high) // 2
            self.program = snapshot.snapshot()
            self._rewrite(pass_, middle)
            again = self._verify(pass_, snapshot, report)
            low, high, found = (low, middle, again) if again is not None else (middle, high, found)
        self.program, self.given = snapshot.snapshot(), Given()
        error = self._contract_error(pass_, kept[high - 1], *found)
        if isinstance(error, ContractError):
            raise error
        report.reason = f"{error} (layer '{kept[high - 1]}')"
        if self.verify == "keep":
            self.program = rewritten
            return
        report.outcome, report.error = "rolled back", None
        for site in report.sites:
            if site.outcome == "kept":
                site.outcome, site.reason, site.after = "rolled back", "the pass was rolled back", site.before


class _RolledBack(Exception):
    """A site broke the contract and the user chose to go on without it."""


def _choices(pass_: Pass, site: Site, data: SiteData | None) -> Iterator[Replacement]:
    """What may take a site's place: one where it is exact, else all candidates, which are compared on held-out
    calibration data, or on one random batch without.
    """
    return iter([pass_.rewrite(site)]) if data is None else pass_.candidates(site)


def _cost(fragment: Fragment, batch: int) -> Cost:
    return nodes_cost(fragment.root, fragment.nodes, batch)


def _distance(fit: Fitted) -> float:
    """The error of a fit, to choose by: what is not a number is the worst."""
    return math.inf if fit[1] is None or math.isnan(fit[1]) else fit[1]


def first_outside(node: fx.Node | None, site: Site) -> fx.Node | None:
    """The node that comes next in the graph, from one of a site's on, and is not the site's; None from elsewhere.

    It may stand between two of the site's nodes; what replaces them comes after it, where the last of them was.
    """
    if node not in site.nodes:
        return None
    while node in site.nodes:
        node = node.next
    return node


def describe_change(site: Site, replacement: Replacement) -> str:
    """What is replaced by what, in a few words."""
    before = " + ".join(map(describe_layer, site.layers)) or function_name(site.node)
    if isinstance(replacement, nn.Module):
        return f"{before} -> {describe_layer(replacement)}"
    after = ", ".join(map(describe_layer, replacement)) or "nothing"
    return f"{before} -> {after}"
