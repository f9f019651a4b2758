"""Module trees and graphs in the making: put a layer at a path, ask whether a path is free, drop dead code."""

from __future__ import annotations

from collections.abc import Collection

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
        owner.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    else:
        owner.register_buffer(name, value)


def is_free(root: nn.Module, path: str) -> bool:
    """Whether nothing lies at a dotted path, nor a layer on the way to it."""
    owner = root
    for atom in path.split("."):
        if owner is not root and type(owner) is not nn.Module:
            return False
        held = owner._modules.get(atom)
        if held is None:
            return atom not in owner._parameters and atom not in owner._buffers
        owner = held
    return False


def is_layer(root: nn.Module, path: str) -> bool:
    """Whether a layer lies at a dotted path."""
    held = root
    for atom in path.split("."):
        child = held._modules.get(atom)
        if child is None:
            return False
        held = child
    return type(held) is not nn.Module


def outside_of_layers(root: nn.Module, path: str, layers: Collection[str] = ()) -> str:
    """A dotted path, or one beside the layer that it would lie in: `norm.act` as `norm_act`.

    No layer holds another, so that each can be replaced by itself. `layers` are paths that will be layers, too.
    """
    atoms = path.split(".")
    for count in range(1, len(atoms)):
        owner = ".".join(atoms[:count])
        if owner in layers or is_layer(root, owner):
            return ".".join([*atoms[: count - 1], "_".join(atoms[count - 1 :])])
    return path
