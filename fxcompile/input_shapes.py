"""Example inputs from `--input-shape`."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxcompile.errors import UsageError, did_you_mean
from fxcompile.memory import is_too_large

_SHAPE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sizes>[0-9]{1,18}(?:[x,][0-9]{1,18})*)(?::(?P<dtype>\w+))?")
DTYPES = ("bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "uint8")


def example_inputs(model: nn.Module, texts: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random tensors of the shapes that `--input-shape` gives: `1x3x224x224`, `image=1x3x64x64`, `ids=1x20:int64`.

    Raises:
        UsageError: none is given, one does not parse, or names no parameter of the model's forward.
    """
    if not texts:
        raise UsageError(
            "the shape of the model's input is not known", mend=f"give {wanted(model)}, once for each input"
        )
    parameters = inspect.signature(model.forward).parameters
    any_keyword = any(item.kind is item.VAR_KEYWORD for item in parameters.values())
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    dtype = next((item.dtype for item in model.parameters() if item.is_floating_point()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    for text in texts:
        name, made = parse(text, dtype, generator)
        if name is None:
            if kwargs:
                raise UsageError(f"--input-shape {text} has no name and follows one that has", mend="name all of them")
            args.append(made)
        elif name not in parameters and not any_keyword:
            raise UsageError(f"the model's forward has no input '{name}'", mend=did_you_mean(name, parameters))
        elif name in kwargs:
            raise UsageError(f"--input-shape names '{name}' twice", mend="keep one of them")
        else:
            kwargs[name] = made
    return tuple(args), kwargs


def parse(text: str, dtype: torch.dtype, generator: torch.Generator) -> tuple[str | None, Tensor]:
    """One `--input-shape` as a name, if it has one, and a random tensor."""
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise UsageError(f"--input-shape {text} does not parse", mend="write 1x3x224x224 or NAME=1x3x224x224")
    sizes = [int(size) for size in re.split("[x,]", match["sizes"])]
    if 0 in sizes:
        raise UsageError(f"--input-shape {text} has an axis of size 0", mend="give sizes of at least 1")
    if match["dtype"]:
        if match["dtype"] not in DTYPES:
            raise UsageError(f"--input-shape {text} names no dtype", mend=did_you_mean(match["dtype"], DTYPES))
        dtype = getattr(torch, match["dtype"])
    if is_too_large(math.prod(sizes) * 4):
        raise UsageError(f"--input-shape {text} would not fit in memory", mend="give smaller sizes")
    if dtype.is_floating_point:
        return match["name"], torch.randn(sizes, generator=generator).to(dtype)
    return match["name"], torch.zeros(sizes, dtype=dtype)


def wanted(model: nn.Module) -> str:
    """What to write: a hint from the first weight."""
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            spatial = {1: "256", 2: "224x224", 3: "16x64x64"}[len(module.kernel_size)]
            return f"--input-shape 1x{module.in_channels}x{spatial} or whatever it takes"
    return "--input-shape 1x3x224x224 or whatever it takes"
