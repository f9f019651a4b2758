"""A model that cannot be followed is refused with the line of its code that is to blame, and what to write there."""

import contextlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import refused
import torch
from forms import Written
from refused import FAILS, REFUSED
from torch import Tensor, nn

from fxcompile.errors import TraceError
from fxcompile.tracing import trace


def model_of(function: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    attributes = {"average": torch.zeros(1), "mean": torch.zeros(4), "var": torch.ones(4), "count": 0, "seen": []}
    return Written(function, conv=nn.Conv2d(3, 4, 3), **attributes, last=None, other=None)


def example() -> Tensor:
    return torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(1))


def own_attributes(model: nn.Module) -> dict[str, Any]:
    held = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    return {name: list(value) if isinstance(value, list) else value for name, value in held.items()}


@pytest.mark.parametrize("name", REFUSED)
def test_the_line_of_the_model_and_the_mend_are_named(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    function, problem, mend = REFUSED[name]
    lines, first = inspect.getsourcelines(function)
    (offset,) = (index for index, line in enumerate(lines) if line.rstrip().endswith("# here"))
    with pytest.raises(TraceError) as caught:
        trace(model_of(function), example())
    assert caught.value.place == f"{refused.__file__}:{first + offset}"
    assert problem in caught.value.problem
    assert (lines[offset].strip() in caught.value.problem) == (problem != FAILS[0])
    assert caught.value.mend is not None
    assert caught.value.mend.startswith(mend)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", ""), "the sentence is all that there is to read"


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_model_is_as_it_was(name: str) -> None:
    model = model_of(REFUSED[name][0])
    random_state, attributes = torch.get_rng_state(), own_attributes(model)
    before = {key: (id(tensor), tensor.clone()) for key, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(TraceError):
        trace(model, example())
    after = model.state_dict(keep_vars=True)
    assert {key: id(tensor) for key, tensor in after.items()} == {key: held[0] for key, held in before.items()}
    if name != "weights_in_place":  # its first run writes to parameters past autograd, and no copy is kept of those
        assert all(torch.equal(tensor, before[key][1]) for key, tensor in after.items())
    assert own_attributes(model) == attributes
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert nn.Module.__setattr__.__module__ == "torch.nn.modules.module", "no longer watched"


def holding(name: str, value: Any) -> nn.Module:
    """A model with something in it that no tracer follows."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    if isinstance(value, nn.Module):
        model.add_module(name, value)
    else:
        model.register_buffer(name, value)
    return model


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], str, str, str]] = {
    "scripted": (
        lambda: holding("head", torch.jit.script(nn.ReLU())),
        "layer 'head'",
        "TorchScript holds no Python",
        "put the nn.Module it was made from in its place",
    ),
    "scripted model": (
        lambda: torch.jit.script(nn.Conv2d(3, 4, 3)),
        "model RecursiveScriptModule",
        "TorchScript holds no Python",
        "put the nn.Module it was made from in its place",
    ),
    "compiled": (
        lambda: holding("head", torch.compile(nn.ReLU())),
        "layer 'head'",
        "it was compiled",
        "put the module it was made from, its `._orig_mod`, in its place",
    ),
    "quantised layer": (
        lambda: holding("q", torch.ao.nn.quantized.Quantize(0.1, 0, torch.quint8)),
        "layer 'q'",
        "it is quantised already",
        "trace the model before it was quantised",
    ),
    "quantised tensor": (
        lambda: holding("table", torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)),
        "tensor 'table'",
        "it is quantised already",
        "trace the model before it was quantised",
    ),
    "sparse": (
        lambda: holding("links", torch.eye(4).to_sparse()),
        "tensor 'links'",
        "it is a sparse tensor",
        "make it dense with .to_dense()",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(4, 3)),
        "tensor '0.weight'",
        "a lazy layer has no weights yet",
        "run the model once on an example before tracing it",
    ),
    "meta": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, device="meta")),
        "tensor '0.weight'",
        "it is on the meta device and has no values",
        "load its weights first",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_no_tracer_follows_is_refused_by_name(name: str) -> None:
    make, place, problem, mend = UNSUPPORTED[name]
    with pytest.raises(TraceError) as caught:
        trace(make(), example())
    assert (caught.value.place, caught.value.mend) == (place, mend)
    assert problem in caught.value.problem


def test_what_an_export_left_behind_is_refused_by_name() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.features = m.conv(x)
        return m.features.relu()

    model = model_of(forward).eval()
    with contextlib.redirect_stderr(None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.export(model, (example(),), strict=False)
    with pytest.raises(TraceError, match=r"tensor 'features': it is a fake tensor that torch\.export left there"):
        trace(model, example())


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.conv(x) * scale


class Returning(Plain):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Any:
        return self.value


def defined_at(kind: type[nn.Module]) -> str:
    return f"{__file__}:{inspect.getsourcelines(kind.forward)[1]}"


BAD_EXAMPLES: dict[str, tuple[Any, str]] = {
    "two for one": ((example(), example()), "(x: 2x3x5x6 float32, input_1: 2x3x5x6 float32)"),
    "another name": ({"image": example()}, "(image: 2x3x5x6 float32)"),
    "another rank": (torch.zeros(2, 3), "(x: 2x3 float32)"),
    "other channels": (torch.zeros(2, 4, 5, 6), "(x: 2x4x5x6 float32)"),
    "smaller than the kernel": (torch.zeros(2, 3, 2, 2), "(x: 2x3x2x2 float32)"),
    "another dtype": (torch.zeros(2, 3, 5, 6, dtype=torch.int64), "(x: 2x3x5x6 int64)"),
}


@pytest.mark.parametrize("name", BAD_EXAMPLES)
def test_examples_that_the_model_does_not_take_are_shown(name: str) -> None:
    inputs, shown = BAD_EXAMPLES[name]
    with pytest.raises(TraceError) as caught:
        trace(Plain(), inputs)
    assert caught.value.problem.startswith(f"the model fails on the example inputs {shown}: ")
    called = name in ("two for one", "another name")
    assert caught.value.place == (defined_at(Plain) if called else defined_at(Plain).replace(*next_line(Plain)))
    assert caught.value.mend == "give the inputs that forward takes, with their batch axis (--input-shape 1x3x224x224)"


def next_line(kind: type[nn.Module]) -> tuple[str, str]:
    number = inspect.getsourcelines(kind.forward)[1]
    return f":{number}", f":{number + 1}"


@pytest.mark.parametrize("inputs", [(), {}, (3,), {"scale": 2.0}], ids=str)
def test_a_call_without_a_tensor_is_refused(inputs: Any) -> None:
    with pytest.raises(TraceError, match="no tensor among the example inputs; give the tensors that forward takes"):
        trace(Plain(), inputs)


@pytest.mark.parametrize("value", [None, 3.0, (1, 2), {"loss": 0.5}, "text"], ids=str)
def test_a_model_that_returns_no_tensor_is_refused_where_its_forward_is(value: Any) -> None:
    with pytest.raises(TraceError) as caught:
        trace(Returning(value), example())
    assert caught.value.place == defined_at(Returning)
    assert caught.value.problem == f"the model returns no tensor but {type(value).__name__}"
    assert caught.value.mend == "return the tensors that shall be the outputs"


def test_an_exported_program_is_refused_with_the_line_it_was_exported_from() -> None:
    class Masked(Plain):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            y = self.conv(x)
            return y[y > 0]  # here

    lines, first = inspect.getsourcelines(Masked.forward)
    program = torch.export.export(Masked().eval(), (example(),), strict=False)
    with pytest.raises(TraceError, match="picks out as its result depends on values") as caught:
        trace(program)
    assert caught.value.place == f"{__file__}:{first + len(lines) - 1}"


def test_an_exported_program_with_a_part_that_torch_cannot_run_is_refused() -> None:
    class Graph(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.graph = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return self.graph(self.conv(x))

    program = torch.export.export(Graph().eval(), (example(),), strict=False)
    with pytest.raises(TraceError, match=r"has a part 'graph\.weight', and torch runs none of that name; rename it"):
        trace(program)


def test_a_layer_of_torch_that_is_to_blame_is_not_taken_for_a_line_of_the_caller() -> None:
    with pytest.raises(TraceError) as caught:
        trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.FractionalMaxPool2d(2, output_size=3)), torch.rand(2, 3, 9, 9))
    assert str(caught.value).startswith("model Sequential: the model cannot be traced: forward draws random numbers; ")
