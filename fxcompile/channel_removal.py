"""Takes channels out of a program: rows, columns and entries of stored tensors, and the sizes that depend on them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from fxcompile.channel_graph import ChannelGraph, Group
from fxcompile.channel_labels import Labels
from fxcompile.errors import RewriteError, UsageError
from fxcompile.layers import BATCH_NORMS, CONVOLUTIONS, INSTANCE_NORMS, TRANSPOSED, shallow_copy
from fxcompile.program import PART, fetch, output_node, propagate_shapes, shape_of
from fxcompile.trees import place


def remove_channels(
    graph: ChannelGraph, gone: Mapping[str, Collection[int]], values: Mapping[str, Tensor] | None = None
) -> None:
    """Take units out of a program, which is changed; the channel graph is of no use afterwards.

    Args:
        gone: by the name of a group the numbers of its units that go.
        values: by the path of a stored tensor what it is to hold, in the size that it has before.

    Raises:
        UsageError: a group would be left empty, or cannot lose any.
        RewriteError: the outputs would have another shape.
    """
    program, labels = graph.program, graph.labels
    stays = np.ones(len(graph.roots), dtype=bool)
    for name, units in gone.items():
        group = graph.group(name)
        check(group, units)
        stays[group.roots[list(units)]] = False

    def kept(own: Labels) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = stays[graph.roots[own]]
        return found

    replace_tensors(graph, kept, values or {})
    for target, (taken, places) in labels.orders.items():
        left = np.cumsum(kept(taken)) - 1
        order = left[places[kept(taken[places])]]
        place(program.module, target, torch.from_numpy(order).to(fetch(program.module, target).dtype))
    for node, resize in labels.resized.items():
        node.args, node.kwargs = resize(kept)
    before = {node: shape_of(node) for node in output_node(program.graph).all_input_nodes}
    program.module.recompile()
    propagate_shapes(program.module, program.examples)
    if any(shape_of(node) != shape for node, shape in before.items()):
        raise RewriteError("an output would have another shape", mend="this is a bug of the channel graph")
    for node, value in labels.values.items():
        if isinstance(value, tuple):
            narrow(node, {axis: kept(own) for axis, own in enumerate(value) if own is not None})


def narrow(node: fx.Node, stays: Mapping[int, NDArray[np.bool_]]) -> None:
    """Say of a node which entries of the original's value it has left."""
    part = dict(node.meta.get(PART, {}))
    for axis, entries in stays.items():
        left = torch.from_numpy(np.flatnonzero(entries))
        if len(left) < len(entries):
            part[axis] = part[axis][left] if axis in part else left
    if part:
        node.meta[PART] = part


def check(group: Group, units: Collection[int]) -> None:
    """Raises UsageError: not all of these may go."""
    if group.reason and units:
        raise UsageError(f"no channels of '{group.name}' can go: {group.reason}", mend="leave it out")
    if len(set(units)) >= len(group):
        raise UsageError(f"all channels of '{group.name}' would go", mend="leave one at least")


def replace_tensors(graph: ChannelGraph, kept: Any, values: Mapping[str, Tensor]) -> None:
    """Put smaller tensors, and layers that know their sizes, in the place of those that lose channels."""
    program, module = graph.program, graph.program.module
    smaller: dict[int, Tensor] = {}
    given = {id(fetch(module, path)): value for path, value in values.items()}
    for slot in graph.labels.slots.values():
        tensor = slot.tensor
        now = smaller.get(id(tensor), given.get(id(tensor), tensor)).detach()
        smaller[id(tensor)] = now.index_select(slot.axis, torch.from_numpy(np.flatnonzero(kept(slot.labels))))
    for key, value in given.items():
        smaller.setdefault(key, value)
    held = {id(slot.tensor): slot.tensor for slot in graph.labels.slots.values()}
    held |= {id(fetch(module, path)): fetch(module, path) for path in values}
    made: dict[int, Tensor] = {}
    for key, now in smaller.items():
        old = held[key]
        if now.shape != old.shape or key in given:
            now = now.to(old.dtype).contiguous()
            made[key] = nn.Parameter(now, old.requires_grad) if isinstance(old, nn.Parameter) else now
    resized: set[nn.Module] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            tensor = fetch(module, str(node.target))
            if id(tensor) in made:
                place(module, str(node.target), made[id(tensor)])
        layer = program.layer(node)
        if layer is None or layer in resized:
            continue
        new = resized_layer(graph, node, layer, kept, made)
        resized.add(new)
        if new is not layer:
            place(module, str(node.target), new)


def resized_layer(graph: ChannelGraph, node: Any, layer: Any, kept: Any, made: Mapping[int, Tensor]) -> Any:
    """A layer with its new tensors, whose options say what sizes these have; itself where nothing changes."""
    labels = graph.labels
    groups = labels.groups.get(str(node.target))
    axes = labels.axes(node)
    channels = axes[1] if isinstance(layer, (*BATCH_NORMS, nn.GroupNorm)) and len(axes) > 1 else None
    if isinstance(layer, INSTANCE_NORMS):
        channels = axes[len(axes) - 1 - int(type(layer).__name__[-2])]
    changes = any(id(tensor) in made for tensor in (*layer._parameters.values(), *layer._buffers.values()))
    if not changes and (channels is None or kept(channels).all()) and (groups is None or kept(groups).all()):
        return layer
    new: Any = shallow_copy(layer)
    for registry in (new._parameters, new._buffers):
        for name, tensor in registry.items():
            registry[name] = made.get(id(tensor), tensor)
    if groups is not None:
        setattr(new, "num_groups" if isinstance(layer, nn.GroupNorm) else "groups", int(kept(groups).sum()))
    if channels is not None:
        setattr(new, "num_channels" if isinstance(layer, nn.GroupNorm) else "num_features", int(kept(channels).sum()))
    if isinstance(layer, CONVOLUTIONS):
        new.out_channels, new.in_channels = new.weight.shape[0], new.weight.shape[1] * new.groups
    elif isinstance(layer, TRANSPOSED):
        new.in_channels, new.out_channels = new.weight.shape[0], new.weight.shape[1] * new.groups
    elif isinstance(layer, nn.Linear):
        new.out_features, new.in_features = new.weight.shape
    elif isinstance(layer, nn.PReLU):
        new.num_parameters = len(new.weight)
    elif isinstance(layer, nn.Embedding):
        new.embedding_dim = new.weight.shape[1]
    elif isinstance(layer, nn.RNNBase):
        new.input_size = new.weight_ih_l0.shape[1]
        new._init_flat_weights()
    return new
