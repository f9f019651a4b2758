"""How the channels of a function's result go together with those of its operands."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxcompile.channel_labels import Axes, Kept, Labelling, Labels, Value, replaced, rigid
from fxcompile.channel_reshape import reshaped
from fxcompile.labels import function_name
from fxcompile.program import fetch, shape_of

FunctionRule = Callable[[Labelling, fx.Node], Value]
"""(labels, the node) -> what is known of the result"""


def shape(node: object) -> tuple[int, ...]:
    """Of a node's tensor; () of numbers."""
    return (shape_of(node) or ()) if isinstance(node, fx.Node) else ()


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """What a call is given by position, in the form that canonical form has for it."""
    return node.args


def by_name(node: fx.Node, name: str, default: Any) -> Any:
    """What a call is given by keyword, else what it has by position."""
    return node.kwargs.get(name, default)


def kept_sizes(sizes: Sequence[Any], axes: Axes) -> Callable[[Kept], tuple[Any, ...]]:
    """Sizes as a call has them, in numbers where these stood, from what stays of each axis."""

    def sized(kept: Kept) -> tuple[Any, ...]:
        return tuple(
            int(kept(axis).sum()) if axis is not None and isinstance(size, int) and size > 0 else size
            for size, axis in zip(sizes, axes, strict=True)
        )

    return sized


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


def flatten(labels: Labelling, node: fx.Node) -> Value:
    return reshaped(labels, node, labels.axes(arguments(node)[0]), shape(arguments(node)[0]), shape(node))


def reshape(labels: Labelling, node: fx.Node) -> Value:
    source, sizes = arguments(node)[:2]
    given = reshaped(labels, node, labels.axes(source), shape(source), shape(node))
    sized = kept_sizes(sizes, given)
    labels.resized[node] = lambda kept: ((source, sized(kept)), {})
    return given


def expand(labels: Labelling, node: fx.Node) -> Value:
    source, sizes = arguments(node)[:2]
    x, before, after = labels.axes(source), shape(source), shape(node)
    lead = len(after) - len(before)
    given = (
        *rigid(lead),
        *(item if size == now else None for item, size, now in zip(x, before, after[lead:], strict=True)),
    )
    sized = kept_sizes(sizes, given)
    labels.resized[node] = lambda kept: ((source, sized(kept)), {})
    return given


def repeat(labels: Labelling, node: fx.Node) -> Value:
    x, after = labels.axes(arguments(node)[0]), shape(node)
    lead = len(after) - len(x)
    before = shape(arguments(node)[0])
    times = [now // max(size, 1) for size, now in zip(before, after[lead:], strict=True)]
    return (
        *rigid(lead),
        *(None if item is None else np.tile(item, count) for item, count in zip(x, times, strict=True)),
    )


def permute(labels: Labelling, node: fx.Node) -> Value:
    x, order = labels.axes(arguments(node)[0]), arguments(node)[1]
    return tuple(x[int(axis)] for axis in order)


def squeeze(labels: Labelling, node: fx.Node) -> Value:
    x, before = labels.axes(arguments(node)[0]), shape(arguments(node)[0])
    given = arguments(node)[1] if len(arguments(node)) > 1 else range(len(x))
    axes = {int(axis) for axis in given if before[int(axis)] == 1}
    for axis in axes:
        labels.fix(x[axis], f"'{node.name}' takes the only one there is")
    return tuple(item for axis, item in enumerate(x) if axis not in axes)


def unsqueeze(labels: Labelling, node: fx.Node) -> Value:
    x, axis = labels.axes(arguments(node)[0]), arguments(node)[1]
    axis %= len(x) + 1
    return (*x[:axis], None, *x[axis:])


def cat(labels: Labelling, node: fx.Node) -> Value:
    parts, axis = arguments(node)[:2]
    nodes = [item for item in parts if isinstance(item, fx.Node)]
    found = [labels.axes(item) for item in nodes]
    given: list[Labels | None] = []
    for position in range(len(shape(node))):
        sizes = [shape(item)[position] for item in nodes]
        if position != axis:
            met = [(axes[position], size) for axes, size in zip(found, sizes, strict=True)]
            given.append(labels.together(met, f"'{node.name}' puts them beside what is no channel"))
        elif all(axes[position] is None for axes in found):
            given.append(None)
        else:
            given.append(
                np.concatenate([whole(labels, axes[position], size) for axes, size in zip(found, sizes, strict=True)])
            )
    return tuple(given)


def whole(labels: Labelling, axis: Labels | None, size: int) -> Labels:
    """The labels of an axis, new ones that cannot go if it is rigid."""
    if axis is not None:
        return axis
    found = labels.fresh(size)
    labels.fix(found, "no layer makes them")
    return found


def stack(labels: Labelling, node: fx.Node) -> Value:
    parts = arguments(node)[0]
    axis = by_name(node, "dim", arguments(node)[1] if len(arguments(node)) > 1 else 0)
    nodes = [item for item in parts if isinstance(item, fx.Node)]
    rank = len(shape(node)) - 1
    axis %= rank + 1
    given = [
        labels.together(
            [(labels.axes(item)[position], shape(item)[position]) for item in nodes],
            f"'{node.name}' puts them beside what is no channel",
        )
        for position in range(rank)
    ]
    return (*given[:axis], None, *given[axis:])


def unbind(labels: Labelling, node: fx.Node) -> Value:
    x = labels.axes(arguments(node)[0])
    axis = by_name(node, "dim", arguments(node)[1] if len(arguments(node)) > 1 else 0)
    axis %= len(x)
    labels.fix(x[axis], f"'{node.name}' takes them one by one")
    return [(*x[:axis], *x[axis + 1 :])] * shape(arguments(node)[0])[axis]


def split(labels: Labelling, node: fx.Node) -> Value:
    """`split` and `chunk`: the parts keep what they have of the channels."""
    source, _, *rest = arguments(node)
    axis = by_name(node, "dim", rest[0] if rest else 0)
    outputs = node.meta["tensor_meta"]
    x = labels.axes(source)
    axis %= len(x)
    taken = x[axis]
    if taken is None:
        return [x] * len(outputs)
    parts = np.split(taken, np.cumsum([item.shape[axis] for item in outputs])[:-1])

    def resize(kept: Kept) -> tuple[tuple[Any, ...], dict[str, Any]]:
        node.target = torch.split
        return (source, tuple(int(kept(part).sum()) for part in parts), axis), {}

    labels.resized[node] = resize
    return [replaced(x, axis, part) for part in parts]


def getitem(labels: Labelling, node: fx.Node) -> Value:
    """A part of a tuple; a slice of an axis, or one place of it."""
    source, index = arguments(node)
    known = labels.values.get(source) if isinstance(source, fx.Node) else None
    if isinstance(known, list):
        return known[index] if isinstance(index, int) and -len(known) <= index < len(known) else None
    x = labels.axes(source)
    items = index if isinstance(index, tuple) else (index,)
    *before, last = items
    if any(item != slice(None) for item in before) or isinstance(last, fx.Node) or not isinstance(last, (int, slice)):
        return unknown(labels, node)
    axis = len(before)
    taken = x[axis]
    if isinstance(last, int):
        labels.fix(taken, f"'{node.name}' takes one of them")
        return (*x[:axis], *x[axis + 1 :])
    if taken is None:
        return x
    numbers = (last.start, last.stop, last.step)
    if any(isinstance(number, fx.Node) for number in numbers):
        labels.fix(taken, f"'{node.name}' takes as many of them as it computes")
        return replaced(x, axis, None)
    places = np.arange(len(taken))[last]
    if last.step not in (None, 1):
        labels.fix(taken, f"'{node.name}' takes every {last.step}th of them")
    else:
        start, stop = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)

        def resize(kept: Kept) -> tuple[tuple[Any, ...], dict[str, Any]]:
            first, final = (int(kept(taken[:place]).sum()) for place in (start, stop))
            end = None if last.stop is None else final
            return (source, (*before, slice(first or None, end, None))), {}

        labels.resized[node] = resize
    return replaced(x, axis, taken[places])


def index_select(labels: Labelling, node: fx.Node) -> Value:
    """Channels in another order, or several times, where the order is stored."""
    source, axis, index = arguments(node)
    x = labels.axes(source)
    if not isinstance(axis, int) or not isinstance(index, fx.Node) or index.op != "get_attr":
        return unknown(labels, node)
    axis %= len(x)
    taken = x[axis]
    order = fetch(labels.program.module, str(index.target))
    if taken is None or len(index.users) > 1:
        labels.fix(taken, f"'{node.name}' shares its order with another")
        return replaced(x, axis, None)
    places: Labels = order.detach().numpy().astype(np.int64)
    given = taken[places]
    labels.orders[str(index.target)] = (taken, places)
    return replaced(x, axis, given)


def pad(labels: Labelling, node: fx.Node) -> Value:
    """What stands beside channels goes like them, where zeros do."""
    source, amounts, mode, *value = arguments(node)
    x = labels.axes(source)
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))
    given, added = list(x), {}
    for number, pair in enumerate(pairs):
        axis = len(x) - 1 - number
        taken = x[axis]
        if taken is None or pair == (0, 0):
            continue
        if mode != "constant" or not all(isinstance(amount, int) and amount >= 0 for amount in pair):
            labels.fix(taken, f"'{node.name}' pads them")
            given[axis] = None
            continue
        low, high = (labels.fresh(int(amount)) for amount in pair)
        given[axis] = np.concatenate([low, taken, high])
        added[number] = (low, high)

    def resize(kept: Kept) -> tuple[tuple[Any, ...], dict[str, Any]]:
        now = list(pairs)
        for number, (low, high) in added.items():
            now[number] = (int(kept(low).sum()), int(kept(high).sum()))
        return (source, [amount for pair in now for amount in pair], mode, *value), {}

    if added:
        labels.resized[node] = resize
    return tuple(given)


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


def flip(labels: Labelling, node: fx.Node) -> Value:
    x, axes = labels.axes(arguments(node)[0]), arguments(node)[1]
    gone = {int(axis) % len(x) for axis in axes}
    return tuple(item[::-1] if axis in gone and item is not None else item for axis, item in enumerate(x))


def size(labels: Labelling, node: fx.Node) -> Value:
    x = labels.axes(arguments(node)[0])
    axis = arguments(node)[1] if len(arguments(node)) > 1 else None
    for item in x if axis is None else (x[int(axis)],):
        labels.fix(item, f"'{node.name}' counts them")
    return None


def matmul(labels: Labelling, node: fx.Node) -> Value:
    first, second = arguments(node)[:2]
    a, b = len(shape(first)), len(shape(second))
    batch = [f"batch{place}" for place in range(max(a, b) - 2, 0, -1)]
    left = [*batch[len(batch) - (a - 2) :], "m", "k"] if a > 1 else ["k"]
    right = [*batch[len(batch) - (b - 2) :], "k", "n"] if b > 1 else ["k"]
    result = [*batch, *(["m"] if a > 1 else []), *(["n"] if b > 1 else [])]
    return product(labels, node, [(first, left), (second, right)], result)


def einsum(labels: Labelling, node: fx.Node) -> Value:
    equation, *operands = arguments(node)
    terms, arrow, result = equation.partition("->")
    letters = [list(term) for term in terms.split(",")]
    if "." in equation or not arrow or any(len(set(term)) < len(term) for term in (*letters, list(result))):
        return unknown(labels, node)
    return product(labels, node, list(zip(operands, letters, strict=True)), list(result))


def product(
    labels: Labelling, node: fx.Node, operands: Sequence[tuple[object, Sequence[str]]], result: Sequence[str]
) -> Value:
    """A sum of products over all indices that the result does not have; these go in all operands at once."""
    met: dict[str, list[tuple[Labels | None, int]]] = {}
    for operand, names in operands:
        for name, axis, count in zip(names, labels.axes(operand), shape(operand), strict=True):
            met.setdefault(name, []).append((axis, count))
    found = {
        name: labels.together(own, f"'{node.name}' multiplies them with what is no channel")
        for name, own in met.items()
    }
    for name, own in met.items():
        if name not in result and len(own) == 1:
            labels.fix(own[0][0], f"'{node.name}' sums over them")
    return tuple(found[name] for name in result)


def attention(labels: Labelling, node: fx.Node) -> Value:
    """softmax(Q Kᵀ / sqrt(E)) V: Q and K may lose features, and V others; the scale stays that of E."""
    query, key, value = arguments(node)[:3]
    q, k, v = (labels.axes(item) for item in (query, key, value))
    if node.kwargs.get("enable_gqa") or len(arguments(node)) > 3 or len({len(q), len(k), len(v)}) > 1:
        return unknown(labels, node)
    for axis in (q[-2], k[-2], v[-2]):
        labels.fix(axis, f"'{node.name}' takes the softmax over them")
    mask = node.kwargs.get("attn_mask")
    labels.fix_all(labels.values.get(mask) if isinstance(mask, fx.Node) else None, f"'{node.name}' masks by them")

    def together(axis: int, *operands: object) -> Labels | None:
        met = [(labels.axes(item)[axis], shape(item)[axis]) for item in operands]
        return labels.together(met, f"'{node.name}' multiplies them with what is no channel")

    given = (*(together(axis, query, key, value) for axis in range(len(q) - 2)), None, v[-1])
    together(-1, query, key)
    width = shape(query)[-1]
    features = q[-1]
    if features is not None and "scale" not in node.kwargs:

        def resize(kept: Kept) -> tuple[tuple[Any, ...], dict[str, Any]]:
            scale = {} if kept(features).all() else {"scale": width**-0.5}
            return node.args, dict(sorted({**node.kwargs, **scale}.items()))

        labels.resized[node] = resize
    return given


def same(labels: Labelling, node: fx.Node) -> Value:
    return labels.axes(arguments(node)[0])


def unknown(labels: Labelling, node: fx.Node) -> Value:
    """What goes into an operation that is not known here stays."""
    reason = f"'{node.name}' calls {function_name(node)}, which they are not followed through"
    for item in node.all_input_nodes:
        labels.fix_all(labels.values.get(item), reason)
    outputs = node.meta.get("tensor_meta")
    if type(outputs) is tuple:
        return [None if item is None else rigid(len(item.shape)) for item in outputs]
    return None if shape_of(node) is None else rigid(len(shape(node)))


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
    **dict.fromkeys((torch.cumsum, torch.cumprod, torch.roll, torch.softmax, torch.log_softmax), along),
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
