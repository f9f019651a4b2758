"""A pipeline with the program after each of its passes, so that parts of it can be run again in another way."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from fxcompile.errors import FxcompileError
from fxcompile.layers import holds_weights
from fxcompile.program import FEATURE, Program
from fxcompile.regions import region_inputs
from fxcompile.report import PassReport, Report
from fxcompile.rewriting import Pass, Site
from fxcompile.running import Fitted, Run
from fxcompile.timing import Stopwatch


@dataclass(frozen=True)
class Place:
    """A site in terms of the original: the node whose value it gives, and the one it takes where it is one."""

    feature: str
    before: str | None

    @classmethod
    def of(cls, nodes: Sequence[fx.Node]) -> Place | None:
        """A site's place; inside what an earlier pass made, the end of that. None where there is no one such end."""
        inputs = region_inputs(nodes)
        last = nodes[-1]
        while FEATURE not in last.meta:
            if len(last.users) != 1:
                return None
            last = next(iter(last.users))
        return cls(last.meta[FEATURE], inputs[0].meta.get(FEATURE) if len(inputs) == 1 else None)


@dataclass
class Snapshots:
    """What a run of some passes came by.

    Attributes:
        programs: the original, and the program after each pass.
        reports: on each pass.
        made: what each pass put in the place of its sites.
    """

    passes: list[Pass]
    run: Run
    programs: list[Program] = field(default_factory=list)
    reports: list[PassReport] = field(default_factory=list)
    made: list[dict[str, Fitted]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.programs.append(self.run.program.snapshot())

    def apply_next(self) -> tuple[PassReport, Program]:
        """Run the next pass; what it says, and the program after it."""
        index = len(self.reports)
        report = self.run.apply(self.passes[index])
        if self.run.planned is not None:  # what is run again in another way goes by the same plan
            self.passes[index] = self.run.planned
        self.programs.append(self.run.program.snapshot())
        self.reports.append(report)
        self.made.append(self.run.made)
        return report, self.programs[-1]

    def places(self, index: int) -> dict[str, list[Place]]:
        """Where the sites that a pass rewrote are in the original, by their names."""
        program, pass_ = self.programs[index], self.passes[index]
        found: dict[str, list[Place]] = {site.name: [] for site in self.reports[index].sites if site.outcome == "kept"}
        calls = program.calls()
        for site in self._sites(index, program):
            shared = len(site.nodes) == 1 and any(map(holds_weights, site.layers))
            for nodes in [(node,) for node in calls[id(site.layer)]] if shared else [site.nodes]:
                place = Place.of(nodes)
                if place is not None and site.name in found and pass_.selects(site.name):
                    found[site.name].append(place)
        return found

    def _sites(self, index: int, program: Program) -> list[Site]:
        return [site for site in self.passes[index].sites(program) if isinstance(site, Site)]

    def without_pass(self, index: int) -> Run | None:
        """The pipeline run without one pass; None where the others do not work without it."""
        return self._again(self.programs[index], self.passes[index + 1 :])

    def without_site(self, index: int, name: str) -> Run | None:
        """The pipeline run without one site of a pass, which is left; its first report is that pass's."""
        program = self.programs[index]
        nodes = {site.nodes[-1].name for site in self._sites(index, program) if site.name == name}
        before = dict(itertools.takewhile(lambda item: item[0] not in nodes, self.made[index].items()))
        return self._again(program, [self.skipping(index, name), *self.passes[index + 1 :]], before)

    def only_site(self, index: int, name: str, left_out: Sequence[int]) -> Run | None:
        """One site of a pass alone, after the earlier passes but for some; None where it is no site without those."""
        start = self.programs[index]
        if any(item < index for item in left_out):
            run = self._again(self.programs[0], [self.passes[item] for item in range(index) if item not in left_out])
            if run is None:
                return None
            start = run.program
        if all(site.name != name for site in self._sites(index, start)):
            return None
        return self._again(start, [self.passes[index].model_copy(update={"only": (glob.escape(name),)})])

    def skipping(self, index: int, name: str) -> Pass:
        """A pass that leaves a site, too."""
        pass_ = self.passes[index]
        return pass_.model_copy(update={"skip": (*pass_.skip, glob.escape(name))})

    def _again(self, start: Program, passes: Sequence[Pass], known: dict[str, Fitted] | None = None) -> Run | None:
        """Other passes run on a program, the first sites of the first as known; None where they cannot."""
        cost = self.run.record.before
        run = replace(
            self.run,
            program=start.snapshot(),
            record=Report("", "", self.run.seed, cost, cost),
            watch=Stopwatch(),
            references={},
        )
        if run.verify != "rollback":
            run.verify, run.examples = "off", 0
        try:
            for pass_ in passes:
                run.record.passes.append(run.apply(pass_, known))
                known = None
        except FxcompileError:
            return None
        return run
