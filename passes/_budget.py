"""What a network costs when so many units of each group of channels are left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx, nn

from fxcompile.channel_graph import Group
from fxcompile.cost import layer_macs, samples
from fxcompile.latency import times_of
from fxcompile.layers import CONVOLUTIONS, TRANSPOSED
from fxcompile.program import Program, fetch, shape_of

Objective = Literal["macs", "parameters", "bytes", "latency"]


@dataclass(frozen=True)
class Item:
    """A cost that falls with the entries of some axes of a tensor.

    Attributes:
        whole: as it is.
        axes: for each axis, how many of its entries a unit of a group has, by the group's name, and how many there are.
    """

    whole: float
    axes: Sequence[tuple[Mapping[str, int], int]]

    def left(self, gone: Mapping[str, int]) -> float:
        """What is left of it when so many units of each group are gone."""
        cost = self.whole
        for units, size in self.axes:
            cost *= 1 - sum(each * gone.get(name, 0) for name, each in units.items()) / size
        return cost


@dataclass(frozen=True)
class Budget:
    """What a network costs, by item; what no group changes is in `fixed`."""

    items: Sequence[Item]
    fixed: float

    @classmethod
    def of(cls, program: Program, groups: Sequence[Group], objective: Objective) -> Budget:
        """The network's MACs for one sample, its parameters, the bytes of all its tensors, or the seconds that its
        layers take in ONNX Runtime, as if these fell with their channels.
        """
        axes: dict[int, dict[int, dict[str, int]]] = {}
        for group in groups:
            for member in group.members:
                own = axes.setdefault(id(member.slot.tensor), {}).setdefault(member.slot.axis, {})
                own[group.name] = own.get(group.name, 0) + member.places.shape[1]

        def item(tensor: torch.Tensor, whole: float) -> Item:
            found = axes.get(id(tensor), {})
            return Item(whole, [(units, tensor.shape[axis]) for axis, units in found.items()])

        items: list[Item] = []
        if objective in ("macs", "latency"):
            for node in program.graph.nodes:
                layer = program.layer(node)
                if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)):
                    cost = layer_macs(layer, node) / samples(program)
                    items.append(item(layer.weight, cost if objective == "macs" else layer_time(program, node)))
        else:
            for tensor in stored(program):
                if objective == "bytes" or isinstance(tensor, nn.Parameter):
                    items.append(item(tensor, tensor.numel() * (tensor.element_size() if objective == "bytes" else 1)))
        changing = [found for found in items if found.axes]
        return cls(changing, sum(found.whole for found in items if not found.axes))

    def left(self, gone: Mapping[str, int]) -> float:
        """The cost when so many units of each group are gone."""
        return self.fixed + sum(item.left(gone) for item in self.items)

    def prices(self, groups: Sequence[Group]) -> dict[str, float]:
        """What the first unit of each group saves."""
        whole = self.left({})
        return {group.name: max(whole - self.left({group.name: 1}), 0.0) for group in groups}


def layer_time(program: Program, node: fx.Node) -> float:
    """Seconds that a layer takes in ONNX Runtime on the example inputs; 0 of one that cannot be run there by itself."""
    shape = shape_of(node.all_input_nodes[0]) or ()
    (seconds,) = times_of([[program.layer(node)]], shape)  # type: ignore[list-item]
    return seconds or 0.0


def stored(program: Program) -> list[torch.Tensor]:
    """All tensors of a program, each once."""
    found: dict[int, torch.Tensor] = {}
    for node in program.graph.nodes:
        layer = program.layer(node)
        held = (
            (*layer.parameters(), *layer.buffers())
            if layer is not None
            else ((fetch(program.module, str(node.target)),) if node.op == "get_attr" else ())
        )
        found |= {id(tensor): tensor for tensor in held}
    return list(found.values())
