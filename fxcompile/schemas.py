"""Reads a call by `aten`'s own schemas: which argument is which, and which are at their defaults.

A function of `torch`, a `Tensor` method and an `aten` operator of one name take the same arguments, but models give
them by position, by keyword, under numpy's names, as one number or as a tuple, or spread out (`x.permute(0, 2, 1)`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from fxcompile.program import shape_of

NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim", "input": "self", "x": "self", "a": "self", "value": "other"}
"""Names of keywords that PyTorch takes besides the schema's own."""

PLACEMENT = {"layout", "device", "pin_memory", "memory_format", "non_blocking", "requires_grad", "copy"}
"""Arguments that say where a tensor lies, not what it holds."""

FREE = PLACEMENT | {"dtype"}
"""Arguments whose type a schema gives as a number."""

AXES = {"dim", "dims", "dim0", "dim1", "axis", "source", "destination"}
"""Arguments that count axes, so that -1 is the last."""

GROWING = {"unsqueeze", "stack"}
"""Operations whose axis counts those of the output."""


@cache
def overloads(name: str) -> tuple[Any, ...]:
    """The schemas that `aten` has for a name, the plain ones first."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return ()
    found = [getattr(packet, overload)._schema for overload in packet.overloads()]
    return tuple(
        schema
        for schema in sorted(found, key=_complexity)
        if not schema.is_mutable and not any("Dimname" in str(argument.type) for argument in schema.arguments)
    )


def _complexity(schema: Any) -> tuple[bool, int]:
    """Tensor operands before numbers: `mul.Tensor` takes numbers too."""
    return "Scalar" in schema.overload_name, len(schema.arguments)


def read(
    name: str, schema: Any | None, args: Sequence[Any], kwargs: dict[str, Any], rank: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A call's arguments in one form: by position up to the last one that is not a default, axes non-negative.

    Args:
        name: the operation's bare name.
        schema: the operator's own, where the node calls an `aten` overload.
        args: raw arguments, nodes among them.
        kwargs: the keyword arguments.
        rank: axes of the tensor that the operation works on.

    Returns:
        Positional arguments, and keyword arguments that can be given in no other way; None where no schema fits.
    """
    for candidate in (schema,) if schema is not None else overloads(name):
        bound = bind(candidate, args, kwargs)
        if bound is not None:
            return _normal_form(candidate, bound, rank + (name in GROWING))
    return None


def bind(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments by the schema's names, or None where it does not take them."""
    arguments = {argument.name: argument for argument in schema.arguments}
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    given = list(args)
    if len(given) > 2 and len(positional) > 1 and _is_list(arguments[positional[1]].type) and _all_ints(given[1:]):
        given = [given[0], tuple(given[1:])]  # x.permute(0, 2, 1)
    if len(given) > len(positional):
        return None
    bound = dict(zip(positional, given, strict=False))
    for key, value in kwargs.items():
        name = key if key in arguments else NUMPY_NAMES.get(key, key)
        if key in PLACEMENT and name not in arguments:
            continue
        if name in bound or name not in arguments:
            return None
        bound[name] = value
    for name, argument in arguments.items():
        if name in bound:
            if name not in FREE and not accepts(str(argument.type), bound[name]):
                return None
        elif not argument.has_default_value():
            return None
    return bound


def _normal_form(schema: Any, bound: dict[str, Any], rank: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    waiting: list[Any] = []
    for argument in schema.arguments:
        name = argument.name
        default = argument.default_value if argument.has_default_value() else ...
        value = _normal_value(name, str(argument.type), bound.get(name, default), rank)
        is_default = default is not ... and _same(value, _normal_value(name, str(argument.type), default, rank))
        if argument.kwarg_only:
            if not is_default and name not in PLACEMENT:
                keywords[name] = value
            continue
        waiting.append(value)
        if not is_default:
            positional += waiting
            waiting = []
    return tuple(positional), keywords


def _normal_value(name: str, kind: str, value: Any, rank: int) -> Any:
    listed = "List[int]" in kind or "List[SymInt]" in kind
    if listed and isinstance(value, (int, fx.Node)) and not isinstance(value, bool):
        value = (value,)
    if isinstance(value, list) and not any(isinstance(item, fx.Node) and shape_of(item) is not None for item in value):
        value = tuple(value)
    if name in AXES and rank and isinstance(value, int) and not isinstance(value, bool):
        return value % rank
    if name in AXES and rank and isinstance(value, tuple) and all(isinstance(item, int) for item in value):
        return tuple(item % rank for item in value)
    return value


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not isinstance(a, (fx.Node, Tensor)) and bool(a == b)


def _all_ints(values: Sequence[Any]) -> bool:
    return all(accepts("int", value) for value in values)


def _is_list(kind: Any) -> bool:
    return "List[int]" in str(kind) or "List[SymInt]" in str(kind)


def is_tensor(value: Any) -> bool:
    """Whether a raw argument is a tensor, or a node that gives one."""
    return isinstance(value, Tensor) or (isinstance(value, fx.Node) and shape_of(value) is not None)


def accepts(kind: str, value: Any) -> bool:
    """Whether an argument of a schema's type takes a raw value."""
    if kind.startswith("Optional["):
        return value is None or accepts(kind[len("Optional[") : -1], value)
    if kind.startswith("List["):
        inner = kind[len("List[") : -1]
        if isinstance(value, (tuple, list)):
            return all(accepts(inner, item) for item in value)
        if inner == "Tensor":
            return (
                isinstance(value, fx.Node) and isinstance(value.meta.get("tensor_meta"), tuple) and not is_tensor(value)
            )
        return inner in ("int", "SymInt") and accepts("int", value)
    return _TYPES.get(kind, _anything)(value)


def _is_number_node(value: Any) -> bool:
    return isinstance(value, fx.Node) and not is_tensor(value)


def _is_int(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or _is_number_node(value)


def _anything(value: Any) -> bool:
    return not is_tensor(value)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "Tensor": is_tensor,
    "int": _is_int,
    "SymInt": _is_int,
    "bool": lambda value: isinstance(value, bool) or _is_number_node(value),
    "float": lambda value: isinstance(value, (int, float)) or _is_number_node(value),
    "number": lambda value: isinstance(value, (int, float, complex)) or _is_number_node(value),
    "str": lambda value: isinstance(value, str),
}
