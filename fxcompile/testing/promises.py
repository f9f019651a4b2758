"""What a pass promises about the function it leaves: one function a promise, which raises `Broken`."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompile.calibration import as_calibration
from fxcompile.comparing import Broken, relative_maximum
from fxcompile.contracts import Exact, tolerance
from fxcompile.drawing import random_like
from fxcompile.errors import FxcompileError
from fxcompile.layers import is_finite
from fxcompile.manager import PassManager
from fxcompile.program import FEATURE, ORIGIN, PART, Program, fetch, flatten_tensors
from fxcompile.rounding import NOISE, compare_noisy, rounding_reach
from fxcompile.runtime import feeds_of, open_session, run_session
from fxcompile.sitedata import full_batches, synthetic_batch
from fxcompile.testing.trial import Trial


def completes(trial: Trial) -> None:
    """The passes run through: nothing is raised, and each replacement fits in its place."""
    assert trial.result


def same_function(trial: Trial) -> None:
    """Each output is the model's own up to rounding: `max|d| <= 1e-12 * max|y|` in float64.

    A network that amplifies rounding past that is allowed what perturbing its layers by rounding gives.
    """
    for inputs, given, wanted in compared(trial):
        if trial.is_exact:
            check_close(given, wanted, trial.program, inputs)
        elif not all(map(is_finite, given)):
            raise Broken("an output is not finite where the model's is")


Tensors = Sequence[Tensor]


def compared(trial: Trial) -> Iterator[tuple[Tensors, Tensors, Tensors]]:
    """Inputs that the model takes, what the rewritten module gives for them, and what the model does.

    Raises:
        Broken: those are not of the same number, shapes and dtypes.
    """
    for inputs in trial.inputs:
        wanted = trial.wanted(inputs)
        if wanted is not None:
            given = trial.given(inputs)
            check_forms(given, wanted, trial.program)
            yield inputs, given, wanted


def faithful_trace(trial: Trial) -> None:
    """The traced program, before any pass, computes what the model does; if not, the compiler is wrong, no pass."""
    for inputs in trial.inputs:
        wanted = trial.wanted(inputs)
        if wanted is not None:
            given = trial.program.outputs(*[tensor.clone() for tensor in inputs])
            check_forms(given, wanted, trial.program)
            check_close(given, wanted, trial.program, inputs)


def check_forms(given: Sequence[Tensor], wanted: Sequence[Tensor], program: Program) -> None:
    """Raise `Broken` unless there are as many outputs, of the same shapes and dtypes."""
    if len(given) != len(wanted):
        raise Broken(f"there are {len(given)} outputs instead of {len(wanted)}")
    for name, ours, theirs in zip(program.output_names, given, wanted, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise Broken(
                f"'{name}' is {tuple(ours.shape)} {ours.dtype} instead of {tuple(theirs.shape)} {theirs.dtype}"
            )


def check_close(given: Sequence[Tensor], wanted: Sequence[Tensor], program: Program, inputs: Sequence[Tensor]) -> None:
    """Raise `Broken` unless each output is within the tolerance of its dtype, or within the reach of rounding."""
    reach: list[float] = []
    for index, (name, ours, theirs) in enumerate(zip(program.output_names, given, wanted, strict=True)):
        allowed = tolerance(theirs.dtype)
        error = relative_maximum(ours, theirs)
        if error <= allowed:
            continue
        reach = reach or rounding_reach(program, inputs, wanted)
        if not error <= NOISE * reach[index]:
            raise Broken(f"'{name}' differs by {error:.2e} of its largest value, and {allowed:.0e} is allowed")


def same_in_float32(trial: Trial) -> None:
    """In float32, too, each output is the model's own, in the tolerance of that dtype."""
    single = trial.single()
    for inputs, given, wanted in compared(single):
        if trial.is_exact:
            compare_noisy(given, wanted, single.program, inputs)


def gradients(trial: Trial) -> None:
    """The rewritten module trains: gradients, finite ones, reach every parameter, as they did in the program."""
    for mode in ("train", "eval"):
        before = _gradients(copy.deepcopy(trial.program.module), trial.examples, mode)
        if before is None:
            continue
        after = _gradients(copy.deepcopy(trial.result.program.module), trial.examples, mode)
        if after is None:
            raise Broken(f"in {mode} mode the rewritten module fails, forwards or backwards, and the model does not")
        lost = [name for name, gradient in after.items() if gradient is None and before.get(name, 0) is not None]
        if lost:
            raise Broken(f"in {mode} mode no gradient reaches parameter '{lost[0]}'")
        # In train mode a batch norm that was folded kept values where an activation is not flat.
        stopped = mode == "eval" and _flows(before) and after and not _flows(after)
        if stopped and (trial.is_exact or _stops_everywhere(trial)):
            raise Broken(f"in {mode} mode all gradients are zero, and those of the model are not")
        if all(gradient is None or is_finite(gradient) for gradient in before.values()):
            wrong = [name for name, gradient in after.items() if gradient is not None and not is_finite(gradient)]
            if wrong:
                raise Broken(f"in {mode} mode the gradient of parameter '{wrong[0]}' is not finite")


OTHER_INPUTS = 5
"""Random inputs on which a pass that is not exact must let gradients through, where all do in the model."""


def _stops_everywhere(trial: Trial) -> bool:
    """Whether all gradients are zero on random inputs, too, on each of which some are not in the program.

    On one input, an error that a pass may make can switch off the only pixel where a ReLU was on.
    """
    generator = torch.Generator().manual_seed(trial.seed)
    for _ in range(OTHER_INPUTS):
        inputs = [random_like(example, list(example.shape), generator) for example in trial.examples]
        before, after = (
            _gradients(copy.deepcopy(program.module), inputs, "eval")
            for program in (trial.program, trial.result.program)
        )
        if before is None or after is None or not _flows(before) or _flows(after):
            return False
    return True


def same_trainable(trial: Trial) -> None:
    """What trained still trains, and what was frozen stays frozen, where a layer comes from one kind alone."""
    program, result = trial.program, trial.result.program
    before: dict[str, set[bool]] = {}
    for node in program.graph.nodes:
        for name in node.meta.get(ORIGIN, ()):
            before.setdefault(name, set()).update(_trains(program, node))
    for node in result.graph.nodes:
        wanted = {trains for name in node.meta.get(ORIGIN, ()) for trains in before.get(name, ())}
        if len(wanted) == 1 and _trains(result, node) - wanted:
            trained, now = ("trained", "does not any more") if True in wanted else ("was frozen", "trains now")
            raise Broken(f"layer '{node.target}' {trained} in the model, and {now}")


def _trains(program: Program, node: fx.Node) -> set[bool]:
    """Whether the numbers that a node holds train: parameters of a layer, or a tensor that stands by itself."""
    layer = program.layer(node)
    if layer is not None:
        return {item.requires_grad for item in layer.parameters()}
    held = fetch(program.module, str(node.target)) if node.op == "get_attr" else None
    if not isinstance(held, Tensor) or not held.is_floating_point():
        return set()
    return {isinstance(held, nn.Parameter) and held.requires_grad}


ROUNDING = 1e-10
"""Size of a gradient in float64 below which it may be zero: weights and inputs of the kit's networks are near 1."""


def _flows(gradients: dict[str, Tensor | None]) -> bool:
    """Whether some gradient is more than what rounding leaves of zero, as behind a norm that takes out a scale."""
    return any(gradient is not None and bool((gradient.abs() > ROUNDING).any()) for gradient in gradients.values())


def _gradients(module: fx.GraphModule, examples: Sequence[Tensor], mode: str) -> dict[str, Tensor | None] | None:
    """The gradient of each parameter that trains, or None where the module cannot be run or trained."""
    module.train(mode == "train")
    try:
        with torch.random.fork_rng(devices=[]):
            outputs = flatten_tensors(module(*[tensor.clone() for tensor in examples]))
        total = sum((tensor.sum() for tensor in outputs if tensor.requires_grad), torch.zeros(()))
        if total.requires_grad:
            total.backward()
    except (RuntimeError, ValueError):
        return None
    return {name: item.grad for name, item in module.named_parameters() if item.requires_grad}


def stated_error(trial: Trial) -> None:
    """The error that a pass and its sites state is the one that is measured, none above `max_error`; exact ones state
    none.
    """
    for report, pass_ in zip(trial.result.record.passes, trial.passes, strict=True):
        for site in report.sites:
            if site.outcome != "kept":
                continue
            if isinstance(pass_.promise, Exact) and site.error is not None:
                raise Broken(f"site '{site.name}' of an exact pass states an error of {site.error}")
            if pass_.max_error is not None and (site.error or 0.0) > pass_.max_error:
                raise Broken(f"site '{site.name}' was kept with error {site.error}, above max_error={pass_.max_error}")
    if trial.is_exact or not trial.kept:
        return
    batches = _measuring(trial)
    # Of several passes, what the last one that rewrote something and is not exact states: exact ones change nothing.
    reports = zip(trial.result.record.passes, trial.passes, strict=True)
    lossy = [report for report, pass_ in reports if report.outcome == "kept" and not isinstance(pass_.promise, Exact)]
    stated = lossy[-1].error if lossy else 0.0
    measured = _error([trial.given(batch) for batch in batches], [_outputs(trial.model, batch) for batch in batches])
    if stated is None or not _near(stated, measured):
        raise Broken(f"the pass states an error of {stated} and {measured:.6g} is measured")
    if len(trial.passes) == 1:
        ours, theirs = (_features(program, batches) for program in (trial.result.program, trial.program))
        for site in trial.kept:
            name = _feature_of(trial, site.name)
            if name is None or name not in ours:
                continue
            found = _error(ours[name], theirs[name])
            if site.error is None or not _near(site.error, found):
                raise Broken(f"site '{site.name}' states an error of {site.error} and {found:.6g} is measured")


def _measuring(trial: Trial) -> list[tuple[Tensor, ...]]:
    """The batches on which errors are measured: calibration samples held out, or random ones without calibration."""
    if trial.calibration is None:
        return [synthetic_batch(trial.program, trial.seed)]
    _, held = as_calibration(trial.calibration, trial.program.inputs).split(seed=trial.seed)
    return full_batches(held, trial.program)


def _outputs(model: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return flatten_tensors(model(*[tensor.clone() for tensor in batch]))


def _features(program: Program, batches: Sequence[Sequence[Tensor]]) -> dict[str, list[tuple[Tensor, ...]]]:
    """The values of all nodes that stand for a node of the original program, by that node's name."""
    found: dict[str, list[tuple[Tensor, ...]]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and FEATURE in n.meta and PART not in n.meta:
                found.setdefault(n.meta[FEATURE], []).append((value,))
            return value

    with torch.no_grad():
        for batch in batches:
            Recorder(program.module).run(*[tensor.clone() for tensor in batch], enable_io_processing=False)
    return found


def _feature_of(trial: Trial, name: str) -> str | None:
    """The original node that a site's layer gives; None for several calls, over all of which its error is."""
    found = [node.name for node in trial.program.graph.nodes if node.op == "call_module" and str(node.target) == name]
    return found[0] if len(found) == 1 else None


def _error(ours: Sequence[Sequence[Tensor]], theirs: Sequence[Sequence[Tensor]]) -> float:
    """Relative L2 error over all batches, of the tensor of which it is largest."""
    worst = 0.0
    for mine, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        a, b = (torch.cat([tensor.double().flatten() for tensor in tensors]) for tensors in (mine, other))
        difference, scale = float((a - b).norm()), float(b.norm())
        worst = max(worst, difference / scale if scale else (0.0 if not difference else float("inf")))
    return worst


def _near(stated: float, measured: float) -> bool:
    if not (math.isfinite(stated) and math.isfinite(measured)):
        return stated == measured
    return abs(stated - measured) <= 1e-3 * max(stated, measured) + 1e-9


def verified(trial: Trial) -> None:
    """The compiler's own verification has nothing to say against the passes."""
    trial.run(verify="raise", verify_examples=4)


def same_in_onnx(trial: Trial) -> bool:
    """The emitted file computes in ONNX Runtime what the model does, in float32.

    Returns:
        Whether there is a file: not where the network itself, without the passes, is not exported.
    """
    single = trial.single()
    result = single.run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            result.save_onnx(path)
        except FxcompileError as error:
            if not _is_exported(single.program, Path(folder) / "before.onnx"):
                return False
            raise Broken(f"the result is not exported: {error}") from error
        session = open_session(path)
        for inputs in single.inputs:
            wanted = single.wanted(inputs)
            if wanted is not None:
                given = run_session(session, feeds_of(session, single.program, inputs))
                target = single.program if trial.is_exact else result.program
                compare_noisy(given, wanted if trial.is_exact else target.outputs(*inputs), target, inputs)
    return True


def _is_exported(program: Program, path: Path) -> bool:
    """Whether a program is exported as it is."""
    try:
        PassManager([]).run(program).save_onnx(path)
    except FxcompileError:
        return False
    return True
