"""How much each channel of a group matters, by what its weights, its norm or the data say: the least goes first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxcompile.channel_graph import Group, Member
from fxcompile.channel_labels import Role
from fxcompile.layers import BATCH_NORMS, TRANSPOSED
from fxcompile.planning import Planning
from fxcompile.program import Program, flatten_tensors

MOST_ENTRIES = 2**24
"""Numbers of a matrix of distances between filters that are in memory at once."""


def rows_of(member: Member) -> Tensor:
    """[units, numbers] float64: what each unit has of a stored tensor."""
    tensor = member.slot.tensor.detach().double().movedim(member.slot.axis, 0)
    found: Tensor = tensor[torch.from_numpy(member.places)].flatten(1)
    return found


def makers(group: Group) -> Iterator[Tensor]:
    """[units, numbers] for each layer that makes the channels: its filters, biases aside."""
    for member in group.of(Role.OUTPUT):
        if member.slot.tensor.dim() > 1:
            yield rows_of(member)


def mean_of(scores: Sequence[Tensor], size: int) -> Tensor:
    """[units]: the mean over layers, each relative to the mean of its own; all alike where there is no layer."""
    own = [item / item.mean().clamp_min(1e-300) for item in scores]
    return torch.stack(own).mean(0) if own else torch.ones(size, dtype=torch.float64)


def norm(group: Group, order: int) -> Tensor:
    """The norm of each filter (Li et al. 2017, for order 1)."""
    return mean_of([torch.linalg.vector_norm(rows, order, 1) for rows in makers(group)], len(group))


def geometric_median(group: Group) -> Tensor:
    """How far each filter is from all others, summed (He et al. 2019): what others can stand for goes first."""
    found = []
    for rows in makers(group):
        step = max(MOST_ENTRIES // max(len(rows), 1), 1)
        found.append(torch.cat([torch.cdist(part, rows).sum(1) for part in rows.split(step)]))
    return mean_of(found, len(group))


def norm_scale(program: Program, group: Group) -> Tensor | None:
    """The size of the scale that a batch norm gives each channel (Liu et al. 2017); None where none does."""
    scales = [
        rows_of(member).abs().mean(1)
        for member in group.of(Role.OWN)
        if member.slot.name == "weight" and isinstance(program.module.get_submodule(member.owner), BATCH_NORMS)
    ]
    return mean_of(scales, len(group)) if scales else None


def layer_adaptive(group: Group) -> Tensor:
    """The square of each filter's norm as a share of those that are no smaller (Lee et al. 2021), comparable between
    layers.
    """
    found = [share_of_larger(rows.square().sum(1)) for rows in makers(group)]
    return torch.stack(found).mean(0) if found else torch.ones(len(group), dtype=torch.float64)


def share_of_larger(squares: Tensor) -> Tensor:
    """[n], each as a share of the sum of those that are no smaller: the largest is 1."""
    values, order = squares.sort(stable=True)
    left = values.flip(0).cumsum(0).flip(0)
    return torch.empty_like(squares).index_copy_(0, order, values / left.clamp_min(1e-300))


Values = Callable[[fx.Node], list[Tensor]]
"""The values of a node over all batches."""


class Taken(NamedTuple):
    """A group's channels as a layer takes them: at its first call, as an axis of the input, counted from behind."""

    node: fx.Node
    group: Group
    member: Member
    axis: int


def taken(program: Program, groups: Sequence[Group]) -> list[Taken]:
    """Each layer that takes channels of a group, in the order of the graph."""
    wanted: dict[str, list[tuple[Group, Member]]] = {}
    for group in groups:
        for member in group.of(Role.INPUT):
            wanted.setdefault(member.owner, []).append((group, member))
    found: list[Taken] = []
    for node in program.graph.nodes:
        for group, member in wanted.pop(str(node.target), ()):
            layer: Any = program.layer(node)
            found.append(Taken(node, group, member, -1 - len(getattr(layer, "kernel_size", ()))))
    return found


def entries(member: Member, layer: Any) -> Tensor:
    """[units, n]: a unit's channels in the input of a layer that takes them: of all groups."""
    places = torch.from_numpy(member.places)
    groups = getattr(layer, "groups", 1)
    if groups == 1 or isinstance(layer, TRANSPOSED):
        return places
    each = layer.in_channels // groups
    return torch.cat([places + group * each for group in range(groups)], 1)


def activity(planning: Planning, groups: Sequence[Group]) -> dict[str, Tensor]:
    """The mean size of each channel where it is taken, on the data (Polyak and Wolf 2015; Hu et al. 2016)."""
    walk, program = planning.walk(), planning.program
    wanted = taken(program, groups)
    found: dict[str, list[Tensor]] = {}
    for index, (node, group, member, axis) in enumerate(wanted):
        planning.progress("prune-filters: activations", index, len(wanted))
        xs = walk.values_of(node.all_input_nodes[0])
        sums = torch.stack([x.double().abs().movedim(axis, 0).flatten(1).mean(1) * len(x) for x in xs]).sum(0)
        means = sums / sum(map(len, xs))
        found.setdefault(group.name, []).append(means[entries(member, program.layer(node))].mean(1))
    return {name: mean_of(scores, len(scores[0])) for name, scores in found.items()}


class _Watching(fx.Interpreter):
    """Runs a graph and keeps what some nodes take, with gradients."""

    def __init__(self, program: Program, nodes: set[fx.Node]) -> None:
        super().__init__(program.module)
        self.nodes = nodes
        self.seen: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes and isinstance(value, Tensor):
            if not value.requires_grad:
                value = value.detach().requires_grad_()
            value.retain_grad()
            self.seen[n] = value
        return value


def taylor(planning: Planning, groups: Sequence[Group]) -> dict[str, Tensor]:
    """The square of what the loss would change without each channel, to first order: (activation x gradient summed over
    its map)^2, over the data (Molchanov et al. 2017).

    The loss needs no labels: the cross entropy of the scores against the class that is drawn from them, whose squared
    gradients are the Fisher information; of outputs that are no scores, what they are in a random direction.
    """
    program = planning.program
    wanted = taken(program, groups)
    where = {item.node.all_input_nodes[0] for item in wanted}
    found: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(planning.seed)
    for number, batch in enumerate(planning.batches):
        planning.progress("prune-filters: gradients", number, len(planning.batches))
        watching = _Watching(program, where)
        with torch.enable_grad():
            outputs = watching.run(*batch, enable_io_processing=False)
            loss = drawn_loss(outputs, generator)
            if loss is None:
                continue
            kept = list(watching.seen)
            gradients = torch.autograd.grad(loss, [watching.seen[node] for node in kept], allow_unused=True)
        slopes = dict(zip(kept, gradients, strict=True))
        for node, group, member, axis in wanted:
            source = node.all_input_nodes[0]
            slope = slopes.get(source)
            if slope is None:
                continue
            product = (watching.seen[source].detach() * slope).double().movedim(axis, 1)
            each = product.flatten(2).sum(2) if product.dim() > 2 else product
            units = each[:, entries(member, program.layer(node))].sum(2).square().sum(0)
            found[group.name] = found.get(group.name, torch.zeros(len(group), dtype=torch.float64)) + units
    return found


def drawn_loss(outputs: Any, generator: torch.Generator) -> Tensor | None:
    """A loss of outputs whose squared gradients say how much they change."""
    total: Tensor | None = None
    for item in flatten_tensors(outputs):
        if not item.is_floating_point() or not item.requires_grad:
            continue
        if item.dim() == 2 and item.shape[1] > 1:
            chosen = torch.multinomial(item.detach().double().softmax(1), 1, generator=generator).squeeze(1)
            part = F.cross_entropy(item, chosen, reduction="sum")
        else:
            scale = 1 / math.sqrt(max(item[0].numel(), 1)) if item.dim() else 1.0
            part = (torch.randn(item.shape, generator=generator).to(item) * item).sum() * scale
        total = part if total is None else total + part
    return total
