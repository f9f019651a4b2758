"""What an option of a pass takes, in words: for error messages and for `fxcompile passes NAME`."""

from __future__ import annotations

import enum
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fxcompile.errors import UsageError, did_you_mean

_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}
_LIMITS = {
    "gt": "above",
    "ge": "of at least",
    "lt": "below",
    "le": "of at most",
    "multiple_of": "that is a multiple of",
}


def refusal(kind: type[BaseModel], name: str, error: ValidationError) -> UsageError:
    """What pydantic found wrong first with the options of a pass, called `name`, as one sentence."""
    found = error.errors()[0]
    option = str(found["loc"][0]) if found["loc"] else ""
    if not option:
        return UsageError(f"pass '{name}': {own_words(found)}", mend=f"see fxcompile passes {name}")
    if option not in kind.model_fields:
        return no_option(kind, name, option)
    if found["type"] == "missing":
        return UsageError(f"pass '{name}' needs option '{option}'", mend=f"give {wanted(kind.model_fields[option])}")
    return misfit(kind, name, option, repr(found["input"]), found)


def no_option(kind: type[BaseModel], name: str, option: str) -> UsageError:
    """That a pass has no such option."""
    return UsageError(f"pass '{name}' has no option '{option}'", mend=did_you_mean(option, kind.model_fields))


def misfit(kind: type[BaseModel], name: str, option: str, shown: str, found: ErrorDetails | None = None) -> UsageError:
    """That an option cannot have a value, which is shown as text; with the pass's own words where it has any."""
    info = kind.model_fields[option]
    mend = f"give {wanted(info)}{f': {info.description}' if info.description else ''}"
    why = ""
    if found is not None and found["type"] in ("value_error", "assertion_error"):
        why = f" ({own_words(found)})"
    return UsageError(f"option '{option}' of pass '{name}' cannot be {shown}{why}", mend=mend)


def own_words(found: ErrorDetails) -> str:
    """A validator's words, without what pydantic puts in front of them."""
    return found["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")


def wanted(info: FieldInfo) -> str:
    """The values that an option takes: "a number above 0 and of at most 1, or none"."""
    return described(info.annotation, info.metadata)


def described(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The values of an annotation, with the limits in its metadata."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        own = [part for item in arguments[1:] for part in getattr(item, "metadata", [item])]
        return described(arguments[0], [*metadata, *own])
    if origin in (Union, types.UnionType):
        kinds = [item for item in arguments if item is not type(None)]
        if float in kinds and int in kinds:
            kinds.remove(int)
        parts = [described(kind, metadata) for kind in kinds]
        return ", or ".join([*parts, "none"] if type(None) in arguments else parts)
    if origin is Literal or (isinstance(annotation, type) and issubclass(annotation, enum.Enum)):
        values = arguments if origin is Literal else [item.value for item in annotation]
        return "one of " + ", ".join(map(str, values))
    if origin in (tuple, list) or annotation in (tuple, list):
        return listed(
            [item for item in arguments if item is not Ellipsis], fixed=origin is tuple and Ellipsis not in arguments
        )
    return _SCALARS.get(annotation, getattr(annotation, "__name__", str(annotation))) + limits(metadata)


def listed(kinds: Sequence[Any], fixed: bool) -> str:
    """A list of values of these kinds; of exactly so many where it is fixed."""
    if not kinds:
        return "a list like [a, b]"
    if fixed:
        return f"a list [{', '.join(map(described, kinds))}]"
    examples = "[1, 2]" if kinds[0] in (int, float) else "[a, b]"
    return (
        f"a list of {_PLURALS[kinds[0]]} like {examples}"
        if kinds[0] in _PLURALS
        else f"a list, each {described(kinds[0])}"
    )


def limits(metadata: Sequence[Any]) -> str:
    """The bounds of a number."""
    parts = [
        f"{word} {getattr(item, key):g}" for item in metadata for key, word in _LIMITS.items() if hasattr(item, key)
    ]
    return " " + " and ".join(parts) if parts else ""
