"""Rules for sizes, dtypes and new tensors: numbers where the examples fix them, one spelling where they stay open."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxcompile import schemas, spellings
from fxcompile.functional import VALUE
from fxcompile.index_rules import lower_getitem
from fxcompile.lowering import Canonicaliser, rule
from fxcompile.program import dtype_of, shape_of
from fxcompile.raw_nodes import Call
from fxcompile.shape_rules import swapped


def lower_size(self: Canonicaliser, call: Call) -> Any:
    """A size, or all of them as a tuple."""
    if not isinstance(call.source, fx.Node) or shape_of(call.source) is None:
        return NotImplemented
    dim = call.bind("dim").get("dim")
    if dim is not None:
        return self.size(call.source, self.plain(dim) % call.rank)
    return tuple(self.size(call.source, axis) for axis in range(call.rank))


def lower_getattr(self: Canonicaliser, call: Call) -> Any:
    source, name = call.args[0], call.args[1]
    if name == "shape":
        return lower_size(self, Call(call.node, "size", (source,), {}))
    if (name in ("T", "mT", "H", "mH") and call.rank == 2) or name == "mT":
        return self.call(torch.permute, (source, swapped(call.rank, -2, -1)), {}, call.node)
    if name == "T":
        return self.call(torch.permute, (source, tuple(reversed(range(call.rank)))), {}, call.node)
    if name == "data":
        return self.value(source)
    if name in ("values", "indices"):  # of torch.max and its kin
        return lower_getitem(self, Call(call.node, "getitem", (source, 0 if name == "values" else 1), {}))
    return lower_value(self, call)


def lower_value(self: Canonicaliser, call: Call) -> Any:
    """What depends neither on the data nor on the batch: ranks, dtypes, devices."""
    return call.node.meta.get(VALUE, NotImplemented)


def lower_numel(self: Canonicaliser, call: Call) -> Any:
    if not isinstance(call.source, fx.Node):
        return NotImplemented
    total: Any = 1
    for axis in range(call.rank):
        size = self.size(call.source, axis)
        total = size if axis == 0 else self.make_part(operator.mul, (total, size), call.node)
    return total


def lower_to(self: Canonicaliser, call: Call) -> Any:
    """All casts and moves: the dtype alone counts."""
    before, after = dtype_of(call.source) if isinstance(call.source, fx.Node) else None, dtype_of(call.node)
    if before is None or after is None:
        return NotImplemented
    if before == after:
        return self.value(call.source)
    return self.call(torch.Tensor.to, (call.source, after), {}, call.node)


def lower_creation(self: Canonicaliser, call: Call) -> Any:
    """`zeros`, `full`, `arange` and their kin: sizes as a tuple, the dtype only where it is not the default."""
    dtype = dtype_of(call.node)
    args = list(call.args)
    kwargs = {
        key: value for key, value in call.kwargs.items() if key not in schemas.PLACEMENT | {"dtype", "names", "out"}
    }
    name = call.name
    if name.startswith("new_") and name != "new_tensor":
        name, args = name.removeprefix("new_"), args[1:]
        default: torch.dtype | None = dtype_of(call.source) if isinstance(call.source, fx.Node) else None
    if name in ("zeros", "ones", "empty", "full"):
        sizes = kwargs.pop("size", None)
        if sizes is None:
            sizes = args.pop(0) if args and isinstance(args[0], (tuple, list)) else None
        if sizes is None and args and isinstance(args[0], fx.Node) and isinstance(self.value(args[0]), tuple):
            sizes = args.pop(0)
        if sizes is None and name != "full":
            sizes, args = tuple(args), []
        if sizes is None:
            return NotImplemented
        sizes = self.value(sizes)
        args = [
            tuple(sizes),
            *self.value(tuple(args)),
            *([self.value(kwargs.pop("fill_value"))] if "fill_value" in kwargs else []),
        ]
    else:
        args = list(self.value(tuple(args)))
        if name == "arange":
            args = [kwargs.pop("start"), *args] if "start" in kwargs else args
            args += [kwargs.pop(key) for key in ("end", "step") if key in kwargs]
            if len(args) == 3 and args[2] == 1:
                args.pop()
            if len(args) == 2 and args[0] == 0:
                args.pop(0)
        if name == "linspace":
            args += [kwargs.pop(key) for key in ("start", "end", "steps") if key in kwargs]
    if kwargs:
        return NotImplemented
    default = default_dtype(name, args)
    keywords = {} if dtype is None or dtype == default else {"dtype": dtype}
    return self.make(getattr(torch, name), tuple(args), call.node, keywords)


def default_dtype(name: str, args: Sequence[Any]) -> torch.dtype:
    """The dtype that a tensor made from numbers takes by itself."""
    if name == "arange":
        whole = all(not isinstance(item, float) for item in args)
        return torch.int64 if whole else torch.get_default_dtype()
    if name == "full" and len(args) > 1:
        return torch.full((), args[1]).dtype if isinstance(args[1], (bool, int, float)) else torch.get_default_dtype()
    return torch.get_default_dtype()


def lower_like(self: Canonicaliser, call: Call) -> Any:
    name = call.name
    args = call.args if name != "full_like" else (call.source, call.bind("fill_value")["fill_value"])
    dtype, own = dtype_of(call.node), dtype_of(call.source) if isinstance(call.source, fx.Node) else None
    keywords = {} if dtype == own else {"dtype": dtype}
    return self.call(getattr(torch, name), args, keywords, call.node)


def lower_fill(self: Canonicaliser, call: Call) -> Any:
    """`fill_` and `zero_`, out of place: all numbers of a tensor are one."""
    value = 0 if call.name == "zero" else (call.args[1] if len(call.args) > 1 else call.kwargs["value"])
    dtype = dtype_of(call.node)
    if isinstance(value, fx.Node):
        return self.call(torch.fill, (call.source, value), {}, call.node)
    return self.call(torch.full_like, (call.source, value if dtype != torch.bool else bool(value)), {}, call.node)


def lower_copy(self: Canonicaliser, call: Call) -> Any:
    """`copy_`, out of place: the other tensor, in the shape and dtype of this one."""
    target, source = call.args[0], call.args[1]
    new, shape = self.value(source), shape_of(call.node)
    if not isinstance(new, fx.Node) or not isinstance(source, fx.Node) or shape is None:
        return NotImplemented
    if dtype_of(source) != dtype_of(target):
        new = self.make_part(torch.Tensor.to, (new, dtype_of(target)), call.node)
    if shape_of(source) != shape:
        new = self.make(torch.Tensor.expand_as, (new, self.value(target)), call.node)
    return new


def register() -> None:
    """Enter these rules."""
    rule("size")(lower_size)
    rule("getattr")(lower_getattr)
    rule("dim", "ndimension", "get_device", "is_floating_point", "element_size", "is_complex")(lower_value)
    rule("numel", "nelement")(lower_numel)
    rule("to", "type", "type_as", *spellings.DTYPE_METHODS)(lower_to)
    rule(
        "zeros", "ones", "empty", "full", "arange", "linspace", "eye", "new_zeros", "new_ones", "new_empty", "new_full"
    )(lower_creation)
    rule("zeros_like", "ones_like", "full_like", "empty_like")(lower_like)
    rule("fill", "zero")(lower_fill)
    rule("copy")(lower_copy)
