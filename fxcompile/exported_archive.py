"""Reads `.pt2` archives (torch.export.save) without running code that they hold.

`torch.export.load` unpickles freely, evals expressions, imports modules and loads compiled libraries where an archive
asks for it. Here the same deserialiser sees only what passed: records by whitelist, JSON by `program_json`, pickles by
torch's weights-only unpickler; as a second wall the functions that would run code refuse while it works.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import math
import pickle
import re
import threading
import typing
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from unittest import mock

import sympy  # type: ignore[import-untyped]
import torch
from torch.export import ExportedProgram

from fxcompile.errors import ReadError, named_line
from fxcompile.filekinds import open_regular
from fxcompile.memory import is_inflated
from fxcompile.program_json import Refused, check_expression, checked_program, quoted

_RECORD = re.compile(
    r"models/\w+\.json|data/(weights|constants)/(weight_\d+|tensor_\d+|\w+\.json|\w+\.pt)|data/sample_inputs/\w+\.pt"
)
_IGNORED = re.compile(
    r"archive_format|archive_version|byteorder|\.format_version|\.storage_alignment|\.data/.*|extra/.*"
)
_LOCK = threading.RLock()
_TRUST = "if you trust its maker, add --allow-pickle, which lets the file run any code it holds"
_AGAIN = "save it again with torch.export.save of this torch"


def read_exported(path: Path, allow_pickle: bool) -> ExportedProgram:
    """The exported program of an archive.

    Raises:
        ReadError: damaged, of another torch, or it holds what could run code.
    """
    place = str(path)
    logger = logging.getLogger("torch.export")
    before = logger.level
    with open_regular(path) as stream, _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            program = _load_trusted(stream) if allow_pickle else _load_untrusted(stream)
        except Refused as reason:
            raise ReadError(f"{reason}", place=place, mend=_TRUST) from None
        except ReadError as error:
            raise ReadError(error.problem, place=place, mend=error.mend) from None
        except (Exception, SystemExit) as error:
            hidden = _refusal_within(error)
            if hidden is not None:
                raise ReadError(f"{hidden}", place=place, mend=_TRUST) from None
            raise ReadError(f"the archive does not load ({named_line(error)})", place=place, mend=_AGAIN) from None
        finally:
            logger.setLevel(before)
    return program


def _load_trusted(stream: IO[bytes]) -> ExportedProgram:
    return torch.export.load(stream)


def _load_untrusted(stream: IO[bytes]) -> ExportedProgram:
    try:
        from torch._export.serde import serialize
        from torch.export.pt2_archive import _package
        from torch.utils import _pytree

        base, load = _package.PT2ArchiveReader, _package._load_exported_programs
        sinks: list[tuple[Any, str, Any]] = [
            (serialize, "deserialize_torch_artifact", _artifact),
            (torch, "load", _weights_only(torch.load)),
            (torch._C, "_pickle_load_obj", _refusing("script objects", torch._C._pickle_load_obj)),
            (pickle, "loads", _refusing("a pickled object", pickle.loads)),
            (pickle, "load", _refusing("a pickled object", pickle.load)),
            (sympy, "sympify", _arithmetic(sympy.sympify)),
            (_pytree, "importlib", SimpleNamespace(import_module=_refusing_import)),
        ]
        if any(not hasattr(owner, name) for owner, name, _ in sinks):
            raise AttributeError
    except (ImportError, AttributeError):
        raise ReadError(
            f"fxcompile does not know how torch {torch.__version__} reads archives",
            mend="use torch 2.13, or --allow-pickle if you trust the file's maker",
        ) from None
    reader = _checked_reader(base)(stream)
    names = reader.get_file_names()
    with _guard([*sinks, (typing, "get_type_hints", _remembering(typing.get_type_hints))]):
        (program,) = load(reader, names, None).values()
    if not isinstance(program, ExportedProgram):
        raise ReadError("it holds no exported program", mend=_AGAIN)
    program._guards_code = []
    return program


def _checked_reader(base: Any) -> Any:
    """torch's archive reader, which gives out only records that were checked."""

    class CheckedReader(base):  # type: ignore[misc]
        def __init__(self, stream: IO[bytes]) -> None:
            self._json: dict[str, bytes] = {}
            super().__init__(stream)
            names = [name for name in super().get_file_names() if not _IGNORED.fullmatch(name)]
            for name in names:
                if not _RECORD.fullmatch(name):
                    raise Refused(_unknown_record(name))
            self._names = names
            size = stream.seek(0, io.SEEK_END)
            if sum(self.archive_file.get_record_size(name) for name in names) > size:
                raise ReadError("the archive's records claim more bytes than the file has", mend=_AGAIN)
            models = [name for name in names if name.startswith("models/")]
            if len(models) != 1:
                raise ReadError(f"it holds {len(models)} exported programs", mend="save exactly one")
            self._json = {name: self._check(name) for name in names if name.endswith(".json")}

        def _check(self, name: str) -> bytes:
            try:
                data = json.loads(super().read_bytes(name))
            except (ValueError, RecursionError) as error:
                raise ReadError(f"its record {name} is damaged ({named_line(error)})", mend=_AGAIN) from None
            data = checked_program(data)
            if not name.startswith("models/"):
                self._check_sizes(name.rpartition("/")[0], data)
            return json.dumps(data).encode()

        def _check_sizes(self, folder: str, data: Any) -> None:
            for key, payload in data["config"].items():
                count = math.prod(size["as_int"] for size in payload["tensor_meta"]["sizes"])
                held = self.archive_file.get_record_size(f"{folder}/{payload['path_name']}")
                if is_inflated(count, held) or (count and not held):
                    raise ReadError(f"the tensor '{key}' claims {count} values and holds {held} bytes", mend=_AGAIN)

        def read_bytes(self, name: str) -> bytes:
            if name in self._json:
                return self._json[name]
            content: bytes = super().read_bytes(name)
            return content

        def get_file_names(self) -> list[str]:
            return list(self._names)

    return CheckedReader


def _unknown_record(name: str) -> str:
    if name.startswith("data/aotinductor/"):
        return "it holds compiled libraries (AOTInductor), which are native code"
    if "/custom_obj_" in name or "/opaque_obj_" in name:
        return "it holds pickled objects"
    return f"its record {quoted(name)} is none that fxcompile knows"


# the second wall

_guarded = threading.local()


@contextmanager
def _guard(sinks: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Functions that run code, replaced for this thread; the lock of `read_exported` is held."""
    with ExitStack() as stack:
        for owner, name, replacement in sinks:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        _guarded.active = True
        try:
            yield
        finally:
            _guarded.active = False


def _is_guarded() -> bool:
    return getattr(_guarded, "active", False)


def _refusing(what: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if _is_guarded():
            raise Refused(f"it holds {what}")
        return original(*args, **kwargs)

    return refuse


def _weights_only(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(*args: Any, **kwargs: Any) -> Any:
        if _is_guarded():
            kwargs = {**kwargs, "weights_only": True, "map_location": "cpu"}
            kwargs.pop("pickle_module", None)
        return original(*args, **kwargs)

    return load


def _artifact(serialized: Any) -> Any:
    """In place of torch's own, which falls back to unpickling freely when the weights-only unpickler refuses."""
    if isinstance(serialized, (dict, tuple)):
        return serialized
    if len(serialized) == 0:
        return {}
    try:
        artifact = torch.load(io.BytesIO(serialized), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise Refused("its example inputs or weights are pickled with more than tensors in them") from None
    if not isinstance(artifact, (tuple, dict)):
        raise ReadError("its example inputs or weights are no tuple or dict", mend=_AGAIN)
    return artifact


def _arithmetic(original: Callable[..., Any]) -> Callable[..., Any]:
    def sympify(value: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_guarded() and isinstance(value, str):
            check_expression(value)
        return original(value, *args, **kwargs)

    return sympify


def _remembering(original: Callable[..., Any]) -> Callable[..., Any]:
    """The types of a class's fields, which torch works out anew for every object that it reads: a third of the time."""
    known: dict[Any, Any] = {}

    def get_type_hints(kind: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_guarded():
            return original(kind, *args, **kwargs)
        if kind not in known:
            known[kind] = original(kind, *args, **kwargs)
        return known[kind]

    return get_type_hints


def _refusing_import(name: str, package: str | None = None) -> Any:
    if _is_guarded():
        raise Refused(f"it names the module {quoted(name)} to import")
    return importlib.import_module(name, package)


def _refusal_within(error: BaseException | None) -> Refused | None:
    while error is not None and not isinstance(error, Refused):
        error = error.__cause__ or error.__context__
    return error
