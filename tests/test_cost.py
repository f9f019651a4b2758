"""Counts of parameters, multiply-accumulates and bytes, each against a count made another way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zoo import ARCHITECTURES, FAMILIES, example_inputs

from fxcompile.cost import Cost, nodes_cost, program_cost, samples
from fxcompile.tracing import trace


def cost_of(model: nn.Module, *inputs: Tensor) -> Cost:
    return program_cost(trace(model.eval(), inputs))


class Function(nn.Module):
    """A function of the input and one weight."""

    def __init__(self, function: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, self.weight)


# layers of ones: what they give for ones, summed up, is the number of products


def products(layer: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.fill_(0.0 if "bias" in name else 1.0)
        return round(float(layer(torch.ones_like(x)).double().sum()))


LINEAR = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(3, 5, (3, 2), stride=(2, 1)), (2, 3, 9, 7)),
    "conv2d in groups": (nn.Conv2d(6, 4, 3, groups=2, dilation=2), (2, 6, 9, 9)),
    "depthwise conv2d": (nn.Conv2d(6, 12, 3, groups=6, bias=False), (1, 6, 8, 8)),
    "conv3d": (nn.Conv3d(2, 3, (1, 2, 3), groups=1), (2, 2, 4, 5, 6)),
    "conv2d of one image": (nn.Conv2d(3, 5, 3), (1, 3, 9, 7)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 9)),
    "conv_transpose2d in groups": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2), (2, 4, 5, 6)),
    "conv_transpose3d": (nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 4, 5)),
    "linear": (nn.Linear(7, 5), (2, 7)),
    "linear on four axes": (nn.Linear(7, 5, bias=False), (2, 3, 4, 7)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers_cost_as_many_products_as_they_compute(name: str) -> None:
    layer, shape = LINEAR[name]
    x = torch.randn(shape)
    cost = cost_of(layer, x)
    assert cost.macs == products(layer, x) // shape[0]
    assert cost.parameters == sum(math.prod(parameter.shape) for parameter in layer.parameters())
    assert cost.bytes == 4 * cost.parameters


FUNCTIONS: dict[str, tuple[Function, tuple[int, ...]]] = {
    "matmul": (Function(lambda x, w: torch.matmul(w, x), 5, 4), (2, 4, 6)),
    "matmul with a batch": (Function(lambda x, w: x @ (w * x.mean()), 3, 4, 6), (2, 3, 5, 4)),
    "matmul of vectors": (Function(lambda x, w: torch.matmul(x, w * x.mean()), 6), (2, 6)),
    "bmm": (Function(lambda x, w: torch.bmm(x, x.transpose(1, 2)) * w, 1), (2, 4, 6)),
    "einsum": (Function(lambda x, w: torch.einsum("bij,jk->bki", x, w * x.mean()), 6, 3), (2, 4, 6)),
    "einsum with dots": (Function(lambda x, w: torch.einsum("...j,jk->...k", x, w * x.mean()), 6, 3), (2, 4, 6)),
    "baddbmm": (Function(lambda x, w: torch.baddbmm(w, x, x.transpose(1, 2), beta=0), 1), (2, 4, 6)),
    "linear": (Function(lambda x, w: F.linear(x, w * x.mean()), 5, 6), (2, 6)),
    "conv2d": (Function(lambda x, w: F.conv2d(x, w * x.mean(), stride=2), 4, 3, 3, 3), (2, 3, 7, 7)),
    "conv2d in groups": (Function(lambda x, w: F.conv2d(x, w * x.mean(), groups=2), 4, 2, 3, 3), (2, 4, 7, 7)),
    "conv_transpose2d": (
        Function(lambda x, w: F.conv_transpose2d(x, w * x.mean(), stride=2), 3, 4, 3, 3), (2, 3, 5, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_cost_as_many_products_as_they_compute(name: str) -> None:
    model, shape = FUNCTIONS[name]
    x = torch.randn(shape)
    assert cost_of(model, x).macs == products(model, x) // shape[0]


# recurrence and attention by their formulas, written out


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers(kind: Any, gates: int, batch_first: bool) -> None:
    batch, steps, inputs, hidden = 2, 5, 6, 7
    x = torch.randn((batch, steps, inputs) if batch_first else (steps, batch, inputs))
    layer = kind(inputs, hidden, 2, bidirectional=True, batch_first=batch_first).eval()
    program = trace(layer, x)
    first = gates * hidden * (inputs + hidden)
    second = gates * hidden * (2 * hidden + hidden)
    macs = batch * steps * 2 * (first + second)
    assert nodes_cost(program.module, program.graph.nodes, 1).macs == macs
    assert program_cost(program).parameters == 2 * (first + second + 2 * 2 * gates * hidden)


class Attention(nn.Module):
    """Multi-head attention of one sequence on another."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attention(query, key, value, need_weights=False)[0]


def test_attention_on_another_sequence() -> None:
    length, keys, width = 5, 11, 8
    macs = cost_of(
        Attention(kdim=6, vdim=4), torch.randn(2, length, 8), torch.randn(2, keys, 6), torch.randn(2, keys, 4)
    )
    projections = length * width * width + keys * width * 6 + keys * width * 4 + length * width * width
    assert macs.macs == projections + length * keys * width + length * keys * width


def test_attention_on_itself_and_as_a_function() -> None:
    class Itself(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    assert cost_of(Itself(), torch.randn(2, 5, 8)).macs == 5 * 8 * 8 * 4 + 2 * 5 * 5 * 8

    class Functional(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value)

    x, y = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    assert cost_of(Functional(), x, y, y[..., :4]).macs == 3 * 5 * 7 * (8 + 4)
    assert cost_of(Functional(), x, x, x).macs == 3 * 5 * 5 * (8 + 8)


# what counts once, what counts at each call


class Shared(nn.Module):
    """One convolution called twice, one weight in two layers, a buffer and a constant parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.bn = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("offset", torch.ones(4, 1, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(self.conv(x))) * self.scale + self.offset.float()
        return self.second(self.first(x.mean((2, 3))))


def test_each_call_costs_macs_and_each_tensor_counts_once() -> None:
    program = trace(Shared().eval(), torch.randn(2, 4, 6, 6))
    cost = program_cost(program)
    assert cost.macs == 2 * 36 * 4 * 4 * 9 + 2 * 16
    assert cost.parameters == 4 * 4 * 9 + 16 + 4 + 4 + 2 * 4 + 4
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in program.module.buffers())
    assert cost.bytes == 4 * cost.parameters + buffers
    assert buffers >= 4 * 2 * 4 + 8 + 4 * 4  # statistics, their counter, the offset
    linear = [node for node in program.graph.nodes if str(node.target) in ("first", "second")]
    one, two = (nodes_cost(program.module, [node], 2) for node in linear)
    both = nodes_cost(program.module, linear, 2)
    assert one + two - both == Cost(16, 0, 64)


def test_costs_are_for_one_sample_of_the_example() -> None:
    for batch in (1, 2, 5):
        program = trace(nn.Conv2d(3, 4, 3).eval(), torch.randn(batch, 3, 8, 8))
        assert samples(program) == batch
        assert program_cost(program).macs == 36 * 4 * 27


def test_bytes_follow_the_dtype() -> None:
    double, half = (cost_of(nn.Linear(4, 3).to(dtype), torch.ones(2, 4, dtype=dtype)) for dtype in
                    (torch.float64, torch.bfloat16))  # fmt: skip
    assert (double.bytes, half.bytes) == (8 * 15, 2 * 15)


# all networks of the zoo, against hooks on the model itself


class Counter(TorchFunctionMode):
    """Counts products while a model runs: hooks for layers, and functions called outside them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.macs = self.depth = 0
        for module in model.modules():
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase, nn.MultiheadAttention)):
                module.register_forward_pre_hook(self.enter, with_kwargs=True)
                module.register_forward_hook(self.leave, with_kwargs=True)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.depth += 1

    def leave(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.depth -= 1
        if self.depth:
            return
        if isinstance(module, nn.modules.conv._ConvNd):
            weight = module.weight.numel()
            each = args[0][:, 0] if module.transposed else output[:, 0]
            self.macs += each.numel() * weight
        elif isinstance(module, nn.Linear):
            self.macs += args[0].numel() // module.in_features * module.weight.numel()
        elif isinstance(module, nn.RNNBase):
            weights = sum(item.numel() for item in module.parameters() if item.dim() == 2)
            self.macs += args[0].numel() // args[0].shape[-1] * weights
        else:
            query = args[0] if args else kwargs["query"]
            length, width = query.shape[1 if module.batch_first else 0], module.embed_dim
            self.macs += query.numel() * 4 * width + 2 * query.numel() * length

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if self.depth == 0:
            if name in ("matmul", "bmm", "mm", "__matmul__"):
                self.macs += output.numel() * args[0].shape[-1]
            elif name == "linear":
                self.macs += output.numel() * args[1].shape[1]
            elif name in ("conv1d", "conv2d", "conv3d"):
                self.macs += output.numel() * args[1][0].numel()
            elif name == "scaled_dot_product_attention":
                self.macs += 2 * args[0].numel() * args[1].shape[-2]
            elif name == "conv_transpose2d":
                self.macs += args[0].numel() * args[1][0].numel()
            elif name == "einsum":
                assert args[0] == "nd,cd->nc"
                self.macs += output.numel() * args[1].shape[1]
        return output


UNUSED = {"wavenet": 64 * 8 * 8}
"""What networks compute for nothing and the program does not: the last block's residual."""


@pytest.mark.parametrize("name", [*ARCHITECTURES, *FAMILIES])
def test_networks_cost_what_hooks_count(name: str) -> None:
    make = (ARCHITECTURES | FAMILIES)[name]
    args, kwargs = example_inputs(name)
    program = trace(make(), args, kwargs)
    model = make()
    with torch.no_grad(), Counter(model) as counter:
        model(*args, **kwargs)
    assert counter.macs > 0
    assert program_cost(program).macs == counter.macs // samples(program) - UNUSED.get(name, 0)
    assert program_cost(program).parameters == sum(tensor.numel() for tensor in program.module.parameters())
