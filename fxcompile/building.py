"""Builds the plain `torch.nn` layer that computes a functional operation on constant weights."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fxcompile.layers import BATCH_NORMS, CONVOLUTIONS, INSTANCE_NORMS, TRANSPOSED, numeric_padding


def build_layer(
    operation: str, tensors: dict[str, Tensor | None], options: dict[str, Any], input_shape: tuple[int, ...]
) -> nn.Module | None:
    """The plain layer for a functional operation on constant weights, or None where no layer computes that.

    Args:
        operation: a name of `spellings.WEIGHTED`.
        tensors: "weight", "bias", "running_mean", "running_var" as the operation takes them.
        options: its other arguments, plain numbers.
        input_shape: shape of the input, which tells batch norms apart.
    """
    weight = tensors.get("weight")
    layer: nn.Module | None
    if operation.startswith("conv"):
        layer = None if weight is None else _convolution(operation, weight, options)
    elif operation == "linear":
        layer = None
        if weight is not None and weight.dim() == 2:
            layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    elif operation in ("batch_norm", "instance_norm"):
        layer = _statistics_norm(operation, tensors, options, input_shape)
    elif operation == "group_norm":
        layer = nn.GroupNorm(options["num_groups"], input_shape[1], options.get("eps", 1e-5), device="meta")
    elif operation == "layer_norm":
        layer = nn.LayerNorm(list(_tuple(options["normalized_shape"])), options.get("eps", 1e-5), device="meta")
    elif operation == "rms_norm":
        layer = nn.RMSNorm(list(_tuple(options["normalized_shape"])), options.get("eps"), device="meta")
    elif operation == "prelu":
        layer = None if weight is None else nn.PReLU(weight.numel(), device="meta")
    else:
        layer = None
    return None if layer is None else _with_tensors(layer, tensors)


def _convolution(operation: str, weight: Tensor, options: dict[str, Any]) -> nn.Module | None:
    dims = weight.dim() - 2
    if dims not in (1, 2, 3):
        return None
    transposed = operation.startswith("conv_transpose") or bool(options.get("transposed", False))
    groups = options.get("groups", 1)
    padding = options.get("padding", 0)
    dilation = _broadcast(options.get("dilation", 1), dims)
    if isinstance(padding, str):
        padding = numeric_padding(padding, tuple(weight.shape[2:]), dilation)
    common: dict[str, Any] = {
        "kernel_size": tuple(weight.shape[2:]),
        "stride": _broadcast(options.get("stride", 1), dims),
        "padding": padding if isinstance(padding, str) else _broadcast(padding, dims),
        "dilation": dilation,
        "groups": groups,
        "device": "meta",
    }
    if transposed:
        output_padding: Any = _broadcast(options.get("output_padding", 0), dims)
        kind = TRANSPOSED[dims - 1]
        return kind(weight.shape[0], weight.shape[1] * groups, output_padding=output_padding, **common)
    return CONVOLUTIONS[dims - 1](weight.shape[1] * groups, weight.shape[0], **common)


def _statistics_norm(
    operation: str, tensors: dict[str, Tensor | None], options: dict[str, Any], input_shape: tuple[int, ...]
) -> nn.Module | None:
    dims = max(len(input_shape) - 2, 1)
    if dims > 3 or len(input_shape) < 2:
        return None
    from_batch = options.get("training" if operation == "batch_norm" else "use_input_stats", operation != "batch_norm")
    tracked = tensors.get("running_mean") is not None
    if operation == "batch_norm" and from_batch and tracked:
        return None  # the model normalises by the batch on purpose, though it has statistics
    if operation == "instance_norm" and not from_batch and not tracked:
        return None
    kind = (BATCH_NORMS if operation == "batch_norm" else INSTANCE_NORMS)[dims - 1]
    keep = tracked and (operation == "batch_norm" or not from_batch)
    layer = kind(
        input_shape[1],
        eps=options.get("eps", 1e-5),
        momentum=options.get("momentum", 0.1),
        affine=tensors.get("weight") is not None or tensors.get("bias") is not None,
        track_running_stats=keep,
        device="meta",
    )
    if keep:
        layer.register_buffer("num_batches_tracked", torch.tensor(0))
    return layer


def _with_tensors(layer: nn.Module, tensors: dict[str, Tensor | None]) -> nn.Module:
    for name in ("weight", "bias"):
        if name not in layer._parameters:
            continue
        tensor = tensors.get(name)
        if tensor is None:
            layer.register_parameter(name, None)
        elif isinstance(tensor, nn.Parameter):
            layer.register_parameter(name, tensor)
        else:
            layer.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
    if isinstance(layer, (*BATCH_NORMS, *INSTANCE_NORMS)) and layer.track_running_stats:
        layer.register_buffer("running_mean", tensors.get("running_mean"))
        layer.register_buffer("running_var", tensors.get("running_var"))
    if isinstance(layer, (*BATCH_NORMS, *INSTANCE_NORMS)) and layer.affine and layer.weight is None:
        layer.register_parameter("weight", nn.Parameter(torch.ones_like(cast(Tensor, layer.bias)), requires_grad=False))
    return layer.eval()


def _tuple(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _broadcast(value: Any, dims: int) -> tuple[int, ...]:
    """Sizes for each axis: `aten` may give one number for all."""
    sizes = _tuple(value)
    return sizes * dims if len(sizes) == 1 else sizes
