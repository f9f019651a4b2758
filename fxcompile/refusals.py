"""What a refusal says: the line of the user's model, what is wrong there, and what to change."""

from __future__ import annotations

import linecache
import logging
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy
import torch
from torch import fx, nn

from fxcompile.errors import TraceError
from fxcompile.functional import Unfollowable
from fxcompile.lowering import PLACE, NoSpelling


class Refused(Exception):
    """A road led to a program that is not the model."""


_LIBRARIES = tuple(f"{Path(path).parent}/" for path in (__file__, torch.__file__, numpy.__file__))
_STANDARD = sysconfig.get_paths()["stdlib"]


def is_own(filename: str) -> bool:
    """Whether a file is the user's: not of torch, numpy, Python itself or this package."""
    if not filename.endswith(".py") or filename.startswith(("<", *_LIBRARIES)):
        return False
    return not filename.startswith(_STANDARD) or "site-packages" in filename


def line_of(frame: FrameType | None) -> str | None:
    """`file:line` of the innermost own frame, going out from a frame."""
    while frame is not None:
        if is_own(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def current_line() -> str | None:
    """`file:line` of the innermost own frame that is running."""
    return line_of(sys._getframe(1))


def text_at(place: str | None) -> str:
    """The text of the line that a place names."""
    if place is None or ":" not in place:
        return ""
    filename, _, number = place.rpartition(":")
    return linecache.getline(filename, int(number)).strip() if number.isdigit() else ""


def user_line(error: BaseException) -> str | None:
    """`file:line` of the innermost own frame that an exception came through, or what caused it did."""
    current: BaseException | None = error
    while current is not None:
        for frame, number in reversed(list(traceback.walk_tb(current.__traceback__))):
            if is_own(frame.f_code.co_filename):
                return f"{frame.f_code.co_filename}:{number}"
        current = current.__cause__ or current.__context__
    return None


def node_line(node: fx.Node) -> str | None:
    """`file:line` of the model's code that made a node, as far as a tracer recorded it."""
    if PLACE in node.meta:
        return str(node.meta[PLACE])
    found = re.findall(r'File "(.+?)", line (\d+)', node.stack_trace or "")
    own = [f"{filename}:{number}" for filename, number in found if is_own(filename)]
    return own[-1] if own else None


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


_BRANCH = "forward branches on, or loops over, a value that it computes from its input"
_NUMBER = "forward takes a number out of a tensor"
_TORCH = "rewrite that line with torch operations on tensors"

_KNOWN: tuple[tuple[str, str, str], ...] = (
    ("cannot be used as inputs to control flow", _BRANCH, "use torch.where, or move the branch out of forward"),
    ("data-dependent", _BRANCH, "use torch.where, or move the branch out of forward"),
    ("DataDependent", _BRANCH, "use torch.where, or move the branch out of forward"),
    ("Boolean value of Tensor", _BRANCH, "use torch.where, or move the branch out of forward"),
    (".item()", _NUMBER, "keep the value in a tensor"),
    (".tolist()", _NUMBER, "keep the value in a tensor"),
    (".numpy()", "forward leaves torch for numpy", "use the torch operation of the same name"),
    ("numpy", "forward leaves torch for numpy", "use the torch operation of the same name"),
    ("result depends on values", "", "use an operation whose result always has the same shape: torch.where, topk"),
    ("random numbers", "", "make the noise an input of forward, or draw it in training mode only"),
    ("not an input", "", "make what changes between calls an input of forward"),
    ("updates", "", "compute the new value and return it instead of writing it to the module"),
    ("in place", "", "use the out-of-place form of that operation"),
    ("attribute", "", "set such attributes in __init__, not in forward"),
)
"""Texts in the messages of errors, with what to say instead (if not the message itself) and what mends it."""


def refusal(model: nn.Module | None, error: Exception, first: Exception, suspects: dict[str, str]) -> TraceError:
    """The sentence for a model that neither road could follow.

    Args:
        model: the model, if it is not an exported program.
        error: what stopped the second road.
        first: what stopped the first.
        suspects: lines of the model that did what no graph can hold, by what they did ("random", "value", "write").
    """
    problem = one_line(error)
    text = f"{type(error).__name__} {error} {type(first).__name__} {first}"
    if isinstance(error, Refused) and "not an input" in problem and "random" in suspects:
        problem, text = "forward draws random numbers", "random numbers"
    place = _place(error, suspects) or _place(first, suspects)
    line = text_at(place)
    known = [entry for entry in _KNOWN if entry[0] in str(error)] + [
        entry for entry in _KNOWN if entry[0] in f"{line} {text}"
    ]
    said, mend = known[0][1:] if known else ("", _TORCH)
    if isinstance(error, (Unfollowable, NoSpelling)):
        said = ""
    shown = f" (`{line}`)" if line else ""
    if place is None and model is not None:
        place = f"model {type(model).__name__}"
    return TraceError(f"the model cannot be traced: {said or problem}{shown}", place=place, mend=mend)


def _place(error: Exception, suspects: dict[str, str]) -> str | None:
    if isinstance(error, (Unfollowable, NoSpelling)):
        own = suspects.get("write") if "model's own" in str(error) else None
        return own or node_line(error.node)
    if isinstance(error, Refused):
        kinds = ("write",) if "updates" in str(error) else ("random", "value")
        return next((suspects[kind] for kind in kinds if kind in suspects), None)
    return user_line(error)


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Torch's own loggers silenced: what they would say comes as one sentence of ours."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.export", "torch._dynamo", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
