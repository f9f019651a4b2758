"""The pass manager: a list of passes, how to check them, and what came out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, fx

from fxcompile.calibration import as_calibration
from fxcompile.cost import program_cost
from fxcompile.drawing import FEWEST, Inputs
from fxcompile.dumping import Dumps
from fxcompile.errors import UsageError, did_you_mean
from fxcompile.given import Given
from fxcompile.masks import put_masks
from fxcompile.pipeline import format_pipeline, parse_pipeline
from fxcompile.program import FEATURE, Program, fetch
from fxcompile.progress import Progress, silent
from fxcompile.report import Report
from fxcompile.rewriting import Pass
from fxcompile.running import Run, Verify
from fxcompile.sparse_layers import put_sparse_layers
from fxcompile.timing import Stopwatch

BUDGET = 30_000_000_000
"""By default the whole network is verified on as many inputs as cost this many multiply-accumulates, 2 to 20."""

OF_FILE = 8
"""By default the file is held against the program, which was verified before, on no more inputs than that."""

OVERHEAD = 1_000_000
"""Multiply-accumulates that take as long as the call of one operation does, however little it computes."""


@dataclass(frozen=True)
class Result:
    """What came out of a run of the pass manager.

    Attributes:
        program: the rewritten program.
        record: what happened; `report()` prints it.
        pipeline: the text of the passes with every option, so that a version with other defaults can run it again.
        examples: how many inputs to hold the file against the program on.
        given: what the program gave for the inputs that it was verified on.
    """

    program: Program
    record: Report
    pipeline: str
    inputs: Inputs = field(repr=False)
    examples: int = 0
    seed: int = 0
    watch: Stopwatch = field(default_factory=Stopwatch, repr=False)
    given: Given = field(default_factory=Given, repr=False)
    _module: list[fx.GraphModule] = field(default_factory=list, repr=False)

    @property
    def module(self) -> fx.GraphModule:
        """The rewritten network as a GraphModule with tensors of its own: train and save it as any other.

        Zeros that `sparsify` made have a mask, a parametrization of the weight: they stay zero in training. Layers
        that it marked for sparse products are `SparseLayer`s, which do not train.
        """
        if not self._module:
            copied = self.program.snapshot().module
            shared: dict[int, Tensor] = {}
            module = copy.deepcopy(copied, shared)
            put_sparse_layers(module)
            put_masks(module)
            self._module.append(module)
        return self._module[0]

    def _is_trained(self, module: fx.GraphModule) -> bool:
        """Whether any tensor of the copy that was handed out has other values than the program's own."""
        own = self.program.module.state_dict()
        return not all(torch.equal(value, fetch(module, name)) for name, value in own.items())

    def report(self) -> Report:
        """What every pass did, site by site; prints as a table."""
        return self.record

    def save_onnx(self, path: str | Path, **options: object) -> Report:
        """Emit, simplify, verify in ONNX Runtime and write atomically; see `fxcompile.emission.save_onnx`.

        Raises:
            UsageError: `module` was trained: what is written is what the passes made, before that.
        """
        from fxcompile.emission import save_onnx

        if self._module and self._is_trained(self._module[0]):
            raise UsageError(
                "result.module has other values now than the passes gave it, and save_onnx would write those",
                mend="trace it again: PassManager([]).run(trace(result.module.eval(), example_inputs)).save_onnx(...)",
            )
        self.record.file = save_onnx(self, Path(path), **options)  # type: ignore[arg-type]
        return self.record


class PassManager:
    """A list of passes and how to check them.

    Args:
        passes: passes, or pipeline text.
        calibration: samples of the real input, unlabelled: a tensor or array, a mapping by input name, or an iterable
            of batches. Approximate passes fit to three quarters of it and measure on the rest.
        verify: what a broken contract does: "raise" a `ContractError`, "rollback" of the site or pass, "keep" it and
            say so in the record, or "off": it is not looked for.
        verify_examples: inputs drawn for each check of the whole network and of the file; by default by what a run of
            it costs.
        seed: of everything random.
        dump_dir: a folder for the graph after each pass, as readable text.
        progress: called as work goes on.

    Raises:
        UsageError: something is no pass, or `verify` none of these words.
        PipelineError: the pipeline text is wrong.
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
        progress: Progress = silent,
    ) -> None:
        self.passes = parse_pipeline(passes) if isinstance(passes, str) else list(passes)
        for item in self.passes:
            if not isinstance(item, Pass):
                name = getattr(item, "__name__", type(item).__name__)
                raise UsageError(f"{name} is no pass", mend=f"give an instance, {name}(), or pipeline text")
        if verify not in get_args(Verify):
            raise UsageError(f"verify cannot be {verify!r}", mend=did_you_mean(str(verify), get_args(Verify)))
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
            UsageError: what is given is no program.
        """
        if not isinstance(program, Program):
            name = type(program).__name__
            raise UsageError(f"{name} is no program", mend="trace the model first: fxc.trace(model, example_inputs)")
        watch = Stopwatch(program.seconds)
        with watch.stage("analysis"):
            run = self.start(program, model, watch)
            dumps = Dumps(self.dump_dir)
            dumps.write("traced", run.program)
        for pass_ in self.passes:
            run.record.passes.append(run.apply(pass_))
            with watch.stage("analysis"):
                dumps.write(pass_.name, run.program)
        with watch.stage("analysis"):
            run.record.after = program_cost(run.program)
        return self.result(run)

    def start(self, program: Program, model: str, watch: Stopwatch) -> Run:
        """A run on a copy of the program, before its first pass."""
        data = None if self.calibration is None else as_calibration(self.calibration, program.inputs)
        before = program_cost(program)
        record = Report(
            model or type(program.module).__name__,
            format_pipeline(self.passes),
            self.seed,
            before,
            before,
            notes=list(program.notes),
            seconds=watch.seconds,
        )
        original = program.snapshot()
        for node in original.graph.nodes:
            node.meta[FEATURE] = node.name
        return Run(
            original,
            original.snapshot(),
            data,
            Inputs(program.inputs, program.examples, data),
            record,
            seed=self.seed,
            verify=self.verify,
            examples=self._examples(program) if self.verify != "off" else 0,
            progress=self.progress,
            watch=watch,
        )

    def result(self, run: Run) -> Result:
        """What a run has come to."""
        pipeline = format_pipeline(self.passes, complete=True)
        examples = self._examples(run.original, OF_FILE)
        given = run.given.seal(run.program)
        return Result(run.program, run.record, pipeline, run.inputs, examples, self.seed, run.watch, given)

    def _examples(self, program: Program, most: int = 20) -> int:
        """How many inputs to draw for a check: those that the user wants, else no more than `most`."""
        return self.verify_examples if self.verify_examples is not None else default_examples(program, most)


def default_examples(program: Program, most: int) -> int:
    """How many inputs to draw for a check of the whole network: fewer where each costs more."""
    cost = program_cost(program).macs + OVERHEAD * len(program.graph.nodes)
    return max(FEWEST, min(most, BUDGET // cost))
