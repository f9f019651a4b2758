"""Inputs and outputs have the model's names, and the program's module is called as the model is."""

import copy
import inspect
import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
from calls import MODELS, Net, build, drawn, image, leaves
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxcompile.comparing import relative_maximum
from fxcompile.errors import TraceError
from fxcompile.program import output_node
from fxcompile.tracing import trace

NAMES: dict[str, tuple[list[str], list[str]]] = {
    "two_tensors": (["x", "y"], ["output"]),
    "keywords_some_none": (["x", "scale"], ["output"]),
    "nested_containers": (["batch_a", "batch_more_0", "batch_more_1_0"], ["output"]),
    "fixed_values": (["x"], ["output"]),
    "any_number": (["xs_0", "xs_1", "xs_2"], ["output"]),
    "any_keywords": (["x", "left", "right"], ["left", "right"]),
    "dataclass_output": (["x"], ["logits", "features"]),
    "named_tuple_output": (["x"], ["small", "large"]),
    "nested_output": (["x"], ["maps_0", "maps_1_0", "maps_1_1_deep", "sum"]),
    "unused_input": (["x", "unused"], ["output"]),
    "input_returned": (["x", "y"], ["output_0", "output_1"]),
    "returned_twice": (["x"], ["output_0", "output_1", "output_2"]),
    "inputs_named_like_other_things": (["lambda_", "conv", "output", "forward"], ["x", "output", "self"]),
}


@pytest.mark.parametrize("name", NAMES)
def test_inputs_and_outputs_are_named_as_the_model_names_them(name: str) -> None:
    net, args, kwargs = build(name)
    program = trace(net, args, kwargs)
    assert [spec.name for spec in program.inputs] == NAMES[name][0]
    assert list(program.output_names) == NAMES[name][1]


def plain(value: Any) -> Any:
    """The value with plain containers in place of named tuples and dataclasses."""
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "__dataclass_fields__"):
        return {key: plain(item) for key, item in vars(value).items() if item is not None}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(plain(item) for item in value)
    return value


def assert_same(given: Any, expected: Any) -> None:
    """The same containers with the same numbers in them."""
    shape = lambda value: tree_map_only(Tensor, lambda tensor: (tensor.shape, tensor.dtype), value)  # noqa: E731
    assert shape(given) == shape(plain(expected))
    for ours, theirs in zip(leaves(given), leaves(expected), strict=True):
        assert relative_maximum(ours.detach(), theirs.detach()) <= 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_the_module_is_called_as_the_model_was_and_returns_the_same_containers(name: str) -> None:
    net, args, kwargs = build(name)
    net.eval()
    module = trace(net, args, kwargs).module
    args, kwargs = drawn((args, kwargs), seed=3, batch=3)
    expected = net(*args, **kwargs)
    assert_same(module(*args, **kwargs), expected)
    declared = inspect.signature(net.forward)
    kinds = {item.kind for item in declared.parameters.values()}
    if not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        by_name = declared.bind(*args, **kwargs).arguments
        assert_same(module(**dict(reversed(by_name.items()))), expected)


@pytest.mark.parametrize("name", ["keywords_some_none", "nested_containers", "fixed_values", "any_keywords"])
def test_a_copied_and_a_saved_module_are_called_alike(name: str) -> None:
    net, args, kwargs = build(name)
    module = trace(net.eval(), args, kwargs).module
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for again in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert_same(again(*args, **kwargs), net(*args, **kwargs))
        assert {key for key, _ in again.named_parameters()} == {key for key, _ in module.named_parameters()}


class Optional(Net):
    def forward(
        self,
        x: Tensor,
        scale: float = 2.0,
        mask: Tensor | None = None,
        *,
        size: tuple[int, int] = (1, 1),
        kind: Any = int,
    ) -> Tensor:
        y = nn.functional.adaptive_avg_pool2d(self.conv(x) * scale, size)
        return y if mask is None else y * mask


def declaration(module: nn.Module) -> str:
    return str(inspect.signature(module.forward))


def test_the_module_declares_what_the_model_does_and_checks_what_is_fixed() -> None:
    """In the order of forward, whichever order the example call gave it in; what it left out is at its default."""
    net = Optional().double().eval()
    x, mask = image(), image(2, 1, 1, 1)
    without = trace(net, x).module
    assert declaration(without) == "(x, scale=2.0, mask=None, *, size=(1, 1))"
    assert_same(without(x, 2.0, None, size=(1, 1)), net(x))
    for wrong in ({"scale": 3.0}, {"mask": mask}, {"size": (2, 2)}):
        (name, _), *_ = wrong.items()
        with pytest.raises(AssertionError, match=f"the program was traced with {name}="):
            without(x, **wrong)
    given = trace(net, {"mask": mask, "x": x, "size": (2, 3)}).module
    assert declaration(given) == "(x, scale=2.0, mask=None, *, size=(2, 3))"
    assert_same(given(x, 2.0, mask), net(x, mask=mask, size=(2, 3)))
    assert_same(given(mask=mask, x=x), net(x, mask=mask, size=(2, 3)))
    with pytest.raises(AssertionError, match="'mask' is missing"):
        given(x)


class Numbers(Net):
    def forward(self, x: Tensor, limits: list[float], dtype: torch.dtype, scale: float, options: Any = ()) -> Tensor:
        return (self.conv(x).clamp(*limits) * (1.0 if scale != scale else scale)).to(dtype)


def test_numbers_without_a_literal_are_taken_and_not_checked() -> None:
    net = Numbers().double()
    call = (image(), [-0.5, float("inf")], torch.float64, float("nan"), {"deep": [1, ("a", None)]})
    module = trace(net, call).module
    assert_same(module(*call), net(*call))
    with pytest.raises(AssertionError, match=r"the program was traced with limits=\[-0\.5, inf\]"):
        module(image(), [-1.0, 1.0], *call[2:])
    with pytest.raises(AssertionError, match=r"the program was traced with options="):
        module(*call[:4], {"deep": [1, ("b", None)]})


class Alike(Net):
    def forward(self, a: list[Tensor], a_0: Tensor, a_0_: Tensor) -> dict[Any, Any]:
        return {"b.c": self.conv(a[0]), "b": {"c": self.conv(a_0)}, "b_c": (self.conv(a_0_),), 3: a_0, "d e": a_0}


def test_names_that_would_coincide_are_kept_apart() -> None:
    net = Alike().double().eval()
    call = ([image()], image(seed=1), image(seed=2))
    program = trace(net, call)
    assert len({spec.name for spec in program.inputs}) == 3
    assert list(program.output_names) == ["b.c", "b_c", "b_c_0", "3", "d_e"]
    assert_same(list(program.module(*call).values()), list(net(*call).values()))


def test_a_keyword_that_is_no_name_is_refused() -> None:
    net, args, _ = build("any_keywords")
    with pytest.raises(TraceError, match="forward is given 'class', which Python code cannot name"):
        trace(net, args, {"class": image()})


def test_the_code_of_the_module_can_be_read_back() -> None:
    """Every line is Python that runs without this package, sizes included."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2)).double()
    net[1].forward = lambda x: x.reshape(x.size(0) * 2, -1)
    module = trace(net, image()).module
    held: dict[str, Any] = {}
    exec(module.code, {"torch": torch}, held)
    assert_same(held["forward"](module, image(5, 3, 6, 5)), net(image(5, 3, 6, 5)))


@pytest.mark.parametrize("name", ["called_twice", "functional_calls", "nested_output", "two_tensors"])
def test_the_module_trains_as_the_model_does(name: str) -> None:
    """In training mode, from the same seed: the same outputs, gradients and statistics."""
    net, args, kwargs = build(name)
    module = copy.deepcopy(trace(net, args, kwargs).module).train()
    results = []
    for trained in (net.train(), module):
        torch.manual_seed(0)
        output = leaves(trained(*args, **kwargs))
        sum(tensor.square().sum() for tensor in output).backward()
        grads = {key: tensor.grad for key, tensor in trained.named_parameters() if tensor.grad is not None}
        results.append((output, grads, dict(trained.named_buffers())))
    (expected, theirs, buffers), (given, ours, statistics) = results
    assert_same(given, expected)
    assert ours.keys() == theirs.keys() == dict(module.named_parameters()).keys()
    assert all(relative_maximum(ours[key], theirs[key]) <= 1e-12 for key in ours)
    for key, tensor in statistics.items():
        counted = key.endswith("num_batches_tracked") and name == "functional_calls"  # which F.batch_norm does not do
        assert torch.equal(tensor, buffers[key]) or counted, key


def test_the_output_node_holds_plain_containers() -> None:
    class Ordered(Net):
        def forward(self, x: Tensor) -> OrderedDict[str, Any]:
            return OrderedDict(maps=[self.conv(x)], pair=(x, None))

    output = output_node(trace(Ordered().double(), image()).graph).args[0]
    assert isinstance(output, dict)
    assert not isinstance(output, OrderedDict)
    assert [isinstance(item, list) for item in output.values()] == [True, False]
