"""Watches a model run, and notes the lines that do what no graph can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxcompile import spellings
from fxcompile.functional import memory
from fxcompile.refusals import current_line

TAKES_VALUES = {"item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "nonzero",
                "masked_select", "unique"}  # fmt: skip
"""Functions whose result, or its shape, depends on a tensor's values."""


def is_random(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function called so draws random numbers."""
    bare = name.rstrip("_")
    return bare in spellings.RANDOM or (bare in spellings.RANDOM_IN_TRAINING and bool(kwargs.get("training")))


class Watch(TorchFunctionMode):
    """Notes the lines of a model that do what no graph can hold, while the model runs.

    Args:
        own: where the model's own tensors lie in memory.

    Attributes:
        suspects: the first line of each kind: "random", "value" (made a Python number), "write" (to the module).
        writes: the first line that wrote to each of the model's tensors, by `memory`, or set an attribute of one of its
            modules to a tensor or layer, by the module's id and the attribute's name.
    """

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.own = own
        self.suspects: dict[str, str] = {}
        self.writes: dict[object, str] = {}

    def __enter__(self) -> Watch:
        set_attribute = self._set_attribute = nn.Module.__setattr__

        def watched(module: nn.Module, name: str, value: Any) -> None:
            if isinstance(value, (Tensor, nn.Module)):
                self._note("write", (id(module), name))
            set_attribute(module, name, value)

        nn.Module.__setattr__ = watched  # type: ignore[method-assign,assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        nn.Module.__setattr__ = self._set_attribute  # type: ignore[method-assign]
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        kind = self._kind(name, kwargs or {})
        if kind is not None:
            self._note(kind, None)
        written = self._written(name, args, kwargs or {})
        if isinstance(written, Tensor) and written.layout == torch.strided and memory(written) in self.own:
            self._note("write", memory(written))
        return func(*args, **(kwargs or {}))

    def _note(self, kind: str, key: object) -> None:
        if kind in self.suspects and (key is None or key in self.writes):
            return
        line = current_line()
        if line is not None:
            self.suspects.setdefault(kind, line)
            if key is not None:
                self.writes.setdefault(key, line)

    def _kind(self, name: str, kwargs: dict[str, Any]) -> str | None:
        if name in TAKES_VALUES:
            return "value"
        return "random" if is_random(name, kwargs) else None

    def _written(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What a function writes to, if anything."""
        if name in ("batch_norm", "instance_norm"):  # running statistics
            trains = kwargs.get("training") or kwargs.get("use_input_stats")
            return args[1] if trains and len(args) > 1 else None
        in_place = name in ("__setitem__", "__set__") or (
            name.startswith("__i") and name not in ("__int__", "__invert__", "__index__")
        )
        if in_place or (name.endswith("_") and not name.endswith("__")):
            return args[0] if args else None
        return None
