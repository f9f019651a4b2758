"""Programs write nothing in place, and compute what the model does that writes: in float64, on other inputs, twice."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import leaves
from forms import Written, assert_canonical
from torch import Tensor, fx, nn

import fxcompile.tracing
from fxcompile.comparing import relative_maximum
from fxcompile.functional import Unfollowable, make_functional
from fxcompile.tracing import trace

RENAMED: dict[str, Callable[..., Any]] = {}
VIEWED: dict[str, Callable[..., Any]] = {}
ASSIGNED: dict[str, Callable[..., Any]] = {}


def renamed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A forward whose writes are followed by renaming."""
    RENAMED[function.__name__] = function
    return function


def viewed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A forward whose writes are seen through another view of the memory, which only torch.export follows."""
    VIEWED[function.__name__] = function
    return function


def assigned(function: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that writes to parts of a tensor, which symbolic tracing does not take."""
    ASSIGNED[function.__name__] = function
    return function


@renamed
def method(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y.relu_()
    return y + 1


@renamed
def alias(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    z = y
    z.add_(1)
    return y * 2, z


@renamed
def chain(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    before = y.sum()
    z = y.mul_(2).add_(1).clamp_(min=0)
    return before, y, z + y


@renamed
def read_between_writes(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    a = y * 2
    y.add_(1)
    b = y * 3
    y.neg_()
    return a + b + y


@renamed
def augmented(m: Any, x: Tensor) -> Any:
    y = z = m.conv(x)
    y += x.mean()
    y -= 0.5
    y *= 3
    y /= x.abs().amax()
    y **= 2
    return y, z


@renamed
def augmented_integers(m: Any, x: Tensor) -> Any:
    y = z = (x * 10).long()
    y //= 3
    y %= 5
    flag = y > 1
    held = flag
    flag &= y < 4
    flag |= y == 0
    flag ^= x > 0
    return z, held


@renamed
def augmented_matrix(m: Any, x: Tensor) -> Any:
    y = z = m.conv(x).mean((0, 1)) @ x[0, 0].T
    y @= y
    return z


@renamed
def list_entry(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    outputs = [y, x]
    outputs[0] += 1
    return outputs[0] + y


@renamed
def residual_of_an_in_place_layer(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    identity = y
    y = m.relu(y)
    return m.conv2(y) + identity


@renamed
def layer_called_twice(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    m.relu(y)
    y = y - 0.5
    m.relu(y)
    return y


@renamed
def functions_told_by_position(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    F.leaky_relu(y, 0.1, True)
    F.dropout(y, 0.5, False, True)
    F.hardtanh(y, -1.0, 1.0, True)
    F.elu(y, 0.5, inplace=True)
    F.relu_(y)
    torch.sigmoid_(y)
    return y


@renamed
def out_argument(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    z = torch.empty_like(y)
    torch.add(y, 1, out=z)
    torch.mul(y, z, out=y)
    return y, z


@renamed
def detached(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y.detach().mul_(2)
    y.data.add_(1)
    return y


@renamed
def view_of_the_same_shape(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y.view(y.shape).mul_(2)
    return y


@renamed
def values_put_in(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y.masked_fill_(y > 0.5, 0.5)
    z = y * 2
    y.copy_(z.flip(3))
    z.fill_(0.25)
    return y, z


@renamed
def made_and_filled(m: Any, x: Tensor) -> Any:
    y = torch.zeros(2, 4, 5, 6, dtype=x.dtype)
    y.add_(m.conv(x))
    z = x.new_empty(x.shape).copy_(x).zero_()
    return y, z


@renamed
def axes_changed(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y.unsqueeze_(0).squeeze_(0)
    y.transpose_(2, 3)
    return y.flatten(2)


@renamed
def own_input(m: Any, x: Tensor) -> Any:
    x.mul_(2)
    y = m.conv(x)
    x -= 1
    return y, x


@renamed
def two_names_in_one_call(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    z = y
    y.add_(z).mul_(z)
    return z


@assigned
def slice_assigned(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y[:, 1:3] = 0
    y[..., 0] = x.mean()
    return y


@assigned
def slice_augmented(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y[:, 0] += 1
    return y.relu()


@assigned
def assigned_by_index(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y[y < -1] = 0
    y[:, torch.tensor([0, 2])] = 1
    y[0, None, ..., -1] *= 2
    return y


@assigned
def rows_assigned_by_index(m: Any, x: Tensor) -> Any:
    y, places = m.conv(x), torch.tensor([3, 0])
    y[:, :, places] = x[:, :1, :2]
    y[:, places, :, places] += x.mean((1, 3))
    y[:, :, x[0, 0] > 0.5] = 7
    y[..., torch.tensor([[0, 1], [2, 4]]), :2] = x[:, :1, :2, :2, None]
    return y


@viewed
def view_written(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y.flatten(2).mul_(2)
    return y


@viewed
def base_written(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    first = y[:, :1]
    y.mul_(2)
    return first + 1


@viewed
def chunk_written(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    a, b = y.chunk(2, 1)
    a.relu_()
    b += a
    return y, a


@viewed
def transposed_view(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y.permute(0, 2, 3, 1).add_(torch.arange(4, dtype=x.dtype))
    return y


@viewed
def strided_view(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y.as_strided((2, 4), (y.stride(0), y.stride(1))).zero_()
    return y


@viewed
def narrower_kept(m: Any, x: Tensor) -> Any:
    y = torch.zeros(2, 4, 5, 6, dtype=torch.float32)
    y.add_(m.conv(x))
    return y


@viewed
def booleans_as_numbers(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y.gt_(0.1)
    return y * 3


@assigned
def slice_of_the_input(m: Any, x: Tensor) -> Any:
    x[:, 0] = 0
    return m.conv(x), x


@viewed
def several_outputs(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    values, places = y.clone(), torch.zeros(y.shape, dtype=torch.long)
    torch.sort(y, 1, out=(values, places))
    return values, places


def model_of(function: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(3, 4, 3, padding=1), "conv2": nn.Conv2d(4, 4, 1), "relu": nn.ReLU(inplace=True)}
    return Written(function, **layers).double().eval()


def example(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", RENAMED | VIEWED | ASSIGNED)
def test_the_program_writes_nothing_and_computes_what_the_model_does(name: str) -> None:
    model = model_of((RENAMED | VIEWED | ASSIGNED)[name])
    x = example()
    program = trace(model, x)
    assert_canonical(program, model)
    assert torch.equal(x, example()), "the caller's example was written to"
    for seed in (0, 1):
        with torch.no_grad():
            expected = leaves(model(example(seed)))
        given = example(seed)
        for _ in range(2):
            for ours, theirs in zip(program.outputs(given), expected, strict=True):
                assert ours.dtype == theirs.dtype
                assert relative_maximum(ours, theirs) <= 1e-12
        assert torch.equal(given, example(seed)), "the program wrote to its input"


@pytest.mark.parametrize("name", RENAMED)
def test_renaming_alone_follows_writes_to_whole_tensors(name: str) -> None:
    """So the second road is not needed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fxcompile.tracing, "export", refuse)
        trace(model_of(RENAMED[name]), example())


def refuse(*args: Any) -> Any:
    raise AssertionError("the second road was taken")


@pytest.mark.parametrize("name", VIEWED)
def test_a_write_that_another_view_sees_is_not_renamed(name: str) -> None:
    with pytest.raises(Unfollowable) as caught:
        make_functional(fx.symbolic_trace(model_of(VIEWED[name])), [example()])
    assert caught.value.reason
    assert caught.value.node.op in ("call_method", "call_function")


def test_a_tensor_given_other_memory_is_named() -> None:
    model = model_of(lambda m, x: m.conv(x).resize_(2, 3))
    with pytest.raises(Unfollowable, match="'resize_' gives a tensor other memory"):
        make_functional(fx.symbolic_trace(model), [example()])


def test_a_write_to_the_models_own_tensor_is_named() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.conv.bias.add_(1)
        return m.conv(x)

    with pytest.raises(Unfollowable, match=r"forward updates the model's own tensor 'conv\.bias'"):
        make_functional(fx.symbolic_trace(model_of(forward)), [example()])
