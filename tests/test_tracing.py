"""Every way to write and to call a model ends as the same kind of program, which computes what the model does."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from calls import MODELS, build, drawn, image, leaves
from forms import assert_canonical, exported, form
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize

import fxcompile.tracing
from fxcompile.comparing import relative_maximum
from fxcompile.errors import TraceError
from fxcompile.tracing import trace


@pytest.mark.parametrize("road", ["symbolic", "export"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_canonical_and_computes_what_the_model_does(
    name: str, road: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, args, kwargs = build(name)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    attributes = {key: list(vars(module)) for key, module in net.named_modules()}
    random_state = torch.get_rng_state()
    if road == "export":
        monkeypatch.setattr(fxcompile.tracing, "symbolic_graph", refuse)
    program = trace(net, args, kwargs)
    assert_canonical(program, net)
    assert all(module.training for module in net.modules())
    assert {key: list(vars(module)) for key, module in net.named_modules()} == attributes
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert program.batch_is_free, program.notes
    net.eval()
    for batch in (1, 2, 5):
        other_args, other_kwargs = drawn((args, kwargs), batch, batch)
        with torch.no_grad():
            expected = leaves(net(*other_args, **other_kwargs))
        assert_equal(program.outputs(*leaves((other_args, other_kwargs))), expected)


def refuse(*args: Any) -> Any:
    raise RuntimeError("not to be followed")


def assert_equal(given: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    for ours, theirs in zip(given, expected, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert relative_maximum(ours, theirs) <= tolerance


@pytest.mark.parametrize("road", ["symbolic", "export", "exported", "fixed batch"])
def test_a_parameter_of_two_layers_stays_one(road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).double()
    net[2].weight = net[0].weight
    x = image(2, 4, 7, 7)
    if road == "export":
        monkeypatch.setattr(fxcompile.tracing, "symbolic_graph", refuse)
    given = net if road in ("symbolic", "export") else exported(net, (x,), dynamic=road == "exported")
    program = trace(given, x)
    assert_canonical(program, net)
    first, second = (layer for _, layer in program.layers(nn.Conv2d))
    assert first.weight is second.weight
    assert first.bias is not second.bias
    assert program.tied()[id(first.weight)] == {"0", "2"}
    assert_equal(program.outputs(x), [net(x).detach()])


def weight_normed() -> nn.Module:
    return parametrizations.weight_norm(nn.Conv2d(3, 4, 3))


def weight_normed_by_hook() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Conv2d(3, 4, 3), dim=None)


def spectral_normed() -> nn.Module:
    return parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))


def spectral_normed_by_hook() -> nn.Module:
    return nn.utils.spectral_norm(nn.ConvTranspose2d(3, 4, 3))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def parametrised() -> nn.Module:
    layer = parametrize.register_parametrization(nn.Conv2d(3, 4, 3), "weight", Doubled())
    return parametrize.register_parametrization(layer, "bias", Doubled())


@pytest.mark.parametrize("road", ["symbolic", "export"])
@pytest.mark.parametrize(
    "make", [weight_normed, weight_normed_by_hook, spectral_normed, spectral_normed_by_hook, parametrised]
)
def test_a_layer_whose_weight_is_computed_holds_it(
    make: Callable[[], nn.Module], road: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(make(), nn.ReLU()).double()
    net(image())  # sets out the vectors of spectral norms
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    if road == "export":
        monkeypatch.setattr(fxcompile.tracing, "symbolic_graph", refuse)
    program = trace(net, image())
    assert_canonical(program)
    (layer,) = [program.layer(node) for node in program.graph.nodes if node.target == "0"]
    assert type(layer) in (nn.Conv2d, nn.ConvTranspose2d)
    assert list(layer.state_dict()) == ["weight", "bias"] or list(layer.state_dict()) == ["bias", "weight"]
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert_equal(program.outputs(image(seed=5)), [net.eval()(image(seed=5)).detach()])


def test_hooks_are_in_the_graph() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 1))).double()
    seen: list[Any] = []
    net[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    net[0].register_forward_hook(lambda module, args, output: output + 1)
    net[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    net[2].register_forward_hook(lambda module, args, output: output.abs())
    net.register_forward_hook(lambda module, args, output: {"out": output})
    program = trace(net, image())
    assert_canonical(program, net)
    assert program.output_names == ("out",)
    assert [getattr(node.target, "__name__", node.target) for node in program.graph.nodes] == [
        "input", "mul", "0", "add", "1", "2.0", "abs", "output",
    ]  # fmt: skip
    assert_equal(program.outputs(image(seed=1)), [net(image(seed=1))["out"].detach()])
    assert [len(module._forward_hooks) for module in (net, net[0], net[1])] == [1, 1, 1]


ROOTS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "convolution": (lambda: nn.Conv2d(3, 4, 3), image()),
    "reflecting": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), image()),
    "activation": (lambda: nn.ReLU(inplace=True), image()),
    "pool": (lambda: nn.MaxPool2d(2), image()),
    "nothing": (nn.Identity, image()),
    "recurrent": (lambda: nn.LSTM(5, 3, batch_first=True), image(2, 4, 5)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), image(2, 4, 8)),
    "parallel": (lambda: nn.DataParallel(nn.Sequential(nn.Conv2d(3, 4, 3))), image()),
    "parallel part": (lambda: nn.Sequential(nn.DataParallel(nn.Conv2d(3, 4, 3)), nn.ReLU()), image()),
    "compiled": (lambda: torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3))), image()),
}


@pytest.mark.parametrize("name", ROOTS)
def test_a_layer_or_a_wrapper_can_be_the_model(name: str) -> None:
    make, x = ROOTS[name]
    torch.manual_seed(0)
    net = make().double().eval()
    program = trace(net, x)
    plain = net._orig_mod if name == "compiled" else net.module if name == "parallel" else net
    assert_canonical(program, plain if name not in ("convolution", "activation", "pool", "recurrent") else None)
    with torch.no_grad():
        assert_equal(program.outputs(x + 1), leaves(plain(x + 1)))
    assert program.batch_is_free


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_model_is_traced_in_its_own_dtype(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Hardswish(), nn.Flatten(), nn.LazyLinear(2))
    net(image().float())
    net = net.to(dtype)
    program = trace(net, image().to(dtype))
    assert_canonical(program, net)
    assert program.dtype == dtype
    assert {spec.dtype for spec in program.inputs} == {dtype}
    assert_equal(program.outputs(image().to(dtype)), [net.eval()(image().to(dtype)).detach()], 1e-12)


@pytest.mark.parametrize("make", [fx.symbolic_trace, lambda net: exported(net, (image(),)).module()])
def test_a_graph_module_is_a_model_like_any_other(make: Callable[[nn.Module], fx.GraphModule]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).double().eval()
    program = trace(make(net), image())
    assert_canonical(program)
    assert form(program) == form(trace(net, image()))
    assert_equal(program.outputs(image(seed=1)), [net(image(seed=1)).detach()])


@pytest.mark.parametrize("free", [True, False])
def test_an_exported_program_needs_no_examples(free: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(48, 2)).double()
    program = trace(exported(net, (image(),), dynamic=free))
    assert_canonical(program, net)
    assert program.batch_is_free
    assert_equal(program.outputs(image(7, 3, 6, 5)), [net(image(7, 3, 6, 5)).detach()])


def test_an_output_that_is_no_function_of_the_input_does_not_fix_the_batch() -> None:
    class Anchored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.anchors = nn.Conv2d(3, 4, 3), nn.Parameter(torch.rand(9, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.conv(x), self.anchors

    net = Anchored().double()
    program = trace(exported(net, (image(),), dynamic=False))
    assert program.batch_is_free
    assert_equal(program.outputs(image(5, 3, 6, 5)), [net.conv(image(5, 3, 6, 5)).detach(), net.anchors.detach()])


class Fixed(nn.Module):
    """Takes two samples and gives their difference."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.view(2, -1, 6).cos()
        return first - second


@pytest.mark.parametrize("make", [Fixed, lambda: exported(Fixed(), (image(),), dynamic=False)])
def test_a_batch_that_the_model_fixes_stays_fixed_and_a_note_says_so(make: Callable[[], Any]) -> None:
    program = trace(make(), image())
    assert_canonical(program)
    assert not program.batch_is_free
    assert [spec.batch_axis for spec in program.inputs] == [None]
    assert len(program.notes) == 1
    assert program.notes[0].startswith("the batch stays fixed: ")
    assert_equal(program.outputs(image(seed=1)), [Fixed()(image(seed=1))])


class Reserved(nn.Module):
    """Its parts have names that a graph module has a use of its own for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.graph, self.meta = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.code = nn.Parameter(torch.rand(4, 1, 1))
        self.register_buffer("print_readable", torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.meta(self.graph(x) * self.code) + self.print_readable


@pytest.mark.parametrize("road", ["symbolic", "export"])
def test_parts_may_be_named_like_those_of_a_graph_module(road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Reserved().double()
    before = {key: id(tensor) for key, tensor in net.state_dict(keep_vars=True).items()}
    if road == "export":
        monkeypatch.setattr(fxcompile.tracing, "symbolic_graph", refuse)
    program = trace(net, image())
    assert_canonical(program)
    assert [node.target for node, _ in program.layers(nn.Conv2d)] == ["graph_", "meta_"]
    assert {key: id(tensor) for key, tensor in net.state_dict(keep_vars=True).items()} == before
    assert not {"graph", "meta", "code"} & set(vars(net))
    assert_equal(program.outputs(image(seed=1)), [net(image(seed=1)).detach()])


@dataclass
class Inputs:
    image: Tensor
    shift: Tensor
    scale: float = 2.0


def test_a_dataclass_is_taken_once_torch_knows_its_parts() -> None:
    class Taking(nn.Module):
        def forward(self, inputs: Inputs) -> Tensor:
            return inputs.image * inputs.scale + inputs.shift

    call = (Inputs(image(), image(2, 1, 1, 1)),)
    with pytest.raises(
        TraceError, match=r"a class that torch does not .*: torch\.export\.register_dataclass\(Inputs\)"
    ):
        trace(Taking(), call)
    torch.export.register_dataclass(Inputs)
    program = trace(Taking(), call)
    assert [spec.name for spec in program.inputs] == ["inputs_image", "inputs_shift"]
    assert_equal([program.module(*call)], [Taking()(*call)])


def test_examples_come_as_a_tensor_a_sequence_a_mapping_or_both() -> None:
    net, x, y = build("two_tensors")[0], image(), image(seed=1)
    calls = [((x, y), None), ([x, y], None), ({"x": x, "y": y}, None), (x, {"y": y}), ((), {"x": x, "y": y})]
    programs = [trace(net, inputs, keywords) for inputs, keywords in calls]
    for program in programs:
        assert [spec.name for spec in program.inputs] == ["x", "y"]
        assert form(program) == form(programs[0])
        assert_equal(program.examples, [x, y], 0)


def test_what_is_no_model_and_no_example_is_refused_by_name() -> None:
    for model, words in (
        (torch.relu, "a builtin_function_or_method is no model"),
        (nn.ReLU, "a class ReLU is no model"),
    ):
        with pytest.raises(TraceError, match=words):
            trace(model, torch.zeros(1))  # type: ignore[arg-type]
    for examples in (None, "x", 3):
        with pytest.raises(TraceError, match=f"example inputs cannot be a {type(examples).__name__}; give a tensor"):
            trace(nn.ReLU(), examples)  # type: ignore[arg-type]
