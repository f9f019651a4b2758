"""How channels go through what gives a tensor another shape or order, joins tensors or takes one apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from fxcompile.channel_calls import arguments, by_name, kept_sizes, shape, unknown, whole
from fxcompile.channel_labels import Kept, Labelling, Labels, Value, replaced, rigid
from fxcompile.channel_reshape import reshaped
from fxcompile.program import fetch


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
        part: Value = known[index] if isinstance(index, (int, slice)) else unknown(labels, node)
        return part
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


def roll(labels: Labelling, node: fx.Node) -> Value:
    """Channels stay in their places, or none can go."""
    x, args = labels.axes(arguments(node)[0]), arguments(node)
    axes = by_name(node, "dims", args[2] if len(args) > 2 else None)
    if axes is None or axes == []:
        return unknown(labels, node)
    for axis in axes if isinstance(axes, (tuple, list)) else (axes,):
        labels.fix(x[axis], f"'{node.name}' takes them round")
    return x


def flip(labels: Labelling, node: fx.Node) -> Value:
    x, axes = labels.axes(arguments(node)[0]), arguments(node)[1]
    gone = {int(axis) % len(x) for axis in axes}
    return tuple(item[::-1] if axis in gone and item is not None else item for axis, item in enumerate(x))
