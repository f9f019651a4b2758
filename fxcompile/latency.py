"""How long layers take in ONNX Runtime, beside each other in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from fxcompile.errors import EmitError
from fxcompile.layers import CONVOLUTIONS, Reorder
from fxcompile.patches import padding_amounts
from fxcompile.runtime import session_of

OPSET, IR = 18, 10

SECONDS, ROUNDS = 0.5, (7, 50)
"""Time that the rounds may take together, and how many there are at least and at most."""


def times_of(chains: Sequence[Sequence[nn.Module]], shape: Sequence[int]) -> list[float | None]:
    """Seconds that each chain of layers takes in ONNX Runtime, in float32, on an input of this shape.

    Layers of convolutions for one sample get a batch of one. All run in turn, each first in some rounds, so that
    whatever else the machine does slows all: what holds is the median ratio to the first chain, times that one's median
    time. None for a chain that has no form here.
    """
    axes = max(len(getattr(layer, "kernel_size", ())) for layers in chains for layer in layers)
    whole = batched(shape, axes)
    x = {"x": np.random.default_rng(0).standard_normal(whole, dtype=np.float32)}
    sessions: list[Any] = []
    for layers in chains:
        try:
            sessions.append(session_of(model_of(layers, whole, len(whole) - len(shape))))
        except (KeyError, EmitError):
            sessions.append(None)
    runs = [lambda session=session: session.run(None, x) for session in sessions if session is not None]
    found = iter(interleaved(runs))
    return [None if session is None else next(found) for session in sessions]


def interleaved(runs: Sequence[Callable[[], object]], clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds that each of these takes, in rounds of all of them: relative to the first by the median of the ratios."""

    def timed(run: Callable[[], object]) -> float:
        started = clock()
        run()
        return clock() - started

    for run in runs:
        run()
    once = sum(map(timed, runs))
    rounds = min(max(int(SECONDS / max(once, 1e-9)), ROUNDS[0]), ROUNDS[1])
    times: list[list[float]] = [[] for _ in runs]
    for number in range(rounds):
        for step in range(len(runs)):
            index = (number + step) % len(runs)
            times[index].append(timed(runs[index]))
    first = [max(seconds, 1e-9) for seconds in times[0]] if runs else []
    return [median(a / b for a, b in zip(own, first, strict=True)) * median(first) for own in times]


def model_of(layers: Sequence[nn.Module], shape: Sequence[int], added: int = 0) -> bytes:
    """An ONNX file, in float32, of layers that follow each other.

    Args:
        shape: of the input.
        added: axes at its front that the layers know nothing of.

    Raises:
        KeyError: a layer is none of those that are known here.
    """
    nodes: list[onnx.NodeProto] = []
    held: list[onnx.TensorProto] = []
    channels = shape[1] if len(shape) > 1 else 1
    for number, layer in enumerate(layers):
        nodes += _nodes(layer, f"x{number}" if number else "x", f"x{number + 1}", held, channels, added)
        channels = getattr(layer, "out_channels", channels)
    last = f"x{len(layers)}" if layers else "x"
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        held,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    found: bytes = model.SerializeToString()
    return found


def _nodes(
    layer: Any, source: str, target: str, held: list[onnx.TensorProto], channels: int, added: int
) -> list[onnx.NodeProto]:
    """The nodes of one layer, which has so many input channels; its tensors go to `held`."""

    def hold(values: Tensor, part: str) -> str:
        name = f"{target}.{part}"
        values = values.detach().float() if values.is_floating_point() else values
        held.append(numpy_helper.from_array(values.numpy(), name))
        return name

    if isinstance(layer, CONVOLUTIONS):
        weights = [hold(layer.weight, "weight"), *([] if layer.bias is None else [hold(layer.bias, "bias")])]
        sides = padding_amounts(layer)
        node = helper.make_node(
            "Conv",
            [source, *weights],
            [target],
            kernel_shape=list(layer.kernel_size),
            strides=list(layer.stride),
            dilations=list(layer.dilation),
            group=layer.groups,
            pads=[before for before, _ in sides] + [after for _, after in sides],
        )
        return [node]
    if isinstance(layer, nn.Linear):
        product = target if layer.bias is None else f"{target}.product"
        nodes = [helper.make_node("MatMul", [source, hold(layer.weight.mT, "weight")], [product])]
        if layer.bias is not None:
            nodes.append(helper.make_node("Add", [product, hold(layer.bias, "bias")], [target]))
        return nodes
    if isinstance(layer, nn.ReLU):
        return [helper.make_node("Relu", [source], [target])]
    if isinstance(layer, nn.ChannelShuffle):
        groups, (shape, split, swapped) = layer.groups, (f"{target}.{part}" for part in ("shape", "split", "swapped"))
        apart = hold(torch.tensor([0, groups, channels // groups, -1]), "apart")
        return [
            helper.make_node("Shape", [source], [shape]),
            helper.make_node("Reshape", [source, apart], [split]),
            helper.make_node("Transpose", [split], [swapped], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [swapped, shape], [target]),
        ]
    if isinstance(layer, Reorder):
        axis = layer.axis + added if layer.axis >= 0 else layer.axis
        return [helper.make_node("Gather", [source, hold(layer.order, "order")], [target], axis=axis)]
    raise KeyError(type(layer).__name__)


def batched(shape: Sequence[int], axes: int) -> tuple[int, ...]:
    """A shape of inputs [N, C, *positions] with as many positions, of one sample if there is no N."""
    missing = axes + 2 - len(shape)
    return (*[1] * missing, *shape) if axes and missing > 0 else tuple(shape)
