"""What tests of passes share: networks of a few lines, layers and inputs, and programs as text for golden tests."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxcompile.labels import describe_node
from fxcompile.manager import Result
from fxcompile.pipeline import format_pipeline, parse_pipeline
from fxcompile.program import Program
from fxcompile.rewriting import Pass

MODES = ("zeros", "zeros", "circular", "reflect", "replicate")
"""Padding modes to draw from."""


class Net(nn.Module):
    """Layers by name and a function that calls them."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def printed(program: Program) -> str:
    """The graph as `name = what(arguments)`, a line for each node; layers by the name under which they are stored."""
    names: dict[fx.Node, str] = {}
    lines = []
    for node in program.graph.nodes:
        layer = program.layer(node)
        name = names[node] = str(node.target) if layer is not None or node.op == "placeholder" else node.name
        if node.op == "placeholder":
            continue
        arguments = [text(item, names) for item in node.args]
        arguments += [f"{key}={text(item, names)}" for key, item in node.kwargs.items()]
        what = describe_node(program, node)
        call = f"{what}({', '.join(arguments)})"
        lines.append(f"return {', '.join(arguments)}" if node.op == "output" else f"{name} = {call}")
    return "\n".join(lines)


def text(value: Any, names: dict[fx.Node, str]) -> str:
    """An argument: nodes by name, all else as Python writes it."""
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(text(item, names) for item in value)}]"
    return repr(value)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The L2 norm of a difference over that of what it should be."""
    a, b = ours.detach().double(), theirs.detach().double()
    return float((a - b).norm() / b.norm())


def with_layers(net: nn.Module, **layers: nn.Module) -> Any:
    """A copy of a network with other layers."""
    made = copy.deepcopy(net)
    for name, layer in layers.items():
        setattr(made, name, layer)
    return made


KINDS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def images(count: int, channels: int, *size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs whose pixels and channels are alike, as a network's features are."""
    pool = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[len(size) - 1](3, 1)
    plain: Tensor = pool(randn(count, 3, *[n + 2 for n in size], seed=seed))
    mixed = torch.einsum("nc...,dc->nd...", plain, randn(channels, 3, seed=77)).relu()
    return (mixed + 0.02 * randn(count, channels, *size, seed=seed + 1)).to(dtype)


def conv(
    inputs: int, outputs: int, *kernel: int, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any
) -> Any:
    """A convolution with weights from a seed."""
    layer = KINDS[len(kernel)](inputs, outputs, kernel, dtype=dtype, **options).eval()
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed + index) / math.sqrt(layer.weight[0].numel()))
    return layer


def planted(layer: Any, groups: int, seed: int) -> None:
    """Set all weights of a layer to zero but those within so many groups of each of its own, in disorder."""
    generator = torch.Generator().manual_seed(seed)
    outs, ins = layer.out_channels // layer.groups, layer.weight.shape[1]
    for own in layer.weight.detach().unflatten(0, (layer.groups, outs)):
        rows, columns = torch.randperm(outs, generator=generator), torch.randperm(ins, generator=generator)
        keeps = (rows * groups // outs)[:, None] == (columns * groups // ins)[None]
        own.mul_(keeps[(..., *[None] * len(layer.kernel_size))])


def geometry(
    draw: Callable[[Any], Any], kernel: tuple[int, ...], groups: int, modes: tuple[str, ...] = ("zeros",), pad: int = 2
) -> dict[str, Any]:
    """Drawn options of a convolution with that kernel and those groups: stride, dilation, padding, its mode, bias.

    Args:
        pad: the most padding along an axis.
    """
    return {
        "stride": tuple(draw(st.integers(1, 2)) for _ in kernel),
        "dilation": tuple(draw(st.integers(1, 2)) for _ in kernel),
        "padding": tuple(draw(st.integers(0, pad)) for _ in kernel),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(modes)),
    }


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(x)
    return found


def only_site(result: Result) -> Any:
    (site,) = result.record.passes[0].sites
    return site


def assert_text_means_the_same(pass_: Pass) -> None:
    """As pipeline text, with the options that were given or with every option, it is read as the same pass."""
    for complete in (False, True):
        assert parse_pipeline(format_pipeline([pass_], complete=complete)) == [pass_]
