"""Models that are written, and called, in all the ways that a forward can be: in float64, with the call's arguments."""

import math
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (2, 3, 6, 5)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """A convolution, and a forward that each subclass writes in its way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.next = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)
        self.register_buffer("mean", torch.randn(3, 1, 1))
        self.constant = torch.randn(4, 1, 1, dtype=torch.float64)


@dataclass
class Output:
    logits: Tensor
    features: Tensor | None = None
    loss: Tensor | None = None


class Pair(NamedTuple):
    small: Tensor
    large: Tensor


MODELS: dict[str, tuple[type[nn.Module], tuple[Any, ...], dict[str, Any]]] = {}


def model(*args: Any, **kwargs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorated function is the forward of a model, called with these arguments."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        MODELS[name] = type(name, (Net,), {"forward": function}), args, kwargs
        return function

    return register


@model(image(), image(seed=1))
def two_tensors(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return self.conv(x) * self.conv(y).sigmoid()


@model(image(), scale=image(2, 1, 1, 1), shift=None)
def keywords_some_none(self: Any, x: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    y = self.conv(x)
    if scale is not None:
        y = y * scale
    return y if shift is None else y + shift


@model({"a": image(), "more": [image(seed=1), (image(seed=2), 2)]})
def nested_containers(self: Any, batch: dict[str, Any]) -> Tensor:
    first, (second, power) = batch["more"]
    return self.conv(batch["a"]) + self.conv(first) ** power - self.conv(second)


@model(image(), 2, True, "max")
def fixed_values(self: Any, x: Tensor, times: int, activate: bool, pool: str = "avg") -> Tensor:
    for _ in range(times):
        x = x + self.mean
    y = self.conv(x)
    y = F.relu(y) if activate else y
    return F.max_pool2d(y, times) if pool == "max" else F.avg_pool2d(y, times)


@model(image(), image(seed=1), image(seed=2))
def any_number(self: Any, *xs: Tensor) -> Tensor:
    return torch.cat([self.conv(x) for x in xs], 1)


@model(image(), left=image(seed=1), right=image(seed=2))
def any_keywords(self: Any, x: Tensor, **others: Tensor) -> dict[str, Tensor]:
    return {name: self.conv(x + other) for name, other in others.items()}


@model(image())
def dataclass_output(self: Any, x: Tensor) -> Output:
    y = self.conv(x)
    return Output(self.fc(y.mean((2, 3))), features=y)


@model(image())
def named_tuple_output(self: Any, x: Tensor) -> Pair:
    y = self.conv(x)
    return Pair(F.avg_pool2d(y, 2), y)


@model(image())
def nested_output(self: Any, x: Tensor) -> dict[str, Any]:
    y = self.conv(x)
    return {"maps": [y, (y.relu(), {"deep": y.mean((2, 3))})], "sum": y.sum((1, 2, 3))}


@model(image(), image(2, 7))
def unused_input(self: Any, x: Tensor, unused: Tensor) -> Tensor:
    return self.conv(x)


@model(image(), image(2, 7))
def input_returned(self: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return y, self.conv(x)


@model(image())
def returned_twice(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = self.conv(x)
    return y, y, x


@model(image())
def called_twice(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.bn(self.next(F.relu(self.bn(self.next(y)))))


@model(image())
def functional_calls(self: Any, x: Tensor) -> Tensor:
    y = F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)
    y = F.batch_norm(y, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, self.training)
    return F.linear(F.dropout(y, training=self.training).mean((2, 3)), self.fc.weight, self.fc.bias)


@model(image())
def constants_and_buffers(self: Any, x: Tensor) -> Tensor:
    made = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype).view(4, 1, 1)
    return self.conv(x - self.mean) * self.constant + made + torch.ones(1, dtype=x.dtype)


@model(image())
def branch_on_shape(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return y.mean((2, 3)) if x.shape[2] > 4 else y.amax((2, 3))


@model(image())
def caught_in_no_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.conv(x)
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        return self.next(y).relu()


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@model(image())
def own_autograd_function(self: Any, x: Tensor) -> Tensor:
    return Swish.apply(self.conv(x))


@model(image())
def complex_numbers(self: Any, x: Tensor) -> Tensor:
    return torch.fft.rfft2(self.conv(x)).abs()


@model(image())
def boolean_mask_written(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    y[y < 0] = 0
    return y


@model(image())
def mapped_over_samples(self: Any, x: Tensor) -> Tensor:
    return torch.func.vmap(lambda sample: sample / sample.abs().sum())(self.conv(x))


@model(image())
def checked_by_type(self: Any, x: Tensor | list[Tensor]) -> Tensor:
    parts = [x] if isinstance(x, Tensor) else x
    assert all(part.dtype == torch.float64 and not part.is_cuda for part in parts)
    return torch.cat([self.conv(part) for part in parts], 1)


@model(image())
def values_asserted(self: Any, x: Tensor) -> Tensor:
    assert (x.abs() < 100).all(), "not normalised"
    assert not torch.isnan(x).any()
    return self.conv(x)


@model(image())
def cached_grid(self: Any, x: Tensor) -> Tensor:
    if getattr(self, "grid", None) is None or self.grid.shape[0] != x.shape[2]:
        self.grid = torch.linspace(0, 1, x.shape[2], dtype=x.dtype)[:, None]
    self.features = self.conv(x)
    return self.features + self.grid


@model(image())
def layer_from_outside(self: Any, x: Tensor) -> Tensor:
    return OUTSIDE(self.conv(x))


OUTSIDE = nn.Conv2d(4, 2, 1).double()


@model(image())
def more_than_tensors_returned(self: Any, x: Tensor) -> tuple[Any, ...]:
    return self.conv(x), 3, "name", None, self.fc.weight, self.bn.running_mean


@model(image())
def dropout_of_nothing(self: Any, x: Tensor) -> Tensor:
    return F.dropout(self.conv(x), 0.0, True)


@model(image())
def sizes_in_python(self: Any, x: Tensor) -> Tensor:
    batch, *_, width = x.shape
    y = F.avg_pool2d(self.conv(x), int(math.sqrt(x.size(2) * width)) // 2)
    return y.reshape(batch, -1) / float(np.prod(x.shape[1:]))


@model(image(), conv=image(seed=1), output=image(seed=2), forward=image(seed=3))
def inputs_named_like_other_things(
    self: Any, lambda_: Tensor, conv: Tensor, output: Tensor, forward: Tensor
) -> dict[str, Tensor]:
    return {"x": self.conv(lambda_) + self.conv(conv), "output": self.conv(output), "self": self.conv(forward)}


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    kind, args, kwargs = MODELS[name]
    torch.manual_seed(0)
    net = kind().double()
    for tensor in net.buffers():
        tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return net.train(), args, kwargs


def drawn(value: Any, seed: int, batch: int) -> Any:
    """The arguments with other numbers, and as many samples."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        return torch.randn(batch, *tensor.shape[1:], generator=generator, dtype=tensor.dtype)

    return tree_map_only(Tensor, draw, value)


def leaves(value: Any) -> list[Tensor]:
    """The tensors of a model's input or output, in the order in which Python goes through it."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (tuple, list)) else []
