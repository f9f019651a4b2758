"""Model files to modules and exported programs, without running code that they hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxcompile.errors import ReadError, UsageError
from fxcompile.exported_archive import read_exported
from fxcompile.factories import make_module
from fxcompile.filekinds import Kind, file_kind
from fxcompile.layers import is_finite
from fxcompile.memory import is_inflated
from fxcompile.state_dicts import find_module, find_state_dict, load_safetensors, load_torch, load_weights
from fxcompile.uninitialised import Uninitialised


@dataclass(frozen=True)
class ModelFile:
    """What a model file holds: exactly one of `exported` and `module`.

    Attributes:
        kind: "exported" for a .pt2; "module" for a state dict in its architecture, and for a pickled module.
        example_inputs: arguments and keyword arguments, where a .pt2 brings them.
    """

    kind: Literal["exported", "module"]
    exported: ExportedProgram | None = None
    module: nn.Module | None = None
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None


def read_model(path: Path, *, factory: str | None = None, allow_pickle: bool = False) -> ModelFile:
    """Read a model file, whose kind is found by its content.

    Args:
        factory: "module:name" or "path/to/file.py:name", what makes the architecture of a state dict. Importing it
            runs the user's code, with the current folder importable.
        allow_pickle: let the file run any code it holds.

    Raises:
        ReadError: missing, malformed, of another kind, would run code, or has weights that are not finite.
        UsageError: the factory's text names nothing, or goes with no such file.
    """
    path = Path(path)
    place = str(path)
    kind = file_kind(path)
    if kind in (Kind.EXPORTED, Kind.OLD_EXPORTED):
        if factory is not None:
            raise UsageError("a .pt2 brings its own architecture", place=place, mend="leave --model out")
        if kind is Kind.OLD_EXPORTED and not allow_pickle:
            raise ReadError(
                "it is of the format that torch.export.save wrote before torch 2.8",
                place=place,
                mend="save it again with this torch, or, if you trust its maker, add --allow-pickle",
            )
        return _exported(read_exported(path, allow_pickle), place)
    if kind is Kind.TORCHSCRIPT:
        raise ReadError(
            "it is a TorchScript archive, which holds no Python that could be traced",
            place=place,
            mend="export the nn.Module it was made from with torch.export.save, or save its state_dict() for --model",
        )
    if kind is Kind.SAFETENSORS:
        data: object = load_safetensors(path)
    else:
        data = load_torch(path, allow_pickle, kind is Kind.TORCH_ZIP)
    pickled = find_module(data)
    if isinstance(pickled, torch.jit.ScriptModule):
        raise ReadError(
            "it holds a TorchScript module", place=place, mend="export the nn.Module with torch.export.save"
        )
    if pickled is not None and factory is not None:
        raise UsageError("the file holds a whole module", place=place, mend="leave --model out")
    if pickled is None:
        state = find_state_dict(data, place)
        if factory is None:
            raise ReadError(
                f"it is a state dict of {len(state)} tensors without the architecture",
                place=place,
                mend="name the architecture with --model MODULE:FACTORY",
            )
        check_finite(((key, value) for key, value in state.items() if isinstance(value, Tensor)), place)
        pickled = _with_weights(factory, state, place)
    check_finite([*pickled.named_parameters(), *pickled.named_buffers()], place)
    return ModelFile("module", module=pickled)


def _with_weights(factory: str, state: dict[str, Any], place: str) -> nn.Module:
    """The architecture with the weights of a state dict; its own random ones are drawn only where they would stay."""
    building = Uninitialised()
    module = make_module(factory, building)
    if not building.spoilt:
        load_weights(module, state, place)
        if building.were_loaded():
            return module
    module = make_module(factory)
    load_weights(module, state, place)
    return module


def _exported(program: ExportedProgram, place: str) -> ModelFile:
    check_finite(((key, value) for key, value in program.state_dict.items() if isinstance(value, Tensor)), place)
    examples = program.example_inputs
    if examples is None:
        return ModelFile("exported", exported=program)
    if not (
        isinstance(examples, (tuple, list))
        and len(examples) == 2
        and isinstance(examples[0], (tuple, list))
        and isinstance(examples[1], dict)
    ):
        raise ReadError("its example inputs are not (args, kwargs)", place=place, mend="export the model again")
    for leaf in pytree.tree_leaves(examples):
        if isinstance(leaf, Tensor):
            check_plain("example input", leaf, place)
    return ModelFile("exported", exported=program, example_inputs=(tuple(examples[0]), dict(examples[1])))


def check_finite(tensors: Iterable[tuple[str, Tensor]], place: str) -> None:
    """Refuse weights that no compiler can keep.

    Raises:
        ReadError: names the first tensor with NaN or infinite values, without values, or inflated from few bytes.
    """
    for name, tensor in tensors:
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            continue
        check_plain(f"tensor '{name}'", tensor, place)
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        values = tensor.detach()
        values = values.float() if values.element_size() == 1 else values
        if not is_finite(values):
            wrong = int((~torch.isfinite(values)).sum())
            raise ReadError(
                f"the tensor '{name}' has {wrong} NaN or infinite values of {tensor.numel()}",
                place=place,
                mend="give weights from before training diverged",
            )


def check_plain(what: str, tensor: Tensor, place: str) -> None:
    """Refuse tensors that are not dense on the CPU, or that claim far more values than the file holds.

    Raises:
        ReadError: names the tensor.
    """
    if tensor.device.type != "cpu":
        where = "has no values" if tensor.is_meta else f"is on {tensor.device}"
        raise ReadError(f"the {what} {where}", place=place, mend="move the model to the CPU and save it again")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ReadError(f"the {what} is sparse or quantized", place=place, mend="save dense floating-point weights")
    held = tensor.untyped_storage().nbytes()
    if is_inflated(tensor.numel(), held):
        raise ReadError(
            f"the {what} claims {tensor.numel()} values and holds {held} bytes", place=place, mend="save it again"
        )
