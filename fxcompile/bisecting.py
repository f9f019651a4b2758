"""Which pass, which site of it and which layer cost the error of a compiled model: found by measuring, not by guessing.

    diagnosis = fxc.bisect(program, "fold-batchnorm, stack-kernels(rank=0.2)", calibration=batches)
    print(diagnosis)

The pipeline runs pass by pass, and the outputs are held against the original's after each. Then every layer is measured
in place (`side_by_side`). The sites that cost the most there are compiled again: without each, and each by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from fxcompile.calibration import as_calibration
from fxcompile.diagnosis import Diagnosis, PassError, SiteError
from fxcompile.file_errors import file_errors
from fxcompile.manager import PassManager
from fxcompile.pipeline import parse_pipeline
from fxcompile.program import FEATURE, Program
from fxcompile.progress import Progress, silent
from fxcompile.report import PassReport
from fxcompile.rewriting import Pass
from fxcompile.running import Run
from fxcompile.side_by_side import LayerError, SideBySide, layer_errors
from fxcompile.snapshots import Snapshots
from fxcompile.timing import Stopwatch
from fxcompile.yardstick import Errors, Outputs, Yardstick, case_yard, held_out, random_yard, worst


def bisect(
    program: Program,
    passes: Sequence[Pass] | str,
    *,
    calibration: object = None,
    case: object = None,
    verify: Literal["keep", "rollback", "off"] = "keep",
    emit: bool = True,
    again: int = 8,
    samples: int = 64,
    seed: int = 0,
    model: str = "",
    progress: Progress = silent,
) -> Diagnosis:
    """Find what costs the error of a compiled model.

    Args:
        program: the original.
        passes: the pipeline that the model was compiled with.
        calibration: what it was compiled with; a quarter of it is held out and measured on.
        case: inputs to measure on instead: a tensor or array, [N, ...], or a mapping of such by input name.
        verify: what a broken contract does: it is written down and kept, undone as in compiling, or not looked for.
        emit: measure the ONNX file in ONNX Runtime, too.
        again: how many sites to compile again without and by themselves, those that cost the most first.
        samples: the most held-out samples to measure on.
        seed: of everything random; the one that the model was compiled with.
        model: the name to report.
        progress: called as work goes on.

    Raises:
        CalibrationError: the calibration data or the case does not fit the program's inputs.
        RewriteError: a pass gives a replacement that does not fit.
    """
    parsed = parse_pipeline(passes) if isinstance(passes, str) else list(passes)
    data = None if calibration is None else as_calibration(calibration, program.inputs)
    manager = PassManager(parsed, calibration=data, verify=verify, seed=seed, progress=progress)
    watch = Stopwatch(program.seconds)
    with watch.stage("analysis"):
        run = manager.start(program, model, watch)
        held = None if data is None else held_out(data, run.original, samples, seed)
        if case is not None:
            yard = case_yard(as_calibration(case, program.inputs), run.original)
        else:
            yard = held or random_yard(run.original, seed)
    work = _Bisection(Snapshots(parsed, run), yard, held if case is not None else None, progress)
    for _ in parsed:
        work.run_next()
    with watch.stage("layers"):
        layers = work.compare_layers()
    sites: list[SiteError] = []
    if yard.is_off(work.errors):
        with watch.stage("compiling again"):
            work.leave_passes_out()
            sites = work.try_sites(layers, again)
    file = None
    if emit:
        progress("writing", 0, 1)
        file = file_errors(manager.result(run), yard, work.outputs, verify != "off")
    notes = list(run.record.notes)
    if yard.infinite:
        notes.append(f"{yard.infinite} values of the original's own outputs are not finite on {yard.what}")
    return Diagnosis(
        run.record.model,
        run.record.pipeline,
        seed,
        yard.what,
        yard.rounding,
        work.errors,
        work.steps,
        list(layers.values()),
        sites,
        file,
        notes,
        watch.seconds,
    )


@dataclass
class _Bisection:
    """The pipeline, measured as it runs; guilty are the passes that change the outputs by more than rounding."""

    snapshots: Snapshots
    yard: Yardstick
    held: Yardstick | None
    progress: Progress
    steps: list[PassError] = field(default_factory=list)
    outputs: Outputs = field(init=False)
    guilty: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.outputs = self.yard.outputs

    def run_next(self) -> None:
        """Run the next pass and measure."""
        report, program = self.snapshots.apply_next()
        with self.snapshots.run.watch.stage("analysis"):
            outputs = self.yard.run(program)
            changes = self.yard.between(outputs, self.outputs)
            if self.yard.is_off(changes):
                self.guilty.append(len(self.steps))
            step = PassError(
                report.text,
                report.contract,
                report.outcome,
                sum(site.outcome == "kept" for site in report.sites),
                len(report.sites),
                self.yard.between(outputs, self.yard.outputs),
                worst(changes),
                held_out=self.held.errors(program) if self.held is not None else None,
                broken=broken_contracts(report),
            )
        self.steps.append(step)
        self.outputs = outputs

    @property
    def errors(self) -> Errors:
        """Of the compiled program's outputs."""
        return self.yard.between(self.outputs, self.yard.outputs)

    def error_of(self, run: Run | None) -> float | None:
        """The worst output's error."""
        return None if run is None else worst(self.yard.errors(run.program))

    def leave_passes_out(self) -> None:
        """Measure the pipeline without each guilty pass."""
        for count, index in enumerate(self.guilty):
            self.progress("leaving passes out", count, len(self.guilty))
            self.steps[index].without = self.error_of(self.snapshots.without_pass(index))

    def compare_layers(self) -> dict[fx.Node, LayerError]:
        """Measure every layer in place, and say who rewrote it."""
        removed: dict[str, str] = {}
        by: dict[str, list[tuple[str, str]]] = {}
        for index, pass_ in enumerate(self.snapshots.passes):
            features = {node.meta.get(FEATURE) for node in self.snapshots.programs[index + 1].graph.nodes}
            for name, places in self.snapshots.places(index).items():
                for place in places:
                    by.setdefault(place.feature, []).append((pass_.name, name))
                    if place.feature not in features and place.before is not None:
                        removed[place.feature] = place.before
        pair = SideBySide(self.snapshots.run.original, self.snapshots.programs[-1], removed)
        layers = layer_errors(pair, self.yard, self.progress)
        for node, layer in layers.items():
            layer.by = by.get(node.name, [])
        return layers

    def try_sites(self, layers: dict[fx.Node, LayerError], again: int) -> list[SiteError]:
        """The sites of the guilty passes, the most costly first; those that seem so are compiled again."""
        rows = {node.name: layer for node, layer in layers.items()}
        ranked = [(self.cost_in_place(site, there), site) for site, there in self.sites(rows)]
        ranked.sort(key=lambda item: -item[0])
        sites = [site for _, site in ranked]
        for count, site in enumerate(sites[:again]):
            self.progress("compiling again", count, min(again, len(sites)))
            self.compile_again(site)
        tried = [site for site in sites[:again] if site.without is not None]
        tried.sort(key=lambda site: (site.without, -(site.only or 0.0)))
        return [*tried, *(site for site in sites if site not in tried)]

    def sites(self, rows: dict[str, LayerError]) -> Iterator[tuple[SiteError, list[LayerError]]]:
        """Each site that a guilty pass rewrote, and the layers that it is."""
        for index in self.guilty:
            places = self.snapshots.places(index)
            for report in self.snapshots.reports[index].sites:
                if report.outcome == "kept":
                    there = [rows[place.feature] for place in places[report.name] if place.feature in rows]
                    yield SiteError(report.name, report.change, index, report.error), there

    def cost_in_place(self, site: SiteError, there: list[LayerError]) -> float:
        """What a site seems to cost: enters its layers' figures; infinite where they are not known."""
        site.alone = max((row.alone for row in there if row.alone is not None), default=None)
        site.mended = min((row.mended for row in there if row.mended is not None), default=None)
        if not there or any(row.own is None for row in there):
            return float("inf")
        saved = worst(self.errors) - site.mended if site.mended is not None else 0.0
        return max(site.alone or 0.0, saved)

    def compile_again(self, site: SiteError) -> None:
        """Measure the pipeline without a site, and with none that costs error but this one."""
        index, pass_ = site.passed, self.snapshots.passes[site.passed]
        run = self.snapshots.without_site(index, site.name)
        site.without = self.error_of(run)
        site.only = self.error_of(self.snapshots.only_site(index, site.name, self.guilty))
        site.mends = [str(self.snapshots.skipping(index, site.name))]
        limit = limit_between(run.record.passes[0], site.fit) if run is not None and site.fit is not None else None
        if limit is not None:
            site.mends.append(str(pass_.model_copy(update={"max_error": limit})))


def limit_between(others: PassReport, error: float) -> float | None:
    """A `max_error` with two digits that a site of this error exceeds, and no other does; None where there is none.

    Args:
        others: the pass without that site: as the others are fitted once it is left.
    """
    largest = max((site.error or 0.0 for site in others.sites if site.outcome == "kept"), default=0.0)
    limit = float(f"{(error * max(largest, error / 100)) ** 0.5:.2g}")
    return limit if largest < limit < error else None


def broken_contracts(report: PassReport) -> list[str]:
    """How a pass broke its contract, as far as it was looked for, a sentence each."""
    if report.reason:
        return [report.reason]
    return [
        f"layer '{site.name}': {site.reason}"
        for site in report.sites
        if site.outcome == "rolled back" or (site.outcome == "kept" and site.reason)
    ]
