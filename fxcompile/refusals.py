"""What a refusal says: the line of the user's model, what is wrong there, and what to change."""

from __future__ import annotations

import io
import linecache
import logging
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import FrameType

import numpy
import torch
from torch import fx, nn

from fxcompile.errors import TraceError, one_line
from fxcompile.functional import Unfollowable
from fxcompile.lowering import NoSpelling
from fxcompile.raw_nodes import PLACE


class Refused(Exception):
    """A road led to a program that is not the model."""


class Impure(Refused):
    """The program gives other values than the model: what the model computes does not follow from its inputs."""


_LIBRARIES = tuple(f"{Path(path).parent}/" for path in (__file__, torch.__file__, numpy.__file__))
_OUTSIDE = str(Path(__file__).with_name("tracing.py"))
"""Whose frames are around those of the model, and inside of those of who traces it."""

_STANDARD = sysconfig.get_paths()["stdlib"]


def is_own(filename: str) -> bool:
    """Whether a file is the user's: not of torch, numpy, Python itself or this package."""
    if not filename.endswith(".py") or filename.startswith(("<", *_LIBRARIES)):
        return False
    return not filename.startswith(_STANDARD) or "site-packages" in filename


def own_lines(frame: FrameType | None) -> Iterator[str]:
    """`file:line` of the model's frames from a frame outwards."""
    while frame is not None and frame.f_code.co_filename != _OUTSIDE:
        if is_own(frame.f_code.co_filename):
            yield f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back


def current_line() -> str | None:
    """`file:line` of the model's innermost frame that is running."""
    return next(own_lines(sys._getframe(1)), None)


def model_frames(frames: traceback.StackSummary) -> traceback.StackSummary:
    """Those of the frames that are the model's, the innermost last."""
    inside = next((index for index, item in enumerate(reversed(frames)) if item.filename == _OUTSIDE), len(frames))
    return traceback.StackSummary.from_list([item for item in frames[len(frames) - inside :] if is_own(item.filename)])


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


_BRANCH = "forward branches on, or loops over, a value that it computes from its input"
_NUMBER = "forward takes a number out of a tensor"
_NUMPY = "forward leaves torch for numpy"
_TORCH = "rewrite that line with torch operations on tensors"
_WHERE = "use torch.where, or move the branch out of forward"
_KEEP = "keep the value in a tensor"
_SAME_NAME = "use the torch operation of the same name"
_OUT_OF_PLACE = "use the out-of-place form of that operation"

_KNOWN: tuple[tuple[str, str, str], ...] = (
    ("cannot be used as inputs to control flow", _BRANCH, _WHERE),
    ("data-dependent", _BRANCH, _WHERE),
    ("DataDependent", _BRANCH, _WHERE),
    ("Boolean value of Tensor", _BRANCH, _WHERE),
    (".item()", _NUMBER, _KEEP),
    (".tolist()", _NUMBER, _KEEP),
    ("number out of a tensor", _NUMBER, _KEEP),
    ("__format__", _NUMBER, _KEEP),
    ("data is not allocated", _NUMBER, f"{_KEEP}: torch.stack puts several together"),
    ("numpy", _NUMPY, _SAME_NAME),
    ("result depends on values", "", "use an operation whose result always has the same shape: torch.where, topk"),
    ("random numbers", "", "make the noise an input of forward, or draw it in training mode only"),
    ("updates", "", "compute the new value and return it instead of writing it to the module"),
    ("in place", "", _OUT_OF_PLACE),
    ("other memory", "", _OUT_OF_PLACE),
    ("assigned during export", "", "set such attributes in __init__, not in forward"),
    ("computes gradients", "", "write the derivative as operations on tensors"),
    ("autocast", "", "take autocast out of forward, or cast the model instead"),
    ("higher-order", "", "write that part with plain torch operations"),
)
"""Texts in the messages of errors, with what to say instead (if not the message itself) and what mends it."""

_BRANCHES = re.compile(r"(if|elif|while|for|assert)\b|.*\bif\b.*\belse\b")


def refusal(model: nn.Module | None, error: Exception, first: Exception, suspects: Mapping[str, str]) -> TraceError:
    """The sentence for a model that neither road could follow.

    Args:
        model: the model, if it is not an exported program.
        error: what stopped the second road.
        first: what stopped the first.
        suspects: lines of the model that did what no graph can hold, by what they did: "random", "value" (made a
            Python number), "changing" (gives something else each time), "write" (to the module).
    """
    cause = _cause(error, first, suspects)
    if isinstance(cause, Impure) and suspects.keys() - {"write"}:
        kind = next(kind for kind in ("random", "value", "changing") if kind in suspects)
        place: str | None = suspects[kind]
    elif isinstance(cause, Impure):
        kind, place = "changing", suspects.get("write") or user_line(first)
    else:
        kind, place = "", _place(cause, suspects) or _place(first, suspects)
    line = text_at(place)
    problem, mend = _explained(cause, first, kind, line)
    shown = f" (`{line}`)" if line else ""
    return TraceError(f"the model cannot be traced: {problem}{shown}", place=place or definition(model), mend=mend)


def _cause(error: Exception, first: Exception, suspects: Mapping[str, str]) -> Exception:
    """Which of the two errors to explain: the second, unless the first says more about the same thing."""
    if isinstance(first, (NoSpelling, Unfollowable)) and str(first) == str(error):
        return first  # its line is the innermost one
    if not isinstance(first, Unfollowable) or isinstance(error, (NoSpelling, Unfollowable)):
        return error
    if isinstance(error, Impure):
        return error if suspects.keys() - {"write"} else first
    return error if any(text in str(error) for text, *_ in _KNOWN) else first


def _explained(cause: Exception, first: Exception, kind: str, line: str) -> tuple[str, str]:
    """What is wrong, and the mend."""
    if kind == "random":
        return "forward draws random numbers", "make the noise an input of forward, or draw it in training mode only"
    if kind == "changing":
        return "forward depends on something that changes from call to call", "make that an input of forward"
    by_line = (_BRANCH, _WHERE) if _BRANCHES.match(line) else (_NUMBER, _KEEP)
    if kind == "value":
        return by_line
    texts = (str(cause), f"{line} {type(cause).__name__} {type(first).__name__} {first}")
    known = next((entry for text in texts for entry in _KNOWN if entry[0] in text), None)
    own = isinstance(cause, (Refused, Unfollowable, NoSpelling))
    if known is None or (own and not known[1]):
        return one_line(cause), known[2] if known else _TORCH
    if known[1] == _NUMBER and "numpy" not in line:
        return by_line if known[2] == _KEEP else (_NUMBER, known[2])
    return (known[1] or one_line(cause)), known[2]


def _place(error: Exception, suspects: Mapping[str, str]) -> str | None:
    if isinstance(error, (Unfollowable, NoSpelling)):
        own = suspects.get("write") if "model's own" in str(error) else None
        return own or node_line(error.node)
    if isinstance(error, Refused):
        return suspects.get("write") if "updates" in str(error) else None
    return user_line(error)


def definition(model: object) -> str | None:
    """`file:line` where a model's forward is defined, or else its class's name; None where there is no model."""
    if model is None:
        return None
    code = getattr(getattr(type(model), "forward", None), "__code__", None)
    if code is not None and is_own(code.co_filename):
        return f"{code.co_filename}:{code.co_firstlineno}"
    return f"model {type(model).__name__}"


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Torch's own loggers and prints silenced: what they would say comes as one sentence of ours."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.export", "torch._dynamo", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):  # where torch.export prints the graph that it could not finish
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
