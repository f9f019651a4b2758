"""Rules for arithmetic, comparisons, norms and products: one target for each operation, and arguments in one form."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxcompile import schemas, spellings
from fxcompile.image_rules import lower_value_dependent
from fxcompile.lowering import Canonicaliser, rule
from fxcompile.program import dtype_of
from fxcompile.raw_nodes import Call


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
