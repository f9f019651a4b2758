"""Which channels a network can do without, and what the layers that take them add to their weights and biases then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from fxcompile.channel_graph import ChannelGraph, Group
from fxcompile.channel_labels import Labels
from fxcompile.labels import dtype_name
from fxcompile.layers import TRANSPOSED, is_finite
from fxcompile.rewriting import Removal

from ._constants import constants
from ._known import columns, has_border, per_channel
from .fold_batchnorm import LINEAR, channel_axis, in_channels

LEAST = 1e-3
"""A constant that takes others' place is no smaller than this share of any of them."""

PRODUCTS = (torch.matmul, torch.einsum, F.scaled_dot_product_attention)
"""Functions that may sum over channels, as layers do that take them."""


@dataclass(frozen=True, eq=False)
class Taker:
    """A layer that takes channels of its input.

    Attributes:
        target: of the layer.
        units: [C], by channel the label of its unit, or -1.
        given: [C], by channel the constant that it holds at every call; 0 where the layer has no weight for it.
        held: [C], the same, but NaN where it is not constant, weight or none.
        groups: of a convolution.
        folds: whether constants may go into the layer's bias: all its outputs see all taps, nothing else has the bias.
        merges: whether its weight may change: no other layer has it.
    """

    target: str
    layer: Any
    units: Labels
    given: NDArray[np.float64]
    held: NDArray[np.float64]
    groups: int
    folds: bool
    merges: bool

    def at(self, number: NDArray[np.int64]) -> NDArray[np.int64]:
        """[C], by channel the number of its unit in a group, or -1, from what that is for each label."""
        return np.where(self.units >= 0, number[self.units], -1)

    def holds(self, path: str, change: Tensor) -> bool:
        """Whether a tensor of the layer can take a change in its dtype."""
        held = getattr(self.layer, path.rpartition(".")[2])
        whole = change if held is None else held.detach().double() + change
        return is_finite(whole.to(self.layer.weight.dtype))

    def sizes(self, values: NDArray[np.float64], own: NDArray[np.int64], count: int) -> NDArray[np.float64]:
        """[units, g]: the largest of the values of each unit's channels in each group of the convolution."""
        found = np.zeros((count, self.groups))
        channels = np.flatnonzero(own >= 0)
        places = channels // (len(own) // self.groups)
        np.maximum.at(found, (own[channels], places), np.abs(np.nan_to_num(values[channels])))
        return found


def takers(graph: ChannelGraph, known: Mapping[fx.Node, Any]) -> list[Taker]:
    """All layers that take channels, with what these are known to hold."""
    program, tied = graph.program, graph.program.tied()
    found: dict[int, Taker] = {}
    for node in program.graph.nodes:
        layer: Any = program.layer(node)
        if type(layer) in LINEAR:
            axis, count = channel_axis(layer, node.args[0]), in_channels(layer)
            groups = getattr(layer, "groups", 1)
            if groups > max(count // groups, 1):
                continue  # each goes with what it gives
            reads = (columns(layer) != 0).any(-1).any(1).flatten().numpy()
            shared = [layer.bias is not None and len(tied[id(layer.bias)]) > 1, len(tied[id(layer.weight)]) > 1]
        elif isinstance(layer, nn.RNNBase):
            axis, count, groups, shared = -1, layer.input_size, 1, [True, True]
            names = [f"weight_ih_l0{suffix}" for suffix in ("", "_reverse")[: 1 + layer.bidirectional]]
            reads = torch.cat([getattr(layer, name).detach() for name in names]).ne(0).any(0).numpy()
        else:
            continue
        labels = graph.labels.axes(node.args[0])[axis]
        units = np.full(count, -1) if labels is None else graph.roots[labels]
        held = per_channel(known[node.args[0]], axis, count).numpy()
        before = found.get(id(layer))
        if before is not None:  # at each call the same, or it is none
            held = np.where(before.held == held, held, np.nan)
            units = np.where(before.units == units, units, -1)
        given = np.where(reads, held, 0.0)
        folds = not shared[0] and type(layer) in LINEAR and not has_border(layer)
        found[id(layer)] = Taker(str(node.target), layer, units, given, held, groups, folds, not shared[1])
    return list(found.values())


def dead(graph: ChannelGraph, known: Mapping[fx.Node, Any], taking: Sequence[Taker]) -> NDArray[np.bool_]:
    """[labels]: of which units each layer that takes them knows what they hold, or has no weight for them."""
    alive = np.zeros(len(graph.roots), dtype=bool)
    for taker in taking:
        alive[taker.units[(taker.units >= 0) & np.isnan(taker.given)]] = True
    alive[multiplied(graph, known)] = True
    return ~alive


def multiplied(graph: ChannelGraph, known: Mapping[fx.Node, Any]) -> list[int]:
    """The units that are summed over in products of two values, or may be, and are zero in neither."""
    found: set[int] = set()
    for node in graph.program.graph.nodes:
        if node.op != "call_function" or node.target not in PRODUCTS:
            continue
        met: set[int] = set()
        zero: set[int] = set()
        for operand in node.all_input_nodes:
            for axis, labels in enumerate(graph.labels.axes(operand)):
                if labels is not None:
                    own = graph.roots[labels]
                    nothing = per_channel(known[operand], axis, len(own)).numpy() == 0
                    met.update(own.tolist())
                    zero.update(set(own[nothing].tolist()) - set(own[~nothing].tolist()))
        found |= met - zero
    return sorted(found)


def removals(graph: ChannelGraph) -> Iterator[tuple[Group, Removal | str]]:
    """For each group with dead units, those that go, or why none does."""
    known = constants(graph.program)
    taking = takers(graph, known)
    gone = dead(graph, known, taking)
    for group in graph.all:
        units = np.flatnonzero(gone[group.roots])
        if not len(units):
            continue
        if group.reason:
            yield group, group.reason
        elif len(group) < 2:
            yield group, "no other channel would be left"
        else:
            yield group, removal(graph, group, units, taking)


def removal(graph: ChannelGraph, group: Group, units: NDArray[np.int64], taking: Sequence[Taker]) -> Removal | str:
    """Which of a group's dead units go, or why none does.

    Those go freely that are zero where zeros pad a map: they add to biases. Of the others, one stays for all.
    """
    number = np.full(len(graph.roots), -1)
    number[group.roots] = np.arange(len(group))
    taking = [taker for taker in taking if (taker.at(number) >= 0).any()]
    stuck = [taker for taker in taking if not taker.folds]
    none = np.zeros((len(group), 0))
    needs = np.concatenate([none, *(taker.sizes(taker.given, taker.at(number), len(group)) for taker in stuck)], 1)
    gives = np.concatenate(
        [none, *(taker.sizes(taker.held, taker.at(number), len(group)) * taker.merges for taker in stuck)], 1
    )
    free = [int(unit) for unit in units if not needs[unit].any()]
    heirs = inherit([int(unit) for unit in units if needs[unit].any()], needs, gives)
    if len(free) + len(heirs) == len(group):
        free = free[1:]
    if not free and not heirs:
        one = len(units) == 1
        return f"{'it is' if one else 'they are'} not constant where zeros pad {'it' if one else 'them'}"
    gone = sorted([*free, *heirs])
    changes: dict[str, Tensor] = {}
    for taker in taking:
        own = changed(taker, taker.at(number), set(gone), heirs)
        if not all(taker.holds(path, change) for path, change in own.items()):
            return f"'{taker.target}' would have a number that {dtype_name(taker.layer.weight.dtype)} cannot hold"
        changes |= own
    return Removal(tuple(gone), changes)


def inherit(units: Sequence[int], needs: NDArray[np.float64], gives: NDArray[np.float64]) -> dict[int, int]:
    """By unit that goes, the one that stays for it: as few as can be stay.

    Args:
        needs: [units, places], how large a constant is where it cannot go into a bias.
        gives: [units, places], how large it is where another may go into its weights.
    """
    heirs: dict[int, int] = {}
    left = list(units)
    while left:
        takes = {
            one: [
                other
                for other in left
                if other != one and ((gives[one] >= LEAST * needs[other]) | (needs[other] == 0)).all()
            ]
            for one in left
        }
        best = max(left, key=lambda one: (len(takes[one]), gives[one].min(initial=np.inf, where=needs[left].any(0))))
        if not takes[best]:
            break
        heirs |= dict.fromkeys(takes[best], best)
        left = [one for one in left if one != best and one not in takes[best]]
    return heirs


def changed(taker: Taker, own: NDArray[np.int64], gone: set[int], heirs: dict[int, int]) -> dict[str, Tensor]:
    """By path what a layer's tensors get: W c summed over all taps for its bias; or (c_j / c_i) W_j for the column W_i
    of the constant that stays.

    Args:
        own: [C], by channel the number of its unit.
    """
    channels = [int(channel) for channel in np.flatnonzero(own >= 0) if own[channel] in gone and taker.given[channel]]
    if not channels:
        return {}
    weight = columns(taker.layer).double()  # [g, O/g, I/g, taps]
    if taker.folds:
        given = torch.zeros(len(own), dtype=torch.float64)
        given[channels] = torch.from_numpy(taker.given[channels])
        added = (weight.sum(-1) * given.reshape(len(weight), 1, -1)).sum(-1).flatten()
        return {f"{taker.target}.bias": added}
    change = torch.zeros_like(weight)
    width = weight.shape[2]
    for channel in channels:
        place, column = divmod(channel, width)
        staying = np.arange(place * width, (place + 1) * width)
        staying = staying[own[staying] == heirs[int(own[channel])]]
        heir = int(staying[np.argmax(np.abs(np.nan_to_num(taker.held[staying])))])
        change[place, :, heir % width] += taker.given[channel] / taker.held[heir] * weight[place, :, column]
    if isinstance(taker.layer, TRANSPOSED):
        change = change.transpose(1, 2)
    return {f"{taker.target}.weight": change.flatten(0, 1).reshape(taker.layer.weight.shape)}
