"""Weights from checkpoints, loaded strictly into the user's architecture."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcompile.errors import ReadError, named_line
from fxcompile.factories import importable
from fxcompile.labels import dtype_name

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params", "module",
            "ema_state_dict", "ema", "model_ema", "params_ema", "backbone")  # fmt: skip
PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.", "ema.")
_SHOWN = 3


def load_torch(path: Path, allow_pickle: bool, is_zip: bool) -> object:
    """What torch.save wrote, with the weights-only unpickler unless pickles are allowed.

    Args:
        is_zip: whether it is of the format that can be mapped, which torch.save has written since torch 1.6.

    Raises:
        ReadError: damaged, or it needs code to be loaded.
    """
    place = str(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not allow_pickle:
                # Mapped, not read: the weights are copied into the architecture right away.
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
            with importable(os.getcwd()), contextlib.redirect_stdout(sys.stderr):
                return torch.load(path, map_location="cpu", weights_only=False)
    except (Exception, SystemExit) as error:  # a malformed file raises almost anything
        if not allow_pickle and isinstance(error, pickle.UnpicklingError) and _needs_code(str(error)):
            raise ReadError(
                f"it pickles Python objects{_names_of(str(error))}, and loading those runs any code in them",
                place=place,
                mend="give a .pt2 or a state dict, or, if you trust the maker, --allow-pickle",
            ) from None
        if allow_pickle and isinstance(error, (ImportError, AttributeError)):
            raise ReadError(
                f"its classes cannot be imported ({named_line(error)})",
                place=place,
                mend="run where they can be imported",
            ) from None
        raise ReadError(
            f"it is truncated, damaged or not from torch.save ({_short(error)})",
            place=place,
            mend="save it again",
        ) from None


def _short(error: BaseException) -> str:
    """Without torch's advice to load unsafely, which comes before the reason."""
    _, separator, reason = str(error).partition("WeightsUnpickler error:")
    return " ".join(reason.split())[:120] if separator else named_line(error, 120)


def _needs_code(message: str) -> bool:
    return any(
        word in message for word in ("GLOBAL", "Unsupported class", "Unsupported operand", "Can only", "Trying to")
    )


def _names_of(message: str) -> str:
    match = re.search(r"GLOBAL ([\w.]+)", message)
    return f" ({match[1]})" if match else ""


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ReadError: damaged.
    """
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise ReadError(
            f"it is a damaged or truncated safetensors file ({named_line(error, 120)})",
            place=str(path),
            mend="copy it again",
        ) from None


def find_module(data: object) -> nn.Module | None:
    """A module, or the one that a checkpoint wraps."""
    if isinstance(data, nn.Module):
        return data
    if isinstance(data, Mapping):
        for key in WRAPPERS:
            if isinstance(data.get(key), nn.Module):
                found: nn.Module = data[key]
                return found
    return None


def find_state_dict(data: object, place: str) -> dict[str, Any]:
    """A state dict, or the one that a checkpoint wraps.

    Raises:
        ReadError: there is none; says what there is.
    """
    if _is_state_dict(data):
        return dict(data)  # type: ignore[call-overload, no-any-return]
    if not isinstance(data, Mapping):
        raise ReadError(
            f"it holds a {type(data).__name__}, not a state dict", place=place, mend="save model.state_dict()"
        )
    if not data:
        raise ReadError("its state dict is empty", place=place, mend="save model.state_dict()")
    for key in WRAPPERS:
        inner = data.get(key)
        if inner is not None and _is_state_dict(inner):
            return dict(inner)
        if isinstance(inner, Mapping) and any(_is_state_dict(inner.get(deeper)) for deeper in WRAPPERS):
            return find_state_dict(inner, place)
    found = [key for key, value in data.items() if _is_state_dict(value)]
    if len(found) == 1:
        inner_state: dict[str, Any] = data[found[0]]
        return dict(inner_state)
    keys = f"only {_some([str(key) for key in data])}"
    if found:
        keys = f"several ({_some([str(key) for key in found])})"
    raise ReadError(
        f"it has no state dict under a known key, {keys}", place=place, mend="save model.state_dict() by itself"
    )


def _is_state_dict(data: object) -> bool:
    return (
        isinstance(data, Mapping)
        and all(isinstance(key, str) for key in data)
        and any(isinstance(value, Tensor) for value in data.values())
        and not any(isinstance(value, Mapping) and key in WRAPPERS for key, value in data.items())
    )


def load_weights(module: nn.Module, state: dict[str, Any], place: str) -> None:
    """Load strictly; a prefix that all keys share is taken off where the module has no such keys.

    Raises:
        ReadError: names some of the keys that are missing, unexpected, or of another shape or kind of number.
    """
    wanted = module.state_dict(keep_vars=True)
    state = _without_prefix(state, set(wanted))
    missing = [key for key in wanted if key not in state and not _may_miss(key, wanted, state)]
    unexpected = [key for key in state if key not in wanted]
    mis_shaped = [
        f"{key} ({_shape(state[key])}, wanted {_shape(wanted[key])})"
        for key in state
        if isinstance(wanted.get(key), Tensor)
        and not isinstance(wanted[key], nn.UninitializedParameter)
        and (not isinstance(state[key], Tensor) or state[key].shape != wanted[key].shape)
    ]
    mis_typed = [
        f"{key} ({dtype_name(state[key].dtype)}, wanted {dtype_name(wanted[key].dtype)})"
        for key in state
        if isinstance(wanted.get(key), Tensor) and isinstance(state[key], Tensor)
        if _is_of_another_kind(state[key], wanted[key])
    ]
    problems = [
        f"{len(keys)} {what}: {_some(keys)}"
        for keys, what in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (mis_shaped, "of another shape"),
            (mis_typed, "of another dtype"),
        )
        if keys
    ]
    if problems:
        raise ReadError(
            f"the state dict does not fit the architecture ({'; '.join(problems)})",
            place=place,
            mend="let --model name the architecture that it was saved from",
        )
    present = {key: value for key, value in wanted.items() if key not in state}
    has_no_values = any(isinstance(value, Tensor) and value.is_meta for value in wanted.values())
    if has_no_values:  # the tensors become the module's own, and must not change with the file
        state = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    try:
        module.load_state_dict({**present, **state}, strict=True, assign=has_no_values)
    except Exception as error:
        raise ReadError(
            f"the weights cannot be loaded ({named_line(error)})", place=place, mend="check --model"
        ) from None


def _may_miss(key: str, wanted: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Batch counters, which old checkpoints lack, and names of one shared tensor, of which safetensors keeps one."""
    if key.endswith("num_batches_tracked"):
        return True
    own = wanted[key]
    return isinstance(own, Tensor) and any(wanted[other] is own for other in state if other in wanted)


def _without_prefix(state: dict[str, Any], wanted: set[str]) -> dict[str, Any]:
    best = current = state
    while True:
        prefix = next((item for item in PREFIXES if all(key.startswith(item) for key in current)), None)
        if prefix is None:
            return best
        current = {key.removeprefix(prefix): value for key, value in current.items()}
        if len(wanted & set(current)) > len(wanted & set(best)):
            best = current


def _shape(value: Any) -> str:
    return "x".join(map(str, value.shape)) or "scalar" if isinstance(value, Tensor) else type(value).__name__


def _is_of_another_kind(given: Tensor, wanted: Tensor) -> bool:
    """Torch would drop the imaginary part, or take integer codes for weights."""
    return given.is_complex() != wanted.is_complex() or (wanted.is_floating_point() and not given.is_floating_point())


def _some(keys: list[str]) -> str:
    shown = ", ".join(" ".join(key.split())[:80] for key in keys[:_SHOWN])
    return f"{shown} and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else shown
