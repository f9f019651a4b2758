"""Modules built without the random numbers that a file's weights replace at once: drawing them takes the most time."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from fxcompile.functional import memory
from fxcompile.watching import TAKES_VALUES, is_random

_FILLS = {name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}
_FILLS -= {"constant_", "dirac_", "eye_", "ones_", "zeros_"}
"""Functions of `torch.nn.init`, and methods of tensors, that fill a tensor with random numbers."""


class Uninitialised(TorchFunctionMode):
    """While a module is built, what would be filled with random numbers keeps whatever its memory holds.

    That is for a module whose weights are loaded afterwards. It has to be given up where it could be seen: if the
    constructor makes other values of such a tensor, or draws random numbers in another way, which come out differently.

    Attributes:
        spoilt: whether the module has to be built again without this.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spoilt = False
        self._left: dict[int, _Left] = {}  # by place in memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.spoilt:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        target: Any = args[0] if args else next(iter(kwargs.values()), None)
        if name in _FILLS and isinstance(target, Tensor) and _has_memory(target):
            if not self._is_left(target):
                self._left[memory(target)] = _Left(target)
            return target
        result = func(*args, **kwargs)
        if self._left:
            self.spoilt = name in _FILLS or is_random(name, kwargs) or self._is_read(name, args, kwargs, result)
        return result

    def _is_left(self, tensor: Tensor) -> bool:
        found = self._left.get(memory(tensor))
        return found is not None and not found.is_gone()

    def _is_read(self, name: str, args: Any, kwargs: dict[str, Any], result: Any) -> bool:
        """Whether a function made something of a tensor that was left; views of it and writes to it are nothing."""
        given = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor) and _has_memory(item)]
        if not any(map(self._is_left, given)):
            return False
        made = [
            item for item in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(item, Tensor)
        ]
        return name in TAKES_VALUES or any(not _has_memory(item) or not self._is_left(item) for item in made)

    def were_loaded(self) -> bool:
        """Whether everything that was left, and that there still is, has been written to since."""
        return all(left.is_gone() or left.was_written() for left in self._left.values())


class _Left:
    """Memory that was not filled, and the tensor that it was not filled through."""

    def __init__(self, tensor: Tensor) -> None:
        self._memory = StorageWeakRef(tensor.untyped_storage())
        self._tensor = weakref.ref(tensor)
        self._version = tensor._version

    def is_gone(self) -> bool:
        return bool(self._memory.expired())

    def was_written(self) -> bool:
        tensor = self._tensor()  # None of a view that is gone: then nobody knows
        return tensor is not None and tensor._version > self._version


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_inference()
