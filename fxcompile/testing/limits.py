"""The options of a pass at their limits: values just inside are honoured, just outside refused."""

from __future__ import annotations

import enum
import math
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from fxcompile.contracts import Exact
from fxcompile.errors import FxcompileError
from fxcompile.rewriting import Pass

FAR = 100
"""How far from its limit a number without another limit is taken."""


def inside(pass_: Pass) -> list[Pass]:
    """The pass with each option at each of its limits, one at a time, the others as they are."""
    made: list[Pass] = []
    for name, info in type(pass_).model_fields.items():
        if name in ("only", "skip") or (name == "max_error" and isinstance(pass_.promise, Exact)):
            continue  # they name layers; and an exact site has no error
        for value in values_inside(info):
            changed = with_option(pass_, name, value)
            if changed is not None and changed != pass_ and changed not in made:
                made.append(changed)
    return made


def with_option(pass_: Pass, name: str, value: object) -> Pass | None:
    """The pass with another value for one option, or None where it refuses that."""
    try:
        return type(pass_)(**{**pass_.options(), name: value})
    except FxcompileError:
        return None


def accepted_outside(pass_: Pass) -> str | None:
    """An option and a value outside of its limits that the pass takes, or None if it refuses them all."""
    for name, info in type(pass_).model_fields.items():
        for value in values_outside(info):
            if with_option(pass_, name, value) is not None:
                return f"{name}={value!r}"
    return None


def values_inside(info: FieldInfo) -> Iterator[object]:
    """Values that an option must take, the limits themselves among them."""
    for kind in kinds(info.annotation):
        if kind is type(None):
            yield None
        elif kind is bool:
            yield from (False, True)
        elif get_origin(kind) is Literal:
            yield from get_args(kind)
        elif isinstance(kind, type) and issubclass(kind, enum.Enum):
            yield from kind
        elif kind in (int, float):
            yield from numbers(kind, bounds(info.metadata))


def numbers(kind: type[int] | type[float], limits: dict[str, float]) -> Iterator[int | float]:
    """Numbers at and near their limits."""

    def after(value: float, to: float) -> float:
        return value + math.copysign(1, to) if kind is int else math.nextafter(value, to)

    low = limits["ge"] if "ge" in limits else after(limits["gt"], math.inf) if "gt" in limits else None
    high = limits["le"] if "le" in limits else after(limits["lt"], -math.inf) if "lt" in limits else None
    found = [low, high]
    found.append(low + FAR if low is not None and high is None else None)
    found.append(high - FAR if high is not None and low is None else None)
    if low is not None and high is not None:
        found.append((low + high) / 2)
    if low is None and high is None:
        found += [0, 1]
    for value in found:
        if value is not None:
            whole = math.floor if value == high else math.ceil
            yield whole(value) if kind is int else float(value)


def values_outside(info: FieldInfo) -> Iterator[object]:
    """Values just outside of the limits that an option declares."""
    found = kinds(info.annotation)
    limits = bounds(info.metadata)
    for key, value in limits.items():
        outwards = math.inf if key in ("le", "lt") else -math.inf
        if float in found:
            yield float(value) if key in ("gt", "lt") else math.nextafter(value, outwards)
        if int in found and value == int(value):
            yield int(value) if key in ("gt", "lt") else int(value) + (1 if outwards > 0 else -1)
    if any(get_origin(kind) is Literal for kind in found):
        yield "no such choice"


def kinds(annotation: Any) -> Sequence[Any]:
    """The kinds of value that an annotation allows."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for item in get_args(annotation) for kind in kinds(item)]
    return [annotation]


def bounds(metadata: Sequence[Any]) -> dict[str, float]:
    """The limits in a field's metadata, by their names."""
    return {
        key: getattr(item, key)
        for item in metadata
        for key in ("gt", "ge", "lt", "le")
        if getattr(item, key, None) is not None
    }
