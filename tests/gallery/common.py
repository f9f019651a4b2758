"""What the passes of the gallery share: copies of layers with other weights, and chains of nodes used once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

from fxcompile.layers import CONVOLUTIONS
from fxcompile.program import Program

ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU,
               nn.Hardswish, nn.ELU, nn.Softplus)  # fmt: skip


def with_weights(layer: Any, weight: Tensor, bias: Tensor | None, **options: Any) -> Any:
    """A copy of a layer with other weights, of the old dtype, and other options; the layer itself is not touched."""
    made = copy.copy(layer)
    made.__dict__["_parameters"] = dict(layer._parameters)
    trains, dtype = layer.weight.requires_grad, layer.weight.dtype
    made._parameters["weight"] = nn.Parameter(weight.detach().to(dtype).contiguous(), requires_grad=trains)
    trains = trains if layer.bias is None else layer.bias.requires_grad
    made._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=trains)
    for name, value in options.items():
        setattr(made, name, value)
    return made


def like(conv: Any, weight: Tensor, bias: Tensor | None, **options: Any) -> Any:
    """A new convolution of the kind of `conv` for a weight [O, C/g, *kernel], by default without stride and padding."""
    dims = weight.dim() - 2
    plain: dict[str, Any] = {"stride": (1,) * dims, "padding": (0,) * dims, "dilation": (1,) * dims, "groups": 1}
    plain.update(options)
    made = type(conv)(
        weight.shape[1] * plain["groups"], weight.shape[0], tuple(weight.shape[2:]), bias=False, device="meta", **plain
    )
    made.weight.requires_grad_(conv.weight.requires_grad)
    made = with_weights(made.to(conv.weight.dtype).eval(), weight, bias)
    if bias is not None and getattr(conv, "bias", None) is not None:
        made.bias.requires_grad_(conv.bias.requires_grad)
    return made


def rows(program: Program, *kinds: tuple[type[nn.Module], ...]) -> Iterator[tuple[fx.Node, ...]]:
    """Layers of these kinds that follow each other directly, each the only user of the one before it."""
    for first in program.graph.nodes:
        chain = [first]
        for kind in kinds:
            if type(program.layer(chain[-1])) not in kind or len(chain[-1].args) != 1:
                break
            if len(chain) == len(kinds):
                yield tuple(chain)
                break
            if len(chain[-1].users) != 1:
                break
            chain.append(next(iter(chain[-1].users)))


def untied(program: Program, layer: nn.Module) -> bool:
    """Whether no other layer holds this one's weights."""
    tied = program.tied()
    return all(len(tied[id(tensor)]) == 1 for tensor in layer.parameters())


def alone(program: Program, node: fx.Node) -> bool:
    """Whether a layer is called once, and no other holds its weights."""
    layer = program.layer(node)
    assert layer is not None
    return len(program.calls()[id(layer)]) == 1 and untied(program, layer)


def plain_convolution(layer: Any) -> bool:
    """Whether a layer is a convolution with its padding in numbers."""
    return type(layer) in CONVOLUTIONS and not isinstance(layer.padding, str)
