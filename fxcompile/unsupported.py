"""What a model is made of that no tracer follows, refused by name before anything is traced."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxcompile.errors import TraceError

COMPILED = "_orig_mod"
"""Where the modules that `torch.compile` makes hold the original; to import their class would load all of dynamo."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what spreads it over devices or compiles it."""
    spread = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    name = "module" if spread else COMPILED
    return unwrapped(model.get_submodule(name)) if name in model._modules else model


def refuse_unsupported(model: nn.Module) -> None:
    """Raise TraceError for models of what no tracer follows: TorchScript, compiled, quantised, sparse or lazy parts."""
    for name, module in model.named_modules():
        place = f"layer '{name}'" if name else f"model {type(module).__name__}"
        if isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
            raise TraceError(
                "TorchScript holds no Python to trace",
                place=place,
                mend="put the nn.Module it was made from in its place",
            )
        if COMPILED in module._modules:
            raise TraceError(
                "it was compiled, which leaves no Python to trace",
                place=place,
                mend=f"put the module it was made from, its `.{COMPILED}`, in its place",
            )
        if ".quantized." in type(module).__module__ and type(module).__module__.startswith("torch."):
            raise TraceError("it is quantised already", place=place, mend="trace the model before it was quantised")
        for key, value in (*vars(module).items(), *module._buffers.items()):
            if type(value).__name__ == "FakeTensor":
                raise TraceError(
                    "it is a fake tensor that torch.export left there, and has no values",
                    place=f"tensor '{name}.{key}'" if name else f"tensor '{key}'",
                    mend="delete that attribute, or make the model anew",
                )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        place = f"tensor '{name}'"
        if is_lazy(tensor):
            raise TraceError(
                "a lazy layer has no weights yet",
                place=place,
                mend="run the model once on an example before tracing it",
            )
        if tensor.is_quantized:
            raise TraceError("it is quantised already", place=place, mend="trace the model before it was quantised")
        if tensor.layout != torch.strided:
            raise TraceError("it is a sparse tensor", place=place, mend="make it dense with .to_dense()")
        if tensor.is_meta:
            raise TraceError("it is on the meta device and has no values", place=place, mend="load its weights first")
