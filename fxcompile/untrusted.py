"""Loads exported programs from files that are not trusted, without running code from them.

`torch.export.load` unpickles (weights, constants, example inputs), passes expressions of the file to `sympy.sympify`,
which evaluates Python, resolves operators by dotted names under `torch`, and loads compiled libraries. Here each of
these is closed while a file is loaded: unpickling is restricted to tensors, expressions to integer arithmetic, compiled
libraries refused by name, and every operator of the loaded graph must be one of PyTorch's own.
"""

from __future__ import annotations

import ast
import pickle
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram

from fxcompile.errors import ReadError

_LOCK = threading.Lock()
_FORBIDDEN_ENTRIES = (".so", ".dylib", ".dll", ".cpp", ".py", "aotinductor")
_OPERATOR_MODULES = ("_operator", "math", "torch.fx.experimental.sym_node", "torch.fx.experimental.symbolic_shapes",
                     "torch.utils._sympy.functions")  # fmt: skip
_SYMBOLIC = (
    "sym_int",
    "sym_float",
    "sym_max",
    "sym_min",
    "sym_not",
    "sym_sqrt",
    "sym_ite",
    "sym_sum",
    "sym_fresh_size",
)


class RunsCode(Exception):
    """The file would run code; the message says which part of it."""


def load_exported(path: Path, allow_pickle: bool) -> ExportedProgram:
    """An exported program from a `.pt2`.

    Raises:
        ReadError: the file would run code and `allow_pickle` is false.
        Exception: whatever PyTorch raises for a malformed file.
    """
    if allow_pickle:
        return torch.export.load(path)
    try:
        refuse_libraries(path)
        with guarded():
            exported = torch.export.load(path)
        for module in (exported.graph_module, *exported.graph_module.children()):
            if isinstance(module, fx.GraphModule):
                check_operators(module.graph)
    except RunsCode as reason:
        raise ReadError(
            f"loading it would run code that it holds ({reason})",
            place=str(path),
            mend="export the model again with torch.export.save, or pass --allow-pickle if you trust the file",
        ) from None
    return exported


def refuse_libraries(path: Path) -> None:
    """Raises RunsCode where an archive holds compiled or source code."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if any(part in name.rpartition("/data/")[2] if part == "aotinductor" else name.endswith(part)
                   for part in _FORBIDDEN_ENTRIES):  # fmt: skip
                raise RunsCode(f"compiled code, {name}")


@contextmanager
def guarded() -> Iterator[None]:
    """Unpickling restricted to tensors and symbolic expressions to arithmetic, process-wide, while a file is loaded."""
    load, sympify = torch.load, sympy.sympify

    def tensors_only(file: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["weights_only"] = True
        try:
            return load(file, *args, **kwargs)
        except pickle.UnpicklingError as error:
            raise RunsCode("a pickle of more than tensors") from error

    def refuse(what: str) -> Callable[..., Any]:
        def refused(*_: Any, **__: Any) -> Any:
            raise RunsCode(what)

        return refused

    def arithmetic_only(text: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(text, str):
            check_expression(text)
        return sympify(text, *args, **kwargs)

    with (
        _LOCK,
        mock.patch.object(torch, "load", tensors_only),
        mock.patch.object(torch._C, "_pickle_load_obj", refuse("a pickled script object"), create=True),
        mock.patch.object(torch.jit, "load", refuse("a TorchScript module")),
        mock.patch.object(pickle, "loads", refuse("a pickled object")),
        mock.patch.object(pickle, "load", refuse("a pickled object")),
        mock.patch.object(sympy, "sympify", arithmetic_only),
    ):
        yield


_ARITHMETIC = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Constant, ast.Name, ast.Call, ast.Load,
               ast.operator, ast.unaryop, ast.boolop, ast.cmpop)  # fmt: skip


def check_expression(text: str) -> None:
    """Raises RunsCode unless a symbolic expression is arithmetic on names, as `2*s0 + Max(1, s1)`."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError) as error:
        raise RunsCode(f"the expression {text[:60]!r}") from error
    for node in ast.walk(tree):
        plain = isinstance(node, _ARITHMETIC)
        if isinstance(node, ast.Call):
            plain = isinstance(node.func, ast.Name) and node.func.id[:1].isupper() and not node.keywords
        elif isinstance(node, ast.Constant):
            plain = isinstance(node.value, (int, float))
        elif isinstance(node, ast.Name):
            plain = not node.id.startswith("_")
        if not plain:
            raise RunsCode(f"the expression {text[:60]!r}")


def check_operators(graph: fx.Graph) -> None:
    """Raises RunsCode where a node calls anything but PyTorch's operators and Python's arithmetic."""
    for node in graph.nodes:
        if node.op == "call_function" and not is_known_operator(node.target):
            raise RunsCode(f"it calls {node.target}")
        if node.op == "call_method":
            raise RunsCode(f"it calls the method {node.target}")


def is_known_operator(target: Any) -> bool:
    """Whether a call's target is an operator that computes tensors or sizes and nothing else."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)):
        return True
    if getattr(target, "__name__", "") in _SYMBOLIC and getattr(target, "__module__", "") == "torch":
        return True
    module = getattr(target, "__module__", None)
    return module in _OPERATOR_MODULES and getattr(target, "__name__", "") not in ("methodcaller", "attrgetter")
