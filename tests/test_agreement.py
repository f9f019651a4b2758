"""A traced program that does not do what the model does is found out: on the examples, other values, other batches."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from forms import Written
from torch import Tensor, fx, nn

from fxcompile.agreement import checked, close
from fxcompile.lowering import NoSpelling
from fxcompile.program import Program, output_node, propagate_shapes
from fxcompile.reference import Reference
from fxcompile.refusals import Impure, Refused
from fxcompile.signature import Signature
from fxcompile.tracing import trace


def image(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


def pair(forward: Callable[..., Any] = lambda m, x: m.conv(x).relu()) -> tuple[Program, Reference]:
    torch.manual_seed(0)
    model = Written(forward, conv=nn.Conv2d(3, 4, 3, padding=1)).eval()
    return trace(model, image()), Reference(model, Signature.of(model, (image(),), {}))


def last(program: Program) -> fx.Node:
    (node,) = output_node(program.graph).all_input_nodes
    return node


def put_behind(program: Program, function: Callable[..., Any], *args: Any) -> None:
    """A function between the program's last operation and its output."""
    node = last(program)
    with program.graph.inserting_after(node):
        new = program.graph.call_function(function, (node, *args))
    output_node(program.graph).replace_input_with(node, new)
    propagate_shapes(program.module, program.examples)


def test_a_program_as_it_was_traced_agrees() -> None:
    program, reference = pair()
    assert (
        checked(replace(program, inputs=tuple(replace(i, batch_axis=None) for i in program.inputs)), reference)
        == program
    )


@pytest.mark.parametrize("factor", [1 + 1e-3, -1.0, float("nan")])
def test_another_weight_is_found_out_on_the_examples(factor: float) -> None:
    program, reference = pair()
    program.module.conv = nn.Conv2d(3, 4, 3, padding=1)
    program.module.conv.weight = nn.Parameter(reference.model.conv.weight * factor)  # type: ignore[attr-defined]
    with pytest.raises(Impure, match=r"output 'output' differs between .* and the model on the example inputs"):
        checked(program, reference)


def test_rounding_is_no_difference() -> None:
    program, reference = pair()
    put_behind(program, torch.mul, 1 + 1e-6)
    assert checked(program, reference).batch_is_free


def test_what_holds_for_the_examples_alone_is_found_out_on_other_values() -> None:
    program, reference = pair()
    (answer,) = program.outputs(image())
    put_behind(program, lambda x: torch.where(x == answer, x, x + 1))
    with pytest.raises(Impure, match="and the model on other values than the examples"):
        checked(program, reference)


def test_a_shape_that_depends_on_values_is_found_out() -> None:
    program, reference = pair()
    (answer,) = program.outputs(image())
    put_behind(program, lambda x: x[:, : 4 if torch.equal(x, answer) else 3])
    node = last(program)
    with pytest.raises(NoSpelling, match=r"the shape of what '.*' gives as its result depends on values") as caught:
        checked(program, reference)
    assert caught.value.node is node


def test_outputs_of_another_number_shape_or_dtype_are_found_out() -> None:
    for function, words in (
        (lambda x: (x, x), r"has 2 outputs and the model 1"),
        (
            lambda x: x.mean(1),
            r"output 'output' is \(2, 5, 5\) torch.float32 .* and \(2, 4, 5, 5\) torch.float32 in the model",
        ),
        (
            Tensor.double,
            r"output 'output' is \(2, 4, 5, 5\) torch.float64 .* and \(2, 4, 5, 5\) torch.float32 in the model",
        ),
    ):
        program, reference = pair()
        put_behind(program, function)
        with pytest.raises(Refused, match=words):
            checked(program, reference)


def test_a_batch_that_is_baked_in_stays_fixed_and_is_no_error() -> None:
    program, reference = pair()
    put_behind(program, lambda x: x + torch.zeros(2, 1, 1, 1))
    result = checked(program, reference)
    assert [spec.batch_axis for spec in result.inputs] == [None]
    (note,) = result.notes
    assert note.startswith("the batch stays fixed: the graph fails for another one (")
    program, reference = pair()
    put_behind(program, lambda x: x[:2])
    (note,) = checked(program, reference).notes
    assert note.startswith("the batch stays fixed: output 'output' is (2, 4, 5, 5)")


def test_samples_that_see_each_other_do_not_make_a_batch() -> None:
    """The model takes two samples only; the program takes more, and then mixes them otherwise."""

    def forward(m: Any, x: Tensor) -> Tensor:
        assert x.shape[0] == 2
        return m.conv(x) - x.flip(0).mean()

    program, _ = pair(forward)
    assert program.notes == ("the batch stays fixed: the model was written or exported for the example's batch size",)


def test_a_model_that_takes_no_other_values_is_held_to_the_examples() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if not bool((x.flatten()[:3] == image().flatten()[:3]).all()):
            raise ValueError("no such values")
        return m.conv(x)

    torch.manual_seed(0)
    model = Written(forward, conv=nn.Conv2d(3, 4, 3, padding=1)).eval()
    plain, _ = pair(lambda m, x: m.conv(x))
    reference = Reference(model, Signature.of(model, (image(),), {}))
    assert checked(plain, reference).notes
    put_behind(plain, torch.neg)
    with pytest.raises(Impure, match="on the example inputs"):
        checked(plain, reference)


def test_closeness_is_of_the_largest_value_and_of_the_dtype() -> None:
    wide = torch.tensor([1e6, 1.0, 0.0])
    assert close(wide + torch.tensor([0.0, 0.0, 1.0]), wide)
    assert not close(wide + torch.tensor([0.0, 0.0, 1e3]), wide)
    assert not close(wide.double() + 1e-3, wide.double())
    assert close(torch.tensor([float("nan"), float("inf"), 1.0]), torch.tensor([float("nan"), float("inf"), 1.0]))
    assert not close(torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, float("nan")]))
    assert not close(torch.tensor([float("inf"), 1.0]), torch.tensor([float("-inf"), 1.0]))
    assert not close(torch.tensor([1, 2]), torch.tensor([1, 3]))
    assert close(torch.zeros(3), torch.zeros(3))
    assert not close(torch.full((3,), 1e-9), torch.zeros(3))
