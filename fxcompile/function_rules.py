"""Rules for operations without weights that stay functions: one target each, and arguments in one form."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompile import schemas, spellings
from fxcompile.functional import VALUE
from fxcompile.lowering import MODULE_RULES, Call, Canonicaliser, NoSpelling, rule
from fxcompile.program import dtype_of, shape_of

LARGE = 2**62
"""From here on, `aten` means the end of an axis."""


# arithmetic


def lower_arithmetic(self: Canonicaliser, call: Call) -> Any:
    function = spellings.ARITHMETIC[call.name]
    kwargs = dict(call.kwargs)
    args = (*call.args, kwargs.pop("other")) if "other" in kwargs else call.args
    alpha = kwargs.pop("alpha", 1)
    if kwargs.get("rounding_mode") == "floor" and function is operator.truediv:
        function = operator.floordiv
        kwargs.pop("rounding_mode")
    elif kwargs.get("rounding_mode", 0) is None:
        kwargs.pop("rounding_mode")
    if kwargs or len(args) > 2:
        return NotImplemented
    if function is operator.truediv and isinstance(args[0], (int, float)) and schemas.is_tensor(args[1]):
        inverse = self.make(torch.reciprocal, (self.value(args[1]),), call.node)
        return inverse if args[0] == 1 else self.make(operator.mul, (inverse, args[0]), call.node)
    if function in spellings.COMMUTATIVE and not schemas.is_tensor(args[0]) and schemas.is_tensor(args[1]):
        args = (args[1], args[0])
    values = self.value(args)
    if function is operator.mul and args[1] == 1 and getattr(values[0], "target", None) is torch.reciprocal:
        return values[0]  # how 1 / x is exported
    if alpha != 1:
        scaled = values[1] * alpha if isinstance(values[1], (int, float)) else None
        if scaled is None:
            scaled = self.make_part(operator.mul, (values[1], alpha), call.node)
        values = (values[0], scaled)
    if not any(isinstance(item, fx.Node) for item in values):
        return function(*values)  # arithmetic on sizes that are numbers
    return self.make(function, values, call.node)


def lower_rsub(self: Canonicaliser, call: Call) -> Any:
    if len(call.args) != 2 or call.kwargs:
        return NotImplemented
    return self.call(operator.sub, (call.args[1], call.args[0]), {}, call.node)


def lower_pow(self: Canonicaliser, call: Call) -> Any:
    if call.kwargs.keys() - {"exponent"} or not any(schemas.is_tensor(item) for item in call.args):
        return NotImplemented
    return self.call(torch.pow, (*call.args, *call.kwargs.values()), {}, call.node)


def lower_square(self: Canonicaliser, call: Call) -> Any:
    return self.call(torch.pow, (call.source, 2), {}, call.node)


def lower_clamp(self: Canonicaliser, call: Call) -> Any:
    names = {"clamp": "min max", "clamp_min": "min", "clamp_max": "max"}[call.name]
    bound = call.bind(names)
    low, high = bound.get("min"), bound.get("max")
    return self.call(torch.clamp, (call.source, low) if high is None else (call.source, low, high), {}, call.node)


def lower_logical_not(self: Canonicaliser, call: Call) -> Any:
    boolean = isinstance(call.source, fx.Node) and dtype_of(call.source) == torch.bool
    return self.call(operator.invert, (call.source,), {}, call.node) if boolean else NotImplemented


def lower_where(self: Canonicaliser, call: Call) -> Any:
    if len(call.args) + len(call.kwargs) == 1:
        return lower_value_dependent(self, call)
    if len(call.args) + len(call.kwargs) != 3 or "out" in call.kwargs:
        return NotImplemented
    args = list(call.args)
    if call.node.op == "call_method":  # x.where(condition, other)
        bound = call.bind("condition other")
        args = [bound["condition"], call.source, bound["other"]]
    else:
        args += [call.kwargs[key] for key in ("condition", "input", "self", "other") if key in call.kwargs]
    return self.call(torch.where, args, {}, call.node)


def lower_masked_fill(self: Canonicaliser, call: Call) -> Any:
    bound = call.bind("mask value")
    return self.call(torch.masked_fill, (call.source, bound["mask"], bound["value"]), {}, call.node)


def lower_einsum(self: Canonicaliser, call: Call) -> Any:
    operands = call.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(call.source, str) or call.kwargs.keys() - {"path"}:
        return NotImplemented
    return self.call(torch.einsum, (call.source.replace(" ", ""), *operands), {}, call.node)


def lower_norm(self: Canonicaliser, call: Call) -> Any:
    """`torch.norm` and `Tensor.norm` are the norm of vectors, along axes or of all numbers together."""
    bound = call.bind("ord dim keepdim" if call.name == "linalg_vector_norm" else "p dim keepdim dtype")
    order = bound.get("p", bound.get("ord", 2))
    dim = bound.get("dim")
    if order == "fro":
        order = 2
    if isinstance(order, str) or not call.rank or bound.keys() - {"p", "ord", "dim", "keepdim"}:
        return NotImplemented
    axes = (
        None if dim is None else tuple(item % call.rank for item in (dim if isinstance(dim, (tuple, list)) else (dim,)))
    )
    tail = (axes, bound["keepdim"]) if bound.get("keepdim") else (axes,) if axes is not None else ()
    return self.call(torch.linalg.vector_norm, (call.source, order, *tail), {}, call.node)


# sizes and types


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


# shapes


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


# indexing


def lower_getitem(self: Canonicaliser, call: Call) -> Any:
    source, index = self.value(call.args[0]), self.value(call.args[1])
    if isinstance(source, (tuple, list)):  # sizes, or an operation that became a layer
        return source[index]
    tensor = schemas.is_tensor(call.args[0])
    if not isinstance(source, fx.Node) or not tensor:
        if isinstance(index, int) and index < 0 and isinstance(call.args[0], fx.Node):
            parts = call.args[0].meta.get("tensor_meta")
            index += len(parts) if type(parts) is tuple else 0
        return self.make(operator.getitem, (source, index), call.node)
    raw = call.args[1]
    items = list(raw) if isinstance(raw, tuple) else [raw]
    if any(isinstance(item, (list, bool)) for item in items):
        return self.make(operator.getitem, (source, index), call.node)
    return take(self, call.node, source, call.rank, items)


def take(self: Canonicaliser, node: fx.Node, source: fx.Node, rank: int, items: list[Any]) -> fx.Node:
    """Indexing with several axes at once as one step for each axis, then those indices that are tensors."""
    used = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis in [item for item in items if item is Ellipsis]:
        at = next(position for position, item in enumerate(items) if item is Ellipsis)
        items = items[:at] + [slice(None)] * (rank - used) + items[at + 1 :]
    axis = 0
    tensors: dict[int, Any] = {}
    steps: list[tuple[Any, Any]] = []
    for item in items:
        if item is None:
            steps.append((torch.unsqueeze, axis))
            axis += 1
        elif isinstance(item, slice):
            part = whole_or(self, item)
            if part is not None:
                steps.append((operator.getitem, (*(slice(None),) * axis, part)))
            axis += 1
        elif schemas.is_tensor(item):
            if dtype_of(item) == torch.bool:
                raise NoSpelling(node, "the shape of what a boolean mask picks out as its result depends on values")
            tensors[axis] = self.value(item)
            axis += 1
        else:
            steps.append((operator.getitem, (*(slice(None),) * axis, self.value(item))))
    if tensors:
        steps.append(
            (operator.getitem, tuple(tensors.get(position, slice(None)) for position in range(max(tensors) + 1)))
        )
    for number, (target, argument) in enumerate(steps):
        last = number == len(steps) - 1
        source = (self.make if last else self.make_part)(target, (source, argument), node)
    return source


def whole_or(self: Canonicaliser, part: slice) -> slice | None:
    """A slice in the new graph, or None if it is the whole axis."""
    start, stop, step = (self.value(item) for item in (part.start, part.stop, part.step))
    start = None if isinstance(start, int) and start == 0 else start
    stop = None if isinstance(stop, int) and stop >= LARGE else stop
    step = None if isinstance(step, int) and step == 1 else step
    return None if (start, stop, step) == (None, None, None) else slice(start, stop, step)


def lower_slice(self: Canonicaliser, call: Call) -> Any:
    """`aten.slice`, `select` and `narrow` as Python indexing."""
    bound = call.bind({"slice": "dim start end step", "select": "dim index"}.get(call.name, "dim start length"))
    if not call.rank:
        return NotImplemented
    axis = bound.get("dim", 0) % call.rank
    if call.name == "select":
        index: Any = bound["index"]
    elif call.name == "slice":
        index = slice(bound.get("start"), bound.get("end"), bound.get("step"))
    else:
        start, length = self.value(bound["start"]), self.value(bound["length"])
        if not isinstance(start, int) or start < 0:
            return NotImplemented
        if isinstance(length, fx.Node) and start:
            length = self.make_part(operator.add, (length, start), call.node)
        elif not isinstance(length, fx.Node):
            length = start + length
        index_value = slice(start or None, length, None)
        position = (*(slice(None),) * axis, index_value)
        return self.make(operator.getitem, (self.value(call.source), position), call.node)
    return take_or_same(self, call, [slice(None)] * axis + [index])


def take_or_same(self: Canonicaliser, call: Call, items: list[Any]) -> Any:
    return take(self, call.node, self.value(call.source), call.rank, items)


def lower_scatter_all(self: Canonicaliser, call: Call) -> Any:
    """`slice_scatter` over a whole axis gives what is scattered."""
    bound = call.bind("src dim start end step")
    step = bound.get("step", 1)
    whole = self.plain(bound.get("start", 0)) == 0 and self.plain(bound.get("end", LARGE)) >= LARGE and step == 1
    same = isinstance(bound["src"], fx.Node) and dtype_of(bound["src"]) == dtype_of(call.node)
    return self.value(bound["src"]) if whole and same else NotImplemented


def lower_index(self: Canonicaliser, call: Call) -> Any:
    """`aten.index(x, [None, indices])`."""
    if len(call.args) != 2 or not isinstance(call.args[1], (tuple, list)):
        return NotImplemented
    if any(isinstance(item, fx.Node) and dtype_of(item) == torch.bool for item in call.args[1]):
        raise NoSpelling(call.node, "the shape of what a boolean mask picks out as its result depends on values")
    index = tuple(slice(None) if item is None else self.value(item) for item in call.args[1])
    return self.make(operator.getitem, (self.value(call.source), index), call.node)


# interpolation, padding, and other functions of torch.nn.functional

_MODES = {"nearest": "nearest", "linear": "linear", "bilinear": "bilinear", "trilinear": "trilinear",
          "bicubic": "bicubic", "nearest_exact": "nearest-exact"}  # fmt: skip


def lower_interpolate(self: Canonicaliser, call: Call) -> Any:
    if call.name in ("interpolate", "upsample"):
        bound = call.bind("size scale_factor mode align_corners recompute_scale_factor antialias")
    elif call.name in ("upsample_nearest", "upsample_bilinear"):
        bound = call.bind("size scale_factor")
        bound["mode"] = call.name.removeprefix("upsample_")
        if call.name == "upsample_bilinear":
            bound["align_corners"] = True
    else:
        smooth = "linear" in call.name or "cubic" in call.name
        if str(call.node.target).endswith(".vec"):
            bound = call.bind("size align_corners scale_factor" if smooth else "size scale_factor")
        elif smooth:
            bound = call.bind("size align_corners")
        else:
            bound = call.bind("size")
        if any(key not in ("size", "align_corners", "scale_factor", "scale_factors") for key in bound):
            return NotImplemented
        if "scale_factors" in bound:
            bound["scale_factor"] = bound.pop("scale_factors")
        mode = call.name.strip("_").removesuffix("_aa").removeprefix("upsample_").rstrip("123d").rstrip("_")
        bound["mode"] = _MODES[mode]
        bound["antialias"] = call.name.endswith("_aa")
    return interpolate(self, call.node, call.source, bound)


def interpolate(self: Canonicaliser, node: fx.Node, source: Any, bound: dict[str, Any]) -> Any:
    """`F.interpolate(x, mode=..., size=... or scale_factor=...)`, sizes and factors one for each axis."""
    dims = len(shape_of(source) or ()) - 2
    options: dict[str, Any] = {"mode": bound.get("mode", "nearest")}
    for key in ("size", "scale_factor"):
        value = self.value(bound.get(key))
        if value is not None:
            value = tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims
            options[key] = tuple(
                float(item) if key == "scale_factor" and isinstance(item, int) else item for item in value
            )
    if options["mode"] == "area" and "size" in options and all(isinstance(item, int) for item in options["size"]):
        kind = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1]
        sizes = options["size"]
        return self.call_layer(None, kind(sizes[0] if len(set(sizes)) == 1 else sizes), (source,), node)
    if options["mode"] in ("linear", "bilinear", "trilinear", "bicubic") and bound.get("align_corners"):
        options["align_corners"] = True
    for key in ("recompute_scale_factor", "antialias"):
        if bound.get(key):
            options[key] = True
    return self.call(F.interpolate, (source,), dict(sorted(options.items())), node)


def lower_pad(self: Canonicaliser, call: Call) -> Any:
    mode, value = "constant", None
    if call.name.startswith(("reflection_pad", "replication_pad")):
        mode = "reflect" if call.name.startswith("reflection") else "replicate"
        amounts = call.bind("padding")["padding"]
    else:
        bound = call.bind("pad value" if call.name == "constant_pad_nd" else "pad mode value")
        amounts, mode, value = bound["pad"], bound.get("mode", "constant"), bound.get("value")
    return make_pad(self, call.node, call.source, amounts, mode, value)


def make_pad(self: Canonicaliser, node: fx.Node, source: Any, amounts: Any, mode: str, value: Any) -> fx.Node:
    """`F.pad(x, amounts, mode, value)`, constant padding with its value."""
    tail = (float(value) if isinstance(value, int) else value,) if value is not None else (0.0,)
    return self.call(F.pad, (source, list(amounts), mode, *(tail if mode == "constant" else ())), {}, node)


def lower_grid_sample(self: Canonicaliser, call: Call) -> Any:
    bound = call.bind("grid mode padding_mode align_corners")
    mode, padding = bound.get("mode", "bilinear"), bound.get("padding_mode", "zeros")
    if isinstance(mode, int):
        mode = ("bilinear", "nearest", "bicubic")[mode]
    if isinstance(padding, int):
        padding = ("zeros", "border", "reflection")[padding]
    return self.call(
        F.grid_sample, (call.source, bound["grid"], mode, padding, bool(bound.get("align_corners"))), {}, call.node
    )


def lower_affine_grid(self: Canonicaliser, call: Call) -> Any:
    bound = call.bind("size align_corners")
    sizes = self.value(bound["size"])
    sizes = tuple(sizes) if isinstance(sizes, (tuple, list)) else sizes
    args = (self.value(call.source), sizes, bool(bound.get("align_corners")))
    return self.make(F.affine_grid, args, call.node)


def lower_unfold(self: Canonicaliser, call: Call) -> Any:
    """`F.unfold`, `F.fold`, and `aten`'s names for them; `Tensor.unfold` is another thing."""
    if call.name == "unfold" and not call.is_functional:
        bound = call.bind("dimension size step")
        args = (call.source, bound["dimension"] % call.rank, bound["size"], bound["step"])
        return self.call(torch.Tensor.unfold, args, {}, call.node)
    folds = call.name in ("fold", "col2im")
    order = "kernel_size dilation padding stride"
    if call.name in ("im2col", "col2im"):
        order = "kernel_size dilation padding stride" if call.name == "im2col" else order
    bound = call.bind(f"output_size {order}" if folds else order)
    pairs = [_pair(bound.get(key, default)) for key, default in (("dilation", 1), ("padding", 0), ("stride", 1))]
    head = (_pair(self.value(bound["output_size"])),) if folds else ()
    args = (self.value(call.source), *head, _pair(bound["kernel_size"]), *pairs)
    return self.make(F.fold if folds else F.unfold, args, call.node)


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def lower_attention(self: Canonicaliser, call: Call) -> Any:
    names = "key value attn_mask dropout_p is_causal scale enable_gqa"
    bound = call.bind(names)
    defaults = {"dropout_p": 0.0, "is_causal": False, "enable_gqa": False}
    options = {key: value for key, value in bound.items() if defaults.get(key) != value}
    key, value = options.pop("key"), options.pop("value")
    return self.call(
        F.scaled_dot_product_attention, (call.source, key, value), dict(sorted(options.items())), call.node
    )


def lower_local_response_norm(self: Canonicaliser, call: Call) -> Any:
    """`F.local_response_norm` as `torch` computes it: an average pool over the channels of the squares."""
    bound = call.bind("size alpha beta k")
    if call.rank < 3 or not isinstance(call.source, fx.Node):
        return NotImplemented
    size, x = bound["size"], self.value(call.source)
    around = [size // 2, (size - 1) // 2]
    part = self.make_part(operator.mul, (x, x), call.node)
    if call.rank == 3:
        part = self.make_part(torch.unsqueeze, (part, 1), call.node)
        pool: nn.Module = nn.AvgPool2d((size, 1), stride=1)
    else:
        sizes = tuple(self.size(call.source, axis) for axis in range(call.rank))
        part = self.make_part(torch.reshape, (part, (sizes[0], 1, *sizes[1:3], -1)), call.node)
        pool = nn.AvgPool3d((size, 1, 1), stride=1)
    part = self.make_part(F.pad, (part, [0, 0] * (1 if call.rank == 3 else 2) + around, "constant", 0.0), call.node)
    part = self.place_layer(None, pool, (part,), call.node, f"avg_pool{2 if call.rank == 3 else 3}d")
    part.meta.pop("tensor_meta", None)
    part = self.make_part(torch.squeeze, (part, (1,)), call.node)
    if call.rank > 3:
        part = self.make_part(torch.reshape, (part, sizes), call.node)
    part = self.make_part(operator.mul, (part, bound.get("alpha", 1e-4)), call.node)
    part = self.make_part(operator.add, (part, bound.get("k", 1.0)), call.node)
    part = self.make_part(torch.pow, (part, bound.get("beta", 0.75)), call.node)
    return self.make(operator.truediv, (x, part), call.node)


def module_local_response_norm(self: Canonicaliser, node: fx.Node, module: nn.LocalResponseNorm) -> Any:
    args = (node.args[0], module.size, module.alpha, module.beta, module.k)
    return lower_local_response_norm(self, Call(node, "local_response_norm", args, {}))


def lower_stft(self: Canonicaliser, call: Call) -> Any:
    """`torch.stft` by keywords: `aten` has it without `center`, the arguments after that in other places."""
    centred = call.schema is None or any(argument.name == "center" for argument in call.schema.arguments)
    head, tail = "n_fft hop_length win_length window", "normalized onesided return_complex align_to_window"
    bound = call.bind(f"{head} center pad_mode {tail}" if centred else f"{head} {tail}")
    options = bound if centred else {**bound, "center": False}
    return self.call(torch.stft, (call.source,), dict(sorted(options.items())), call.node)


def lower_random(self: Canonicaliser, call: Call) -> Any:
    raise NoSpelling(call.node, "forward draws random numbers")


def lower_value_dependent(self: Canonicaliser, call: Call) -> Any:
    if call.name in spellings.TAKES_NUMBERS:
        raise NoSpelling(call.node, "forward takes a number out of a tensor")
    raise NoSpelling(call.node, f"the shape of what '{call.name}' gives as its result depends on values")


def lower_one_hot(self: Canonicaliser, call: Call) -> Any:
    return self.call(F.one_hot, (call.source, call.bind("num_classes").get("num_classes", -1)), {}, call.node)


# everything else


def lower_identity(self: Canonicaliser, call: Call) -> Any:
    return self.value(call.source)


def lower_nothing(self: Canonicaliser, call: Call) -> Any:
    return None


def lower_by_schema(self: Canonicaliser, call: Call) -> Any:
    """A function that is `torch.NAME` with the arguments of `aten.NAME`."""
    space, _, rest = call.name.partition("_")
    function = getattr(torch, call.name, None) or getattr(Tensor, call.name, None)
    if function is None and space in ("fft", "linalg", "special"):
        function = getattr(getattr(torch, space), rest, None)
    if function is None or not callable(function) or (call.is_functional and not hasattr(torch, call.name)):
        return NotImplemented
    read = schemas.read(call.name, call.schema, call.args, call.kwargs, call.rank)
    if read is None:
        return NotImplemented
    return self.call(function, *read, call.node)


def lower_python_number(self: Canonicaliser, call: Call) -> Any:
    """`int`, `max`, `math.ceil` and the like, on sizes."""
    if not callable(call.node.target) or isinstance(call.node.target, torch._ops.OpOverload):
        return NotImplemented
    if any(schemas.is_tensor(item) for item in call.node.all_input_nodes):
        return NotImplemented
    args = self.value(call.node.args)
    if any(isinstance(item, fx.Node) for item in args):
        return NotImplemented
    return call.node.target(*args, **self.value(call.node.kwargs))


# modules whose functional form is the canonical one


def module_pad(mode: str) -> Callable[[Canonicaliser, fx.Node, Any], Any]:
    """The rule for one family of padding layers."""

    def lower(self: Canonicaliser, node: fx.Node, module: Any) -> Any:
        dims = len(shape_of(node.args[0]) or ()) - 2  # type: ignore[arg-type]
        amounts = module.padding if isinstance(module.padding, tuple) else (module.padding,) * (2 * dims)
        return make_pad(self, node, node.args[0], amounts, mode, getattr(module, "value", None))

    return lower


def module_flatten(self: Canonicaliser, node: fx.Node, module: nn.Flatten) -> Any:
    return lower_flatten(self, Call(node, "flatten", (node.args[0], module.start_dim, module.end_dim), {}))


def module_unflatten(self: Canonicaliser, node: fx.Node, module: nn.Unflatten) -> Any:
    return lower_unflatten(self, Call(node, "unflatten", (node.args[0], module.dim, module.unflattened_size), {}))


def module_upsample(self: Canonicaliser, node: fx.Node, module: nn.Upsample) -> Any:
    names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
    return interpolate(self, node, node.args[0], {key: getattr(module, key) for key in names})


def module_softmax2d(self: Canonicaliser, node: fx.Node, module: nn.Module) -> Any:
    rank = len(shape_of(node.args[0]) or ())  # type: ignore[arg-type]
    return self.call_layer(str(node.target), nn.Softmax(rank - 3), node.args, node)


def module_unfold(self: Canonicaliser, node: fx.Node, module: Any) -> Any:
    head = (module.output_size,) if isinstance(module, nn.Fold) else ()
    args = (node.args[0], *head, module.kernel_size, module.dilation, module.padding, module.stride)
    return lower_unfold(self, Call(node, "col2im" if head else "im2col", args, {}))


def register() -> None:
    """Enter these rules."""
    rule(*spellings.ARITHMETIC)(lower_arithmetic)
    rule("rsub")(lower_rsub)
    rule("pow")(lower_pow)
    rule("square")(lower_square)
    rule("clamp", "clamp_min", "clamp_max")(lower_clamp)
    rule("logical_not")(lower_logical_not)
    rule("where")(lower_where)
    rule("masked_fill")(lower_masked_fill)
    rule("einsum")(lower_einsum)
    rule("norm", "linalg_vector_norm")(lower_norm)
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
    rule("reshape", "view_as", "reshape_as")(lower_reshape)
    rule("unflatten")(lower_unflatten)
    rule("flatten", "ravel")(lower_flatten)
    rule("expand", "expand_as")(lower_expand)
    rule("repeat", "tile")(lower_repeat)
    rule("permute", "transpose", "movedim", "t", "mT", "numpy_T", "adjoint")(lower_permute)
    rule("squeeze")(lower_squeeze)
    rule("cat", "hstack", "vstack", "dstack", "column_stack", "row_stack")(lower_cat)
    rule("split")(lower_split)
    rule("getitem")(lower_getitem)
    rule("slice", "select", "narrow")(lower_slice)
    rule("slice_scatter")(lower_scatter_all)
    rule("index")(lower_index)
    rule("interpolate", "upsample", "upsample_nearest", "upsample_bilinear", *upsample_names())(lower_interpolate)
    rule("pad", "constant_pad_nd", *(f"{kind}_pad{d}d" for kind in ("reflection", "replication") for d in (1, 2, 3)))(
        lower_pad
    )
    rule("grid_sample")(lower_grid_sample)
    rule("affine_grid")(lower_affine_grid)
    rule("unfold", "fold", "im2col", "col2im")(lower_unfold)
    rule("scaled_dot_product_attention")(lower_attention)
    rule("one_hot")(lower_one_hot)
    rule("local_response_norm")(lower_local_response_norm)
    rule("stft")(lower_stft)
    rule(*spellings.RANDOM)(lower_random)
    rule(*spellings.TAKES_NUMBERS, *spellings.UNKNOWN_SHAPE)(lower_value_dependent)
    rule(*spellings.IDENTITIES)(lower_identity)
    rule(*spellings.DROPPED)(lower_nothing)
    rule("*")(lower_python_number)
    rule("*")(lower_by_schema)
    MODULE_RULES.update(
        {
            nn.Flatten: module_flatten,
            nn.Unflatten: module_unflatten,
            nn.Upsample: module_upsample,
            nn.UpsamplingNearest2d: module_upsample,
            nn.UpsamplingBilinear2d: module_upsample,
            nn.LocalResponseNorm: module_local_response_norm,
            nn.Softmax2d: module_softmax2d,
            nn.Unfold: module_unfold,
            nn.Fold: module_unfold,
            **{getattr(nn, f"ReflectionPad{d}d"): module_pad("reflect") for d in (1, 2, 3)},
            **{getattr(nn, f"ReplicationPad{d}d"): module_pad("replicate") for d in (1, 2, 3)},
            **{getattr(nn, f"ZeroPad{d}d"): module_pad("constant") for d in (1, 2, 3)},
            **{getattr(nn, f"ConstantPad{d}d"): module_pad("constant") for d in (1, 2, 3)},
            **{getattr(nn, f"CircularPad{d}d"): module_pad("circular") for d in (1, 2, 3)},
        }
    )


def upsample_names() -> list[str]:
    """`aten`'s names for interpolation."""
    kinds = [f"upsample_{mode}{d}d" for mode in ("nearest", "linear", "bilinear", "trilinear") for d in (1, 2, 3)]
    kinds += [f"_upsample_nearest_exact{d}d" for d in (1, 2, 3)]
    return [*kinds, "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]
