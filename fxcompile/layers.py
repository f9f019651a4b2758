"""Plain `torch.nn` layers: which there are, how a user's layer becomes one, and copies with other tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxcompile.errors import FitError, TraceError
from fxcompile.labels import dtype_name
from fxcompile.masks import keeping_zeros, keeps_zeros

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

PLAIN: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, *TRANSPOSED, *BATCH_NORMS, *INSTANCE_NORMS, nn.Linear, nn.PReLU,
                                      nn.GroupNorm, nn.LayerNorm, nn.Embedding, nn.RMSNorm, nn.LSTM,
                                      nn.GRU, nn.RNN)  # fmt: skip
"""Layers with weights that canonical form knows."""


class Reorder(nn.Module):
    """Channels `order` of the input, in that order."""

    order: Tensor

    def __init__(self, order: Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("order", order)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """[..., C, *positions] -> the same, C on this axis"""
        return torch.index_select(x, self.axis, self.order)


def plain_kind(module: nn.Module) -> type[nn.Module] | None:
    """The plain layer that a module computes as: its own class, or the base whose forward it inherits unchanged."""
    for kind in PLAIN:
        if type(module) is kind:
            return kind
    for kind in PLAIN:
        if isinstance(module, kind) and inherits_forward(type(module), kind):
            return kind
    return None


def inherits_forward(kind: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a subclass computes what its base does, parametrised weights aside."""
    names = ("forward", "_conv_forward", "__call__", "_output_padding", "_check_input_dim")
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in names)


_OLD_NORMS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")
"""Modules of `torch` whose forward pre-hooks compute a layer's weight."""


def weight_hooks(module: nn.Module) -> list[Any]:
    """The forward pre-hooks that compute the module's weights: `torch.nn.utils.weight_norm` and `spectral_norm`."""
    return [hook for hook in module._forward_pre_hooks.values() if type(hook).__module__ in _OLD_NORMS]


def computes_weights(module: nn.Module) -> bool:
    """Whether a layer's weights are computed when they are asked for, by a parametrisation or a hook."""
    return parametrize.is_parametrized(module) or bool(weight_hooks(module))


def plain_layer(module: nn.Module, name: str, input_shape: tuple[int, ...] = ()) -> nn.Module:
    """The layer as canonical form has it: a plain class, no parametrisation or hooks, sharing the tensors.

    Args:
        module: the model's layer.
        name: its name, for the error.
        input_shape: tells which batch norm a `SyncBatchNorm` stands for.

    Raises:
        TraceError: the layer is parametrised in a way that no plain layer expresses.
    """
    kind = plain_kind(module)
    if isinstance(module, nn.SyncBatchNorm):
        kind = BATCH_NORMS[max(len(input_shape) - 3, 0)]
    if computes_weights(module):
        if kind is None:
            raise TraceError(
                f"its weights are parametrised and {type(module).__name__} is no plain layer of torch.nn",
                place=f"layer '{name}'",
                mend="remove the parametrisation first with torch.nn.utils.parametrize.remove_parametrizations",
            )
        layer = _evaluated(module, kind)
        if keeps_zeros(module):
            keeping_zeros(layer)
    else:
        layer = shallow_copy(module)
        if kind is not None:
            layer.__class__ = kind
    for registry in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(layer, registry).clear()  # what they do is in the graph
    if isinstance(layer, CONVOLUTIONS) and isinstance(layer.padding, str):
        layer.padding = numeric_padding(layer.padding, layer.kernel_size, layer.dilation)
    if getattr(layer, "inplace", False) is True:
        layer.inplace = False  # type: ignore[assignment]
    return layer


def numeric_padding(padding: str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> str | tuple[int, ...]:
    """Padding "same" or "valid" in numbers, where it is the same on both sides."""
    if padding == "valid":
        return (0,) * len(kernel)
    total = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
    return padding if any(amount % 2 for amount in total) else tuple(amount // 2 for amount in total)


def identity(layer: nn.Module) -> tuple[object, ...]:
    """What makes two layers the same: class, options, and the very same tensors."""
    counted = [tensor for name, tensor in layer.named_buffers(recurse=False) if name != "num_batches_tracked"]
    tensors = tuple(id(tensor) for tensor in (*layer._parameters.values(), *counted))
    return type(layer), layer.extra_repr(), tensors


def holds_weights(what: object) -> bool:
    """Whether something stored in a program is a layer with parameters."""
    return isinstance(what, nn.Module) and any(True for _ in what.parameters())


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module of its own over the same tensors: mode and attributes of one do not reach the other."""
    if parametrize.is_parametrized(module):  # which refuses to be copied
        copied = object.__new__(type(module))
        copied.__dict__.update(module.__dict__)
    else:
        copied = copy.copy(module)
    for registry in (
        "_parameters",
        "_buffers",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    ):
        copied.__dict__[registry] = copy.copy(module.__dict__[registry])
    copied.__dict__["_modules"] = {name: child and shallow_copy(child) for name, child in module._modules.items()}
    return copied


def with_weights(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of a layer with another weight and bias, rounded once to its dtype, that trains as far as the layer did.

    Args:
        layer: a convolution, transposed or not, or a linear layer.
        weight: as the layer stores it.
        bias: [O], or None for none.

    Raises:
        FitError: a number is NaN, or too large for that dtype.
    """
    copied, old = shallow_copy(layer), layer.weight
    bias_trains = old.requires_grad if layer.bias is None else layer.bias.requires_grad
    for name, values, trains in (("weight", weight, old.requires_grad), ("bias", bias, bias_trains)):
        if values is None:
            copied.register_parameter(name, None)
            continue
        rounded = values.detach().to(old.device, old.dtype, copy=True).contiguous()
        if not is_finite(rounded):
            dtype = dtype_name(old.dtype)
            raise FitError(
                f"its new {name} has numbers that {dtype} cannot hold", mend="leave it, or use a wider dtype"
            )
        copied.register_parameter(name, nn.Parameter(rounded, requires_grad=trains))
    return copied


def converted(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a module over its tensors changed: cast, or moved to another device."""
    copied = shallow_copy(module)
    for inner in copied.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                inner._parameters[name] = nn.Parameter(change(parameter.detach()), parameter.requires_grad)
        for name, buffer in inner._buffers.items():
            inner._buffers[name] = None if buffer is None else change(buffer.detach())
        if isinstance(inner, nn.RNNBase):
            inner._init_flat_weights()
    return copied


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor's shape and dtype, without values."""
    return tensor.to("meta")


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # Nearly always the sum says so, which takes a fifth of the time; it may overflow by itself.
    return math.isfinite(abs(tensor.sum().item())) or bool(tensor.isfinite().all())


def as_double(tensor: Tensor) -> Tensor:
    """A floating tensor in float64; others as they are."""
    return tensor.double() if tensor.is_floating_point() else tensor


def _evaluated(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The plain layer over the weights which a parametrised one computes now."""
    layer = shallow_copy(module)
    layer.__class__ = kind
    with torch.no_grad():
        hooks = weight_hooks(module)
        for hook in hooks:
            hook(module, ())
        names = list(getattr(module, "parametrizations", {}))
        names += [str(getattr(hook, "name", "weight")) for hook in hooks]
        values = {name: getattr(module, name).detach().clone() for name in names}
    layer._modules.pop("parametrizations", None)
    for name, value in values.items():
        for left in (name, f"{name}_g", f"{name}_v", f"{name}_orig"):
            layer._parameters.pop(left, None)
            layer.__dict__.pop(left, None)
        layer._buffers.pop(f"{name}_u", None)
        layer.register_parameter(name, nn.Parameter(value))
    return layer
