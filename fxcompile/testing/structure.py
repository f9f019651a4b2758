"""What a pass promises about everything but the function: what it leaves alone, records, keeps small and repeats."""

from __future__ import annotations

import glob
from typing import Any

import torch
from torch import nn

from fxcompile.comparing import Broken
from fxcompile.cost import program_cost
from fxcompile.layers import BATCH_NORMS, CONVOLUTIONS, INSTANCE_NORMS, TRANSPOSED
from fxcompile.manager import Result
from fxcompile.program import ORIGIN, Program, ShapeRecorder, dtype_of, shape_of
from fxcompile.rewriting import Site
from fxcompile.testing.trial import Trial


def model_untouched(trial: Trial) -> None:
    """The model's parameters, buffers and modes, the program that went in, and all random generators are untouched."""
    assert trial.result
    for what, held in (("the model", trial.before), ("the program that went in", trial.traced)):
        changed = held.difference()
        if changed is not None:
            raise Broken(f"{what} was changed: {changed}")
    used = trial.before.moved_generator()
    if used is not None:
        raise Broken(f"the global random generator of {used} was used: draw from one with a seed of your own")


def graph_sound(trial: Trial) -> None:
    """The graph is canonical, has the inputs and outputs that it had, and holds no parameter that nothing uses."""
    program = trial.result.program
    try:
        program.graph.lint()
    except Exception as error:
        raise Broken(f"the graph does not lint: {error}") from error
    for node in program.graph.nodes:
        if node.op == "call_method":
            raise Broken(f"node '{node.name}' is a call of a method, which is not canonical")
    if (program.inputs, program.output_names) != (trial.program.inputs, trial.program.output_names):
        raise Broken("the names or shapes of inputs or outputs changed")
    used = {str(node.target) for node in program.graph.nodes if node.op in ("call_module", "get_attr")}
    for name, _ in program.module.named_parameters():
        if name not in used and not any(name.startswith(f"{target}.") for target in used):
            raise Broken(f"parameter '{name}' is kept and nothing uses it")


def shapes_recorded(trial: Trial) -> None:
    """Each node carries the shape and dtype that it really has."""
    program = trial.result.program
    before = {node.name: (shape_of(node), dtype_of(node)) for node in program.graph.nodes}
    again = program.snapshot()
    with torch.no_grad():
        ShapeRecorder(again.module).run(*[x.clone() for x in program.examples], enable_io_processing=False)
    for old, node in zip(program.graph.nodes, again.graph.nodes, strict=True):
        found = shape_of(node), dtype_of(node)
        if node.op not in ("placeholder", "output") and before[old.name] != found:
            raise Broken(f"node '{old.name}' is recorded as {before[old.name]} and computes {found}")


def origins_recorded(trial: Trial) -> None:
    """Each node says which layers of the model it comes from."""
    origins = {name for node in trial.program.graph.nodes for name in node.meta.get(ORIGIN, ())}
    for node in trial.result.program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        unknown = set(node.meta.get(ORIGIN, ())) - origins
        if unknown or not node.meta.get(ORIGIN):
            raise Broken(
                f"node '{node.name}' does not say which layers of the model it comes from ({unknown or 'none'})"
            )


def layers_consistent(trial: Trial) -> None:
    """Each layer's tensors have the shapes that its options name, from which other passes and savers read."""
    for name, layer in trial.result.program.module.named_modules():
        for key, wanted in stated_shapes(layer).items():
            found = getattr(layer, key)
            if found is not None and tuple(found.shape) != wanted:
                raise Broken(
                    f"layer '{name}' is {layer}, and yet its {key} has shape {tuple(found.shape)}, not {wanted}"
                )


def stated_shapes(layer: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's tensors, as its options give them."""
    if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        rows, columns = layer.out_channels, layer.in_channels
        if isinstance(layer, TRANSPOSED):
            rows, columns = columns, rows
        return {"weight": (rows, columns // layer.groups, *layer.kernel_size), "bias": (layer.out_channels,)}
    if isinstance(layer, nn.Linear):
        return {"weight": (layer.out_features, layer.in_features), "bias": (layer.out_features,)}
    if isinstance(layer, (*BATCH_NORMS, *INSTANCE_NORMS)):
        return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (layer.num_features,))
    if isinstance(layer, nn.GroupNorm):
        return dict.fromkeys(("weight", "bias"), (layer.num_channels,))
    return {"weight": (layer.num_parameters,)} if isinstance(layer, nn.PReLU) else {}


def nothing_copied(trial: Trial) -> None:
    """What is shared stays shared: the network grows by no more parameters than its sites say that they grow."""
    grown = program_cost(trial.result.program).parameters - program_cost(trial.program).parameters
    stated = sum(site.after.parameters - site.before.parameters for site in trial.kept)
    if grown > stated:
        raise Broken(
            f"the network grew by {grown} parameters and its sites by {stated}: a weight that several layers share, or "
            "a layer that is called several times, was copied"
        )


def rest_untouched(trial: Trial) -> None:
    """A model without sites comes out as it went in, and layers outside of all sites keep their very tensors."""
    program, result = trial.program, trial.result.program
    if not trial.kept:
        if text(program) != text(result):
            raise Broken("no site was rewritten, and yet the graph changed")
        same_layers(program, result, set())
        return
    touched = {name for node in result.graph.nodes for name in node.meta.get(ORIGIN, ()) if len(node.meta[ORIGIN]) > 1}
    same_layers(program, result, touched | {name for site in trial.kept for name in (site.name, *site.layers)})


def same_layers(program: Program, result: Program, touched: set[str]) -> None:
    """Raise `Broken` unless layers that are in both programs, and not among the touched ones, hold the same tensors."""
    for node in result.graph.nodes:
        name = str(node.target)
        layer = result.layer(node)
        if layer is None or name in touched or any(name.startswith(f"{item}.") for item in touched):
            continue
        try:
            old = program.module.get_submodule(name)
        except AttributeError:
            continue
        ours, theirs = ({**dict(item.named_parameters()), **dict(item.named_buffers())} for item in (layer, old))
        if any(ours.get(key) is not theirs.get(key) for key in {*ours, *theirs}):
            raise Broken(f"layer '{name}' is in no site that was rewritten, and yet it has other tensors")
        if (type(layer), layer.extra_repr()) != (type(old), old.extra_repr()):
            raise Broken(f"layer '{name}' is in no site that was rewritten, and yet it is {layer} and was {old}")


def text(program: Program) -> list[str]:
    """The nodes of a graph as text, names and all."""
    return [str(node.format_node()) for node in program.graph.nodes]


def repeatable(trial: Trial) -> None:
    """The same seed gives the same bits, whatever the global random generator stands at; but where time is measured."""
    if any(pass_.measures_time for pass_ in trial.passes):
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(987654321)
        again = trial.run()
    difference = differs(trial.result, again)
    if difference is not None:
        raise Broken(f"a second run with the same seed gives something else: {difference}")


def differs(first: Result, second: Result) -> str | None:
    """In what two results differ, or None."""
    if text(first.program) != text(second.program):
        return "another graph"
    ours, theirs = first.program.module.state_dict(), second.program.module.state_dict()
    if list(ours) != list(theirs):
        return "other layers"
    for name, tensor in ours.items():
        if tensor.shape != theirs[name].shape or not torch.equal(tensor.nan_to_num(), theirs[name].nan_to_num()):
            return f"another '{name}'"
    return None


def idempotent(trial: Trial) -> None:
    """Where a single pass claims it: on its own result it finds nothing more to do."""
    if len(trial.passes) != 1 or not trial.passes[0].idempotent:
        return
    again = trial.run(program=trial.result.program)
    kept = [site.name for report in again.record.passes for site in report.sites if site.outcome == "kept"]
    if kept:
        raise Broken(f"run again on its own result, the pass rewrites '{kept[0]}'")
    if text(again.program) != text(trial.result.program):
        raise Broken("run again on its own result, the pass changes the graph")


def selection(trial: Trial) -> None:
    """`only` and `skip` of a single pass are honoured: what is not selected stays, what is selected is rewritten."""
    if len(trial.passes) != 1:
        return
    (pass_,) = trial.passes
    found = [site for site in pass_.sites(trial.program) if isinstance(site, Site) and pass_.selects(site.name)]
    if not found:
        return
    name = found[trial.site % len(found)].name
    usual = {site.name for site in trial.kept}
    for option in ("skip", "only"):
        result = trial.run([pass_.model_copy(update={option: (glob.escape(name),)})])
        kept = {item.name for item in result.record.passes[0].sites if item.outcome == "kept"}
        wrong = kept & {name} if option == "skip" else kept - {name}
        if wrong:
            raise Broken(f"with {option}={name} the pass rewrites '{min(wrong)}'")
        if option == "only" and name in usual and not kept:
            raise Broken(f"the pass rewrites '{name}', and with only={name} it does not")
        if not kept and text(result.program) != text(trial.program):
            raise Broken(f"with {option}={name} no site is rewritten, and yet the graph changed")


def savings(trial: Trial) -> None:
    """Each site saves what `min_saving` asks for."""
    for report, pass_ in zip(trial.result.record.passes, trial.passes, strict=True):
        for site in report.sites:
            if site.outcome != "kept":
                continue
            saved = 1 - site.after.macs / site.before.macs if site.before.macs else 0.0
            if pass_.min_saving is not None and saved < pass_.min_saving:
                raise Broken(f"site '{site.name}' saves {saved:.0%}, below min_saving={pass_.min_saving:g}")
