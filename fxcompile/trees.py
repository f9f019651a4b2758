"""Module trees and graphs in the making: put a layer at a path, ask whether a path is free, drop dead code."""

from __future__ import annotations

from torch import Tensor, fx, nn


def drop_dead_code(graph: fx.Graph) -> None:
    """Erase what no output needs: nothing here has a side effect, though `torch.fx` takes some calls to have one."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def place(root: nn.Module, path: str, value: nn.Module | Tensor) -> None:
    """Set a layer, parameter or buffer at a dotted path, making empty modules on the way."""
    *parents, name = path.split(".")
    owner = root
    for atom in parents:
        if atom not in owner._modules:
            owner.add_module(atom, nn.Module())
        owner = owner.get_submodule(atom)
    if isinstance(value, nn.Module):
        held = owner._modules.get(name)
        if held is not None:
            for key, child in held._modules.items():
                value.add_module(key, child)
        owner.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    else:
        owner.register_buffer(name, value)


def is_free(root: nn.Module, path: str) -> bool:
    """Whether nothing lies at a dotted path, nor a layer on the way to it."""
    owner = root
    for atom in path.split("."):
        if type(owner) is not nn.Module:
            return False
        held = owner._modules.get(atom)
        if held is None:
            return atom not in owner._parameters and atom not in owner._buffers
        owner = held
    return False
