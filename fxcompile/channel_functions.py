"""How the channels of a function's result go with those of its operands: elementwise ones, sums, and the table."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxcompile.channel_calls import FunctionRule, arguments, by_name, shape
from fxcompile.channel_labels import Labelling, Labels, Value, rigid
from fxcompile.channel_products import attention, einsum, matmul
from fxcompile.channel_shapes import (
    cat,
    expand,
    flatten,
    flip,
    getitem,
    index_select,
    pad,
    permute,
    repeat,
    reshape,
    roll,
    split,
    squeeze,
    stack,
    unbind,
    unsqueeze,
)
from fxcompile.labels import function_name
from fxcompile.program import shape_of


def elementwise(labels: Labelling, node: fx.Node) -> Value:
    """Operands of any shape that broadcast; what meets a rigid axis of the same size stays."""
    operands = [item for item in node.all_input_nodes if shape_of(item) is not None]
    rank = len(shape(node))
    given: list[Labels | None] = []
    for axis in range(-rank, 0):
        met = [(labels.axes(item)[axis], shape(item)[axis]) for item in operands if len(shape(item)) >= -axis]
        given.append(labels.together(met, f"'{node.name}' puts them together with what is no channel"))
    return tuple(given)


def reduction(labels: Labelling, node: fx.Node) -> Value:
    """Over given axes, or over all: none of these can go."""
    source, *rest = arguments(node)
    if rest and isinstance(rest[0], fx.Node):  # the larger of two tensors
        return elementwise(labels, node)
    x = labels.axes(source)
    if function_name(node) == "vector_norm":
        rest = rest[1:]
    given = by_name(node, "dim", rest[0] if rest else None)
    over = range(len(x)) if given is None else given if isinstance(given, (tuple, list)) else (given,)
    axes = {int(axis) % max(len(x), 1) for axis in over}
    for axis in axes:
        if axis < len(x):
            labels.fix(x[axis], f"'{node.name}' takes the {function_name(node)} over them")
    outputs: Any = node.meta.get("tensor_meta")
    several = type(outputs) is tuple
    rank = len(outputs[0].shape) if several else len(shape(node))
    kept = tuple(None if axis in axes else item for axis, item in enumerate(x))
    result = kept if rank == len(x) else tuple(item for axis, item in enumerate(x) if axis not in axes)
    if len(result) != rank:
        result = rigid(rank)
    return [result] * len(outputs) if several else result


def along(labels: Labelling, node: fx.Node) -> Value:
    """Along one axis, each place from those before it."""
    x = labels.axes(arguments(node)[0])
    axis = by_name(node, "dim", arguments(node)[1] if len(arguments(node)) > 1 else 0)
    for item in axis if isinstance(axis, (tuple, list)) else (axis,):
        labels.fix(x[int(item)], f"'{node.name}' takes the {function_name(node)} along them")
    return x


def over_maps(labels: Labelling, node: fx.Node) -> Value:
    """Whatever goes over all axes behind the channels, which lie on the second."""
    x = labels.axes(arguments(node)[0])
    for axis in x[2:]:
        labels.fix(axis, f"'{node.name}' goes over them")
    for other in node.all_input_nodes[1:]:
        labels.fix_all(labels.values.get(other), f"'{node.name}' goes by them")
    return (*x[:2], *rigid(len(shape(node)) - 2))


def unfold(labels: Labelling, node: fx.Node) -> Value:
    x, kernel = labels.axes(arguments(node)[0]), arguments(node)[1]
    for axis in x[-2:]:
        labels.fix(axis, f"'{node.name}' slides over them")
    count = math.prod(kernel) if isinstance(kernel, (tuple, list)) else int(kernel) ** 2
    taken = x[-3]
    return (*x[:-3], None if taken is None else np.repeat(taken, count), None)


def size(labels: Labelling, node: fx.Node) -> Value:
    x = labels.axes(arguments(node)[0])
    axis = arguments(node)[1] if len(arguments(node)) > 1 else None
    for item in x if axis is None else (x[int(axis)],):
        labels.fix(item, f"'{node.name}' counts them")
    return None


_ELEMENTWISE = (
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.neg),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    *(operator.and_, operator.or_, operator.xor, operator.invert, operator.pow, operator.abs),
    *(torch.abs, torch.exp, torch.exp2, torch.expm1, torch.log, torch.log2, torch.log10, torch.log1p, torch.sqrt),
    *(torch.rsqrt, torch.reciprocal, torch.pow, torch.square, torch.sin, torch.cos, torch.tan, torch.asin, torch.acos),
    *(torch.atan, torch.atan2, torch.sinh, torch.cosh, torch.tanh, torch.sigmoid, torch.erf, torch.erfc, torch.floor),
    *(torch.ceil, torch.round, torch.trunc, torch.frac, torch.sign, torch.clamp, torch.maximum, torch.minimum),
    *(torch.where, torch.masked_fill, torch.logical_not, torch.logical_and, torch.logical_or, torch.logical_xor),
    *(torch.nan_to_num, torch.lerp, torch.fmod, torch.isnan, torch.isinf, torch.isfinite, torch.fill, torch.addcmul),
    *(torch.zeros_like, torch.ones_like, torch.full_like, torch.clamp_min, torch.clamp_max, torch.logit),
    *(torch.asinh, torch.acosh, torch.atanh, Tensor.to, torch.addcdiv, F.softsign, F.tanhshrink),
)


_REDUCTIONS = (
    *(torch.mean, torch.sum, torch.prod, torch.amax, torch.amin, torch.max, torch.min, torch.argmax, torch.argmin),
    *(torch.var, torch.std, torch.logsumexp, torch.any, torch.all, torch.median, torch.linalg.vector_norm),
)


FUNCTIONS: dict[Any, FunctionRule] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys((torch.cumsum, torch.cumprod, torch.softmax, torch.log_softmax), along),
    torch.roll: roll,
    torch.flatten: flatten,
    torch.reshape: reshape,
    Tensor.expand: expand,
    Tensor.repeat: repeat,
    torch.permute: permute,
    torch.squeeze: squeeze,
    torch.unsqueeze: unsqueeze,
    torch.cat: cat,
    torch.stack: stack,
    torch.unbind: unbind,
    torch.split: split,
    torch.chunk: split,
    operator.getitem: getitem,
    torch.index_select: index_select,
    F.pad: pad,
    F.interpolate: over_maps,
    F.grid_sample: over_maps,
    F.unfold: unfold,
    torch.flip: flip,
    Tensor.size: size,
    torch.matmul: matmul,
    torch.einsum: einsum,
    F.scaled_dot_product_attention: attention,
}
"""Functions of canonical form; through others no channel is followed."""
