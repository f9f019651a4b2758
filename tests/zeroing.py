"""What removal is held against: the same network with zeros where it takes numbers out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxcompile.channel_graph import ChannelGraph
from fxcompile.layers import shallow_copy
from fxcompile.program import Program, fetch
from fxcompile.trees import place


def zeroed(graph: ChannelGraph, gone: Mapping[str, Collection[int]]) -> Program:
    """The program with zeros where `remove_channels` takes entries out: it gives the same outputs."""
    program = graph.program.snapshot()
    blank: dict[int, Tensor] = {}
    for name, units in gone.items():
        for member in graph.group(name).members:
            tensor = blank.setdefault(id(member.slot.tensor), member.slot.tensor.detach().clone())
            tensor.index_fill_(member.slot.axis, torch.from_numpy(member.places[list(units)].ravel()), 0)
    for node in program.graph.nodes:
        layer = program.layer(node)
        if layer is not None:
            new: Any = shallow_copy(layer)
            for registry in (new._parameters, new._buffers):
                for key, tensor in registry.items():
                    if id(tensor) in blank:
                        value = blank[id(tensor)]
                        registry[key] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value
            if isinstance(new, nn.RNNBase):
                new._init_flat_weights()
            place(program.module, str(node.target), new)
        elif node.op == "get_attr" and id(fetch(program.module, str(node.target))) in blank:
            held = fetch(program.module, str(node.target))
            value = blank[id(held)]
            place(
                program.module,
                str(node.target),
                nn.Parameter(value, False) if isinstance(held, nn.Parameter) else value,
            )
    return program
