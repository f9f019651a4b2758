"""Rules for operations that give a tensor another shape or order, join tensors or take one apart."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxcompile.lowering import Canonicaliser, rule
from fxcompile.program import shape_of
from fxcompile.raw_nodes import Call


def lower_reshape(self: Canonicaliser, call: Call) -> Any:
    """`view` and `reshape`; the sizes get their form in `sizes.settle`."""
    after = shape_of(call.node)
    if after is None or not isinstance(call.source, fx.Node):
        return NotImplemented
    if call.name in ("view_as", "reshape_as"):
        other = call.args[1] if len(call.args) > 1 else call.kwargs["other"]
        sizes: Any = tuple(self.size(other, axis) for axis in range(len(after)))
    else:
        sizes = call.kwargs.get(
            "shape", call.kwargs.get("size", call.args[1] if len(call.args) == 2 else call.args[1:])
        )
        if isinstance(sizes, torch.dtype) or "dtype" in call.kwargs:
            return NotImplemented
        sizes = self.value(sizes if not isinstance(sizes, list) else tuple(sizes))
    if not isinstance(sizes, (tuple, list)):
        sizes = (sizes,)
    return self.make(torch.reshape, (self.value(call.source), tuple(sizes)), call.node)


def lower_unflatten(self: Canonicaliser, call: Call) -> Any:
    bound = call.bind("dim sizes")
    if not isinstance(call.source, fx.Node) or "dim" not in bound:
        return NotImplemented
    dim = bound["dim"] % call.rank
    inner = self.value(tuple(bound.get("sizes", bound.get("unflattened_size", ()))))
    before = [self.size(call.source, axis) for axis in range(call.rank)]
    return self.make(torch.reshape, (self.value(call.source), (*before[:dim], *inner, *before[dim + 1 :])), call.node)


def lower_flatten(self: Canonicaliser, call: Call) -> Any:
    bound = call.bind("start_dim end_dim")
    if not call.rank:
        return NotImplemented
    start, end = bound.get("start_dim", 0) % call.rank, bound.get("end_dim", -1) % call.rank
    return self.call(torch.flatten, (call.source, start, end), {}, call.node)


def lower_expand(self: Canonicaliser, call: Call) -> Any:
    """`expand`; the sizes get their form in `sizes.settle`."""
    after = shape_of(call.node)
    if after is None or not isinstance(call.source, fx.Node):
        return NotImplemented
    if call.name == "expand_as":
        other = call.args[1] if len(call.args) > 1 else call.kwargs["other"]
        sizes: Any = tuple(self.size(other, axis) for axis in range(len(after)))
    else:
        sizes = call.kwargs.get("size", call.args[1] if len(call.args) == 2 else call.args[1:])
        sizes = self.value(tuple(sizes) if isinstance(sizes, list) else sizes)
    if not isinstance(sizes, tuple):
        sizes = (sizes,)
    return self.make(torch.Tensor.expand, (self.value(call.source), sizes), call.node)


def lower_repeat(self: Canonicaliser, call: Call) -> Any:
    sizes = call.kwargs.get("repeats", call.kwargs.get("dims", call.args[1] if len(call.args) == 2 else call.args[1:]))
    sizes = self.value(tuple(sizes) if isinstance(sizes, list) else sizes)
    if not isinstance(sizes, tuple):
        sizes = (sizes,)
    sizes = (1,) * (call.rank - len(sizes)) + sizes
    return self.make(torch.Tensor.repeat, (self.value(call.source), sizes), call.node)


def swapped(rank: int, a: int, b: int) -> tuple[int, ...]:
    """The permutation that exchanges two axes."""
    order = list(range(rank))
    order[a % rank], order[b % rank] = order[b % rank], order[a % rank]
    return tuple(order)


def lower_permute(self: Canonicaliser, call: Call) -> Any:
    """Every order of axes as `permute`."""
    rank = call.rank
    if not rank:
        return NotImplemented
    if call.name == "permute":
        dims = call.kwargs.get("dims", call.args[1] if len(call.args) == 2 else call.args[1:])
        order = tuple(item % rank for item in dims)
    elif call.name == "transpose":
        bound = call.bind("dim0 dim1")
        first, second = (
            bound[key] if key in bound else bound[old] for key, old in (("dim0", "axis0"), ("dim1", "axis1"))
        )
        order = swapped(rank, first, second)
    elif call.name in ("t", "numpy_T"):
        order = tuple(reversed(range(rank)))
    elif call.name in ("mT", "adjoint"):
        order = swapped(rank, -2, -1)
    else:
        bound = call.bind("source destination")
        sources, targets = (
            (item,) if isinstance(item, int) else item for item in (bound["source"], bound["destination"])
        )
        order_list = [axis for axis in range(rank) if axis not in {item % rank for item in sources}]
        for target, source in sorted(zip((item % rank for item in targets), sources, strict=True)):
            order_list.insert(target, source % rank)
        order = tuple(order_list)
    if order == tuple(range(rank)):
        return self.value(call.source)
    return self.call(torch.permute, (call.source, order), {}, call.node)


def lower_squeeze(self: Canonicaliser, call: Call) -> Any:
    """`squeeze`, the axes as a tuple; without axes it stays so: a batch of one may be among them."""
    dims = call.bind("dim").get("dim")
    if dims is None or not call.rank:
        return self.call(torch.squeeze, (call.source,), {}, call.node)
    axes = tuple(sorted(item % call.rank for item in (dims if isinstance(dims, (tuple, list)) else (dims,))))
    return self.call(torch.squeeze, (call.source, axes), {}, call.node)


def lower_cat(self: Canonicaliser, call: Call) -> Any:
    tensors = self.value(call.source)
    if isinstance(tensors, fx.Node) or not isinstance(tensors, (tuple, list)):
        parts = call.source.meta.get("tensor_meta") if isinstance(call.source, fx.Node) else None
        if type(parts) is not tuple:
            return NotImplemented
        tensors = [self.make_part(operator.getitem, (tensors, index), call.node) for index in range(len(parts))]
    rank = len(shape_of(call.node) or ())
    dim = call.bind("dim").get("dim", call.kwargs.get("axis", 0))
    if call.name in ("hstack", "vstack", "dstack", "column_stack", "row_stack"):
        dim = {"hstack": 1 if rank > 1 else 0, "vstack": 0, "row_stack": 0, "dstack": 2, "column_stack": 1}[call.name]
        lifted = [item.meta.get("tensor_meta") for item in tensors if isinstance(item, fx.Node)]
        if any(meta is None or len(meta.shape) != rank for meta in lifted):
            return NotImplemented
    if "out" in call.kwargs or not rank:
        return NotImplemented
    return self.make(torch.cat, (list(tensors), dim % rank), call.node)


def lower_split(self: Canonicaliser, call: Call) -> Any:
    bound = call.bind("split_size dim")
    size = bound.get("split_size", bound.get("split_sizes", bound.get("split_size_or_sections")))
    if size is None or not call.rank:
        return NotImplemented
    size = self.value(tuple(size) if isinstance(size, list) else size)
    return self.make(torch.split, (self.value(call.source), size, bound.get("dim", 0) % call.rank), call.node)


def register() -> None:
    """Enter these rules."""
    rule("reshape", "view_as", "reshape_as")(lower_reshape)
    rule("unflatten")(lower_unflatten)
    rule("flatten", "ravel")(lower_flatten)
    rule("expand", "expand_as")(lower_expand)
    rule("repeat", "tile")(lower_repeat)
    rule("permute", "transpose", "movedim", "t", "mT", "numpy_T", "adjoint")(lower_permute)
    rule("squeeze")(lower_squeeze)
    rule("cat", "hstack", "vstack", "dstack", "column_stack", "row_stack")(lower_cat)
    rule("split")(lower_split)
