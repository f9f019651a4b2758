"""A traced program held against the model that it was traced from, on other values and for other batch sizes.

A symbolic trace can silently bake in what it should not: a random number, a branch, a size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fxcompile.comparing import relative_maximum
from fxcompile.contracts import tolerance
from fxcompile.errors import one_line
from fxcompile.lowering import NoSpelling
from fxcompile.program import Program, flatten_tensors, shape_of
from fxcompile.reference import Reference
from fxcompile.refusals import Impure, Refused


def checked(program: Program, reference: Reference, observed: Any = None) -> Program:
    """The program held against the model, and whether its batch is free written into it.

    Where the raw graph is right on the examples and the model was not seen to look at values, other ones in a larger
    batch say all at once; only if they do not agree is it asked what the reason is.

    Args:
        observed: what the graph that the program was made of gave for the examples.

    Raises:
        Refused: it does not compute what the model computes.
    """
    note = None if _agrees_at_once(program, reference, observed) else _obstacle(program, reference)
    batched = set(reference.batch_inputs())
    axes = [0 if note is None and index in batched else None for index in range(len(program.inputs))]
    specs = tuple(replace(spec, batch_axis=axis) for spec, axis in zip(program.inputs, axes, strict=True))
    return replace(program, inputs=specs, notes=(f"the batch stays fixed: {note}",) if note else ())


def _agrees_at_once(program: Program, reference: Reference, observed: Any) -> bool:
    """Whether the raw graph is right on the examples, and the program on other values, one more of them.

    False wherever that would not settle it: branches and shapes that may depend on values are looked at one by one.
    """
    if (
        reference.suspects
        or not reference.batch_inputs()
        or any(_shape_may_depend_on_values(node) for node in program.graph.nodes)
    ):
        return False
    try:
        _hold(program.output_names, flatten_tensors(observed), reference.output, "on the example inputs")
        larger = reference.other(1, seed=2)
        _same(program, larger, reference.run(larger), "for another batch size")
    except Exception:  # the model takes no other values, or no other batch size; or the program is wrong
        return False
    return True


def _shape_may_depend_on_values(node: fx.Node) -> bool:
    """Whether torch itself cannot tell the shape of a function's result from the shapes of its arguments."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if name == "one_hot":
        return node.args[1:] == (-1,)
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    return any(torch.Tag.dynamic_output_shape in overload.tags for overload in overloads)


def _obstacle(program: Program, reference: Reference) -> str | None:
    """Why the program takes no other batch size than the example's, or None.

    Raises:
        Refused: it does not compute what the model computes for the example's.
    """
    _same(program, reference.examples, reference.output, "on the example inputs")
    inputs, where = reference.other(0, seed=1), "on other values than the examples"
    try:
        expected = reference.run(inputs)
    except Exception:  # the model takes no other values (indices, say): the examples have to do
        inputs, where = list(reference.examples), "when it runs twice on the same inputs"
        expected = reference.run(inputs)
    _same(program, inputs, expected, where)
    return _batch_obstacle(program, reference)


def _batch_obstacle(program: Program, reference: Reference) -> str | None:
    """Why the program takes no other batch size, if it is right for the example's."""
    if not reference.batch_inputs():
        return "the first input has no axis for it"
    larger = reference.other(1, seed=2)
    try:
        expected = reference.run(larger)
    except Exception:
        return _stacking_obstacle(program, reference)
    try:
        _same(program, larger, expected, "for another batch size")
    except Refused as reason:
        return str(reason)
    except Exception as error:
        return f"the graph fails for another one ({one_line(error)})"
    return None


def _stacking_obstacle(program: Program, reference: Reference) -> str | None:
    """The same where the model itself takes only the example's batch: two of those must give their two outputs."""
    batched = set(reference.batch_inputs())
    other = reference.other(0, seed=1)
    stacked = [
        torch.cat([first, second]) if index in batched else first
        for index, (first, second) in enumerate(zip(reference.examples, other, strict=True))
    ]
    other = [tensor if index in batched else reference.examples[index] for index, tensor in enumerate(other)]
    fixed = "the model was written or exported for the example's batch size"
    try:
        parts = zip(flatten_tensors(reference.output), flatten_tensors(reference.run(other)), strict=True)
        shapes = [output.shape for output in _outputs(program, stacked)]
    except Exception:
        return fixed
    expected = []
    for (first, second), shape in zip(parts, shapes, strict=True):
        if first.shape == shape and torch.equal(first, second):
            expected.append(first)
            continue
        axes = [axis for axis, (old, new) in enumerate(zip(first.shape, shape, strict=False)) if old != new]
        if len(first.shape) != len(shape) or len(axes) != 1 or shape[axes[0]] != 2 * first.shape[axes[0]]:
            return "not every output has an axis for it"
        expected.append(torch.cat([first, second], axes[0]))
    try:
        _same(program, stacked, tuple(expected), "for another batch size")
    except Exception:
        return fixed
    return None


def _outputs(program: Program, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a program node by node: the module's own call prints its code to stderr if something fails."""
    copies = [tensor.clone() for tensor in inputs]
    same_shapes = all(ours.shape == theirs.shape for ours, theirs in zip(inputs, program.examples, strict=True))
    run = (ShapeKeeper if same_shapes else fx.Interpreter)(program.module)
    with torch.no_grad():
        return flatten_tensors(run.run(*copies, enable_io_processing=False))


class ShapeKeeper(fx.Interpreter):
    """Runs a program on other values of the examples' shapes; every node must give the shape that it gave for them."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and shape_of(n) not in (None, tuple(value.shape)):
            raise NoSpelling(n, f"the shape of what '{n.name}' gives as its result depends on values")
        return value


def _same(program: Program, inputs: Sequence[Tensor], expected: Any, where: str) -> None:
    """Raises Refused unless the program gives what the model gave."""
    _hold(program.output_names, _outputs(program, inputs), expected, where)


def _hold(names: Sequence[str], given: Sequence[Tensor], expected: Any, where: str) -> None:
    """Raises Refused unless outputs are those that the model gave."""
    wanted = tuple(tensor.detach() for tensor in flatten_tensors(expected))
    if len(given) != len(wanted):
        raise Refused(f"the traced program has {len(given)} outputs and the model {len(wanted)}")
    for name, ours, theirs in zip(names, given, wanted, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise Refused(
                f"output '{name}' is {tuple(ours.shape)} {ours.dtype} in the traced program and "
                f"{tuple(theirs.shape)} {theirs.dtype} in the model {where}"
            )
        if not close(ours, theirs):
            raise Impure(f"output '{name}' differs between the traced program and the model {where}")


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to ten times the rounding that exact rewrites are allowed; the same non-finite values, if any."""
    if not theirs.is_floating_point():
        return torch.equal(ours, theirs)
    places = ~theirs.isfinite()
    if not torch.equal(ours[places].nan_to_num(), theirs[places].nan_to_num()):
        return False
    return relative_maximum(ours, theirs) <= 10 * tolerance(ours.dtype)
