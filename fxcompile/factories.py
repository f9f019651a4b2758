"""The user's own architecture, from the text of `--model`; importing it runs the user's code, by design."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from fxcompile.errors import ReadError, UsageError, did_you_mean, named_line
from fxcompile.refusals import user_line

_FORM = "write --model MODULE:FACTORY or path/to/file.py:FACTORY"


def make_module(factory: str, within: contextlib.AbstractContextManager[object] | None = None) -> nn.Module:
    """The module that the factory returns, from `package.module:function_or_class` or `path/to/file.py:name`.

    Args:
        within: entered for the call of the factory.

    Raises:
        UsageError: the text names nothing that can be called.
        ReadError: the user's code raises, or returns no nn.Module.
    """
    where, separator, name = factory.rpartition(":")
    if not separator or not where or not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"--model '{factory}' is not of the form MODULE:FACTORY", mend=_FORM)
    is_file = where.endswith(".py")
    folder = str(Path(where).absolute().parent) if is_file else os.getcwd()
    with importable(folder), contextlib.redirect_stdout(sys.stderr), contextlib.chdir(os.getcwd()):
        target: Any = _import_file(Path(where)) if is_file else _import(where)
        for part in name.split("."):
            if not hasattr(target, part):
                raise UsageError(f"'{where}' has no '{name}'", place="--model", mend=did_you_mean(part, _own(target)))
            target = getattr(target, part)
        return _call(target, factory, within or contextlib.nullcontext())


@contextlib.contextmanager
def importable(folder: str) -> Iterator[None]:
    """A folder first on `sys.path`, as `python -m` has it; afterwards last, for what is imported later."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def _import(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"--model '{name}' names no module", mend=_FORM)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(
                f"there is no module '{error.name}'",
                place="--model",
                mend="install it here, run from its folder, or name its .py file",
            ) from None
        raise _raised(f"importing '{name}'", error) from None
    except (Exception, SystemExit) as error:
        raise _raised(f"importing '{name}'", error) from None


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"there is no file '{path}'", place="--model", mend="check the path")
    # A name that is taken stays whose it is: torch.py in the user's folder must not replace torch.
    name = path.stem if path.stem not in sys.modules and path.stem.isidentifier() else f"fxcompile_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"'{path}' cannot be imported", place="--model", mend=_FORM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _raised(f"importing '{path}'", error) from None
    return module


def _call(target: Any, factory: str, within: contextlib.AbstractContextManager[object]) -> nn.Module:
    if isinstance(target, nn.Module):
        return target
    if not callable(target):
        raise UsageError(f"'{factory}' names a value of type {type(target).__name__}, no function or class", mend=_FORM)
    try:
        with within:
            module = target()
    except (Exception, SystemExit) as error:
        raise _raised(f"calling '{factory}()'", error) from None
    if not isinstance(module, nn.Module):
        raise ReadError(
            f"'{factory}' returns a {type(module).__name__}, not an nn.Module",
            place="--model",
            mend="name a function or class that makes the module without arguments",
        )
    return module


def _raised(doing: str, error: BaseException) -> ReadError:
    mend = "mend the model's code"
    if isinstance(error, TypeError) and "argument" in str(error):
        mend = "name a function that makes the module without arguments"
    if isinstance(error, ModuleNotFoundError):
        mend = f"install '{error.name}' or run where it can be imported"
    return ReadError(f"{doing} raised {named_line(error)}", place=user_line(error) or "--model", mend=mend)


def _own(target: Any) -> list[str]:
    """What an object defines itself and could be called to make a module."""
    items = vars(target).items() if hasattr(target, "__dict__") else ()
    home = getattr(target, "__name__", None)
    return [name for name, item in items if callable(item) and getattr(item, "__module__", None) == home]
