"""Runs passes over a program: rewrites site by site, fits, measures, verifies, keeps or rolls back, records."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, fx, nn

from fxcompile.calibration import Calibration, InputSpec, as_calibration
from fxcompile.contracts import Exact, tolerance
from fxcompile.cost import nodes_cost, program_cost, samples
from fxcompile.errors import CalibrationError, ContractError, FitError, RewriteError
from fxcompile.fitting import refit
from fxcompile.layers import CONVOLUTIONS
from fxcompile.pipeline import format_pipeline, parse_pipeline
from fxcompile.program import FEATURE, ORIGIN, Program, dtype_of, shape_of
from fxcompile.report import PassReport, Report, SiteReport
from fxcompile.rewriting import Pass, Replacement, Site, Skip, describe_layer
from fxcompile.splice import Splicer, finish, fragment_of, region_inputs, run_region, run_replacement
from fxcompile.verification import (
    Broken,
    Case,
    Inputs,
    cases,
    compare,
    compare_programs,
    draw,
    random_like,
    search,
)
from fxcompile.walking import MEMORY, Walk, live_bytes

Verify = Literal["raise", "rollback", "off"]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

SITE_CASES = 3
"""Drawn inputs for each exact site, beside those for the whole network."""

MAC_BUDGET = 60_000_000_000
"""By default the whole network is verified on as many inputs as cost this many multiply-accumulates, 2 to 20."""


def _silent(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Result:
    """What came out of a run of the pass manager.

    Attributes:
        program: the rewritten program.
        original: the program that went in.
        record: what happened; `report()` prints it.
    """

    program: Program
    original: Program
    record: Report
    inputs: Inputs = field(repr=False)
    examples: int = 0
    seed: int = 0
    _module: list[fx.GraphModule] = field(default_factory=list, repr=False)

    @property
    def module(self) -> fx.GraphModule:
        """The rewritten network as a GraphModule with tensors of its own: train and save it as any other."""
        if not self._module:
            copied = self.program.snapshot().module
            shared: dict[int, Tensor] = {}
            self._module.append(copy.deepcopy(copied, shared))
        return self._module[0]

    def report(self) -> Report:
        """What every pass did, site by site; prints as a table."""
        return self.record

    def save_onnx(self, path: str | Path, **options: object) -> Report:
        """Emit, simplify, verify in ONNX Runtime and write atomically; see `fxcompile.emission.save_onnx`."""
        from fxcompile.emission import save_onnx

        self.record.file = save_onnx(self, Path(path), **options)  # type: ignore[arg-type]
        return self.record


class PassManager:
    """A list of passes and how to check them.

    Args:
        passes: passes, or pipeline text.
        calibration: samples of the real input, unlabelled: a tensor or array, a mapping by input name, or an iterable
            of batches. Approximate passes fit to three quarters of it and measure on the rest.
        verify: what a broken contract does: raise `ContractError`, roll the site or pass back, or not be looked for.
        verify_examples: inputs drawn for each check of the whole network; by default by what a run of it costs.
        seed: of everything random.
        dump_dir: a folder for the graph after each pass, as readable text.
        progress: called as work goes on.
    """

    def __init__(
        self,
        passes: Sequence[Pass] | str,
        *,
        calibration: object = None,
        verify: Verify = "raise",
        verify_examples: int | None = None,
        seed: int = 0,
        dump_dir: str | Path | None = None,
        progress: Progress = _silent,
    ) -> None:
        self.passes = parse_pipeline(passes) if isinstance(passes, str) else list(passes)
        self.calibration = calibration
        self.verify = verify
        self.verify_examples = verify_examples
        self.seed = seed
        self.dump_dir = Path(dump_dir) if dump_dir is not None else None
        self.progress = progress

    def run(self, program: Program, model: str = "") -> Result:
        """Run all passes on a copy of the program.

        Raises:
            ContractError: a pass broke its contract and `verify` is "raise"; names pass, site and smallest input.
            RewriteError: a pass gave a replacement that does not fit.
            CalibrationError: the calibration data does not fit the program's inputs.
        """
        data = None if self.calibration is None else as_calibration(self.calibration, program.inputs)
        inputs = Inputs(program.inputs, program.examples, data)
        examples = self.verify_examples if self.verify_examples is not None else default_examples(program)
        before = program_cost(program)
        record = Report(
            model or type(program.module).__name__,
            format_pipeline(self.passes),
            self.seed,
            before,
            before,
            notes=list(program.notes),
        )
        run = _Run(self, program, program.snapshot(), data, inputs, examples if self.verify != "off" else 0, record)
        started = time.perf_counter()
        self._dump(0, "traced", run.program)
        for index, pass_ in enumerate(self.passes, 1):
            record.passes.append(run.apply(pass_))
            self._dump(index, pass_.name, run.program)
        record.after = program_cost(run.program)
        record.seconds["passes"] = time.perf_counter() - started
        return Result(run.program, program, record, inputs, examples, self.seed)

    def _dump(self, index: int, name: str, program: Program) -> None:
        if self.dump_dir is not None:
            self.dump_dir.mkdir(parents=True, exist_ok=True)
            (self.dump_dir / f"{index:02d}-{name}.py").write_text(dump(program))


def dump(program: Program) -> str:
    """The program as readable text: its code, each line with the shape and the original layers it computes."""
    lines = [f"# {spec.name}: {list(spec.shape)} {spec.dtype}" for spec in program.inputs]
    for node in program.graph.nodes:
        text = node.format_node()
        if text is None:
            continue
        layer = program.layer(node)
        what = f" {describe_layer(layer)}" if layer is not None else ""
        origin = ", ".join(node.meta.get(ORIGIN, ()))
        lines.append(f"{text}  #{what} {list(shape_of(node) or [])} from [{origin}]")
    return "\n".join([*lines, "", program.module.code.strip(), ""])


def default_examples(program: Program) -> int:
    """How many inputs to draw for a check of the whole network: fewer where each costs more."""
    return max(2, min(20, MAC_BUDGET // max(program_cost(program).macs, 1)))


@dataclass
class _Run:
    """The state of one run: the program as it is now, and the original that it is held against."""

    manager: PassManager
    original: Program
    program: Program
    data: Calibration | None
    inputs: Inputs
    examples: int
    record: Report
    references: dict[Case, tuple[Tensor, ...]] = field(default_factory=dict)

    def apply(self, pass_: Pass) -> PassReport:
        """Run one pass; what it breaks is raised or rolled back."""
        started = time.perf_counter()
        report = PassReport(str(pass_), pass_.promise.name, before=program_cost(self.program))
        snapshot = self.program.snapshot()
        report.sites = self._rewrite(pass_)
        kept = [site.name for site in report.sites if site.outcome == "kept"]
        broken = self._verify(pass_, snapshot, report) if kept else None
        if broken is not None:
            self._roll_back(pass_, snapshot, report, kept, broken)
        if not any(site.outcome == "kept" for site in report.sites) and report.outcome == "kept":
            report.outcome = "left"
        report.after = program_cost(self.program)
        report.seconds = time.perf_counter() - started
        return report

    # rewriting

    def _rewrite(self, pass_: Pass, limit: int | None = None) -> list[SiteReport]:
        """Rewrite all sites in the order of the data, or until `limit` of them were kept."""
        found = [item for item in pass_.sites(self.program) if pass_.selects(item.name)]
        sites = [item for item in found if isinstance(item, Site)]
        data = None
        if sites and not isinstance(pass_.promise, Exact):
            order = {node: index for index, node in enumerate(self.program.graph.nodes)}
            sites.sort(key=lambda site: order[site.node])
            data = _Data.of(self, sites)
        splicer = Splicer(self.program)
        most = 2 if self.program.batch_is_free else 1
        local = draw(cases(self.inputs.kinds(), most), SITE_CASES, self.manager.seed)
        reports = {
            id(item): SiteReport(item.name, "left", reason=item.reason) for item in found if isinstance(item, Skip)
        }
        kept = 0
        for index, site in enumerate(sites):
            self.manager.progress(pass_.name, index, len(sites))
            if limit is not None and kept >= limit:
                break
            report = reports[id(site)] = self._rewrite_site(pass_, site, splicer, data, local)
            kept += report.outcome == "kept"
        finish(self.program)
        return [reports[id(item)] for item in found if id(item) in reports]

    def _rewrite_site(
        self, pass_: Pass, site: Site, splicer: Splicer, data: _Data | None, local: Sequence[Case]
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
        report.seconds = time.perf_counter() - started
        return report

    def _try_site(
        self,
        pass_: Pass,
        site: Site,
        splicer: Splicer,
        data: _Data | None,
        local: Sequence[Case],
        report: SiteReport,
    ) -> None:
        """Rewrite, fit and check a site; splice it in if it keeps the pass's contract and the user's limits."""
        if data is not None:
            site = site.with_pairs(data.fit_pairs(site))
        replacement = pass_.rewrite(site)
        batch = samples(self.program)
        report.before = nodes_cost(self.program.module, site.nodes, batch)
        fragment = fragment_of(site, replacement)
        report.after = nodes_cost(fragment.root, fragment.nodes, batch)
        saving = 1 - report.after.macs / report.before.macs if report.before.macs else 0.0
        if pass_.min_saving is not None and saving < pass_.min_saving:
            report.reason = f"it would save {saving:.0%} of its MACs, below min_saving={pass_.min_saving:g}"
            return
        if data is not None:
            replacement, report.error = data.fit(site, replacement)
            if pass_.max_error is not None and report.error > pass_.max_error:
                report.reason = f"its error {report.error:.3g} is above max_error={pass_.max_error:g}"
                return
            fragment = fragment_of(site, replacement)
        elif self.examples:
            self._check_exact(pass_, site, local)
        following = site.nodes[-1].next
        stands_here = data is not None and data.walk.next in site.nodes
        made = splicer.replace(site, fragment)
        if data is not None and stands_here:
            data.walk.resume_at(made[0] if made else following)
        report.outcome, report.change = "kept", describe_change(site, replacement)

    # verification

    def _check_exact(self, pass_: Pass, site: Site, local: Sequence[Case]) -> None:
        """Hold a site's replacement against the site in float64, both made from weights that were cast before."""
        double = site.double()
        with torch.no_grad():
            replacement = pass_.rewrite(double)
        if not isinstance(replacement, nn.Module):
            replacement = [module.double() for module in replacement]
        else:
            replacement = replacement.double()
        specs, examples = site_inputs(site, self.program.batch_is_free)
        inputs = Inputs(specs, examples)

        def check(case: Case) -> None:
            tensors = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs.make(case)]
            with torch.no_grad():
                wanted = run_region(double, tensors)
                given = run_replacement(replacement, tensors)
            compare(given, wanted, tolerance(torch.float64), site.name)

        for case in local:
            try:
                check(case)
            except Broken:
                found = search(check, cases(inputs.kinds(), case.samples), 20, self.manager.seed) or (case, "")
                raise self._contract_error(pass_, site.name, *found) from None

    def _contract_error(self, pass_: Pass, site: str, case: Case, evidence: str) -> Exception:
        problem = (
            f"pass '{pass_.name}' breaks its contract ({pass_.promise.name.lower()}) there: {evidence}; "
            f"the smallest input found is {case}"
        )
        if self.manager.verify == "rollback":
            return _RolledBack(problem)
        mend = f"leave the layer out with {pass_.name}(skip={site}), or pass --verify rollback"
        return ContractError(problem, place=f"layer '{site}'", mend=mend)

    def _verify(self, pass_: Pass, before: Program, report: PassReport) -> tuple[Case, str] | None:
        """Search for an input on which the whole network breaks the pass's contract."""
        if not isinstance(pass_.promise, Exact):
            report.error, report.measured_on = self._output_error()
        if not self.examples:
            return None
        report.examples = self.examples
        most = 3 if self.program.batch_is_free else 1
        strategy = cases(self.inputs.kinds(), most)
        exact = isinstance(pass_.promise, Exact)

        def check(case: Case) -> None:
            tensors = self.inputs.make(case)
            if case not in self.references:
                self.references[case] = before.outputs(*tensors)
            reference = self.references[case]
            if not all(tensor.isfinite().all() for tensor in reference):
                return  # the network itself overflows on this input
            if exact:
                compare_programs(before, self.program, tensors, reference)
                return
            ours = self.program.outputs(*tensors)
            for name, given, wanted in zip(self.program.output_names, ours, reference, strict=True):
                if given.shape != wanted.shape or given.dtype != wanted.dtype:
                    raise Broken(f"'{name}' has shape {tuple(given.shape)} instead of {tuple(wanted.shape)}")
                if not given.isfinite().all():
                    raise Broken(f"'{name}' is not finite")

        broken = search(check, strategy, self.examples, self.manager.seed)
        if not exact or broken is not None:
            self.references.clear()
        return broken

    def _output_error(self) -> tuple[float, str]:
        """Relative L2 error of all outputs against the original's on held-out calibration data, or on drawn inputs."""
        if self.data is not None:
            _, held = self.data.split(seed=self.manager.seed)
            held = held.limit(256)
            batches = full_batches(held, self.program)
            what = f"{len(held)} held-out calibration samples"
        else:
            batches, what = [synthetic_batch(self.original, self.manager.seed)], "random inputs (no calibration data)"
        difference = total = 0.0
        for batch in batches:
            for ours, wanted in zip(self.program.outputs(*batch), self.original.outputs(*batch), strict=True):
                if wanted.is_floating_point():
                    difference += float((ours.double() - wanted.double()).square().sum())
                    total += float(wanted.double().square().sum())
        return (difference / total) ** 0.5 if total else 0.0, what

    def _roll_back(
        self, pass_: Pass, snapshot: Program, report: PassReport, kept: list[str], broken: tuple[Case, str]
    ) -> None:
        """Each site held by itself, and yet the network does not: find the site by bisection, then raise or undo."""
        low, high, found = 0, len(kept), broken  # the first `low` sites are right together, the first `high` are not
        while high - low > 1:
            middle = (low + high) // 2
            self.program = snapshot.snapshot()
            self._rewrite(pass_, middle)
            again = self._verify(pass_, snapshot, report)
            low, high, found = (low, middle, again) if again is not None else (middle, high, found)
        self.program = snapshot.snapshot()
        error = self._contract_error(pass_, kept[high - 1], *found)
        if isinstance(error, ContractError):
            raise error
        report.outcome, report.reason, report.error = "rolled back", f"{error} (layer '{kept[high - 1]}')", None
        for site in report.sites:
            if site.outcome == "kept":
                site.outcome, site.reason, site.after = "rolled back", "the pass was rolled back", site.before


class _RolledBack(Exception):
    """A site broke the contract and the user chose to go on without it."""


@dataclass
class _Data:
    """Calibration data for one pass, walked through the program and the original side by side."""

    walk: Walk
    reference: Walk
    features: dict[str, fx.Node]
    fit_batches: int
    fits: bool
    _last: tuple[str, list[tuple[Tensor, Tensor]]] = ("", [])

    @classmethod
    def of(cls, run: _Run, sites: Sequence[Site]) -> _Data:
        if run.data is None:
            batches, count = [synthetic_batch(run.original, run.manager.seed)], 0
        else:
            fit, held = run.data.split(seed=run.manager.seed)
            per_sample = max((live_bytes(run.program) + live_bytes(run.original)) // samples(run.program), 1)
            most = max(8, MEMORY // per_sample)
            fit, held = fit.limit(max(most * 3 // 4, 1)), held.limit(max(most // 4, 1))
            if len(fit) + len(held) < len(run.data) and not any("fitted on" in note for note in run.record.notes):
                run.record.notes.append(
                    f"fitted on {len(fit)} and measured on {len(held)} of {len(run.data)} calibration samples, "
                    "which keeps the activations under 1.5 GB"
                )
            first = full_batches(fit, run.program)
            batches, count = [*first, *full_batches(held, run.program)], len(first)
        features = {node.meta.get(FEATURE, node.name): node for node in run.original.graph.nodes}
        wanted = [features[name] for site in sites if (name := site.nodes[-1].meta.get(FEATURE)) in features]
        walks = Walk(run.program, batches), Walk(run.original, batches, wanted)
        return cls(*walks, features, count, run.data is not None)

    def _pairs(self, site: Site) -> list[tuple[Tensor, Tensor]]:
        """All batches at a site: its inputs as they are now, its outputs as the original had them."""
        if self._last[0] != site.name:
            xs = list(self.walk.values_of(region_inputs(site.nodes)[0]))
            feature = self.features.get(site.nodes[-1].meta.get(FEATURE, ""))
            if feature is not None:
                ys = self.reference.take(feature)
            else:
                with torch.no_grad():
                    ys = [run_region(site, (x,)) for x in xs]
            self._last = (site.name, list(zip(xs, ys, strict=True)))
        return self._last[1]

    def fit_pairs(self, site: Site) -> tuple[tuple[Tensor, Tensor], ...]:
        """The batches to fit to; none where there is no calibration data."""
        pairs = self._pairs(site)
        return tuple(pairs[: self.fit_batches]) if self.fits else ()

    def held_pairs(self, site: Site) -> list[tuple[Tensor, Tensor]]:
        """The batches to measure on."""
        return self._pairs(site)[self.fit_batches :]

    def error(self, site: Site, replacement: Replacement) -> float:
        """Relative L2 error of a replacement against the original's features, on held-out data."""
        difference = total = 0.0
        with torch.no_grad():
            for x, y in self.held_pairs(site):
                ours = run_replacement(replacement, (x,))
                difference += float((ours.double() - y.double()).square().sum())
                total += float(y.double().square().sum())
        return (difference / total) ** 0.5 if total else (0.0 if not difference else float("inf"))

    def fit(self, site: Site, replacement: Replacement) -> tuple[Replacement, float]:
        """Re-solve the last linear layer by least squares; keep whichever is nearer on held-out data."""
        with torch.no_grad():
            error = self.error(site, replacement)
        modules = [replacement] if isinstance(replacement, nn.Module) else list(replacement)
        if not self.fits or not modules or not isinstance(modules[-1], (*CONVOLUTIONS, nn.Linear)):
            return replacement, error
        *first, last = modules
        with torch.no_grad():
            pairs = ((run_replacement(first, (x,)), y) for x, y in self.fit_pairs(site))
            solved = [*first, refit(last, pairs)]
            solved_error = self.error(site, solved)
        return (solved, solved_error) if solved_error < error else (replacement, error)


def full_batches(data: Calibration, program: Program) -> list[tuple[Tensor, ...]]:
    """Calibration data in batches that the program takes: of 32 samples, or of the only size it knows.

    Raises:
        CalibrationError: the batch is fixed and there are fewer samples.
    """
    if program.batch_is_free:
        return list(data.batches(32))
    shape = program.inputs[0].shape
    size = shape[0] if shape else 1
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


def site_inputs(site: Site, batch_is_free: bool) -> tuple[tuple[InputSpec, ...], tuple[Tensor, ...]]:
    """What a site takes, in the form that inputs are drawn for."""
    specs, examples = [], []
    for node in region_inputs(site.nodes):
        shape, dtype = shape_of(node), dtype_of(node)
        if shape is None or dtype is None:
            raise RewriteError("a site must take tensors", place=f"layer '{site.name}'")
        specs.append(InputSpec(node.name, shape, dtype, batch_axis=0 if batch_is_free and shape else None))
        examples.append(torch.zeros(shape, dtype=dtype))
    return tuple(specs), tuple(examples)


def describe_change(site: Site, replacement: Replacement) -> str:
    """What is replaced by what, in a few words."""
    before = " + ".join(map(describe_layer, site.layers)) or str(
        getattr(site.node.target, "__name__", site.node.target)
    )
    if isinstance(replacement, nn.Module):
        return f"{before} -> {describe_layer(replacement)}"
    after = ", ".join(map(describe_layer, replacement)) or "nothing"
    return f"{before} -> {after}"
