"""Removes filters whose output is known before any input is seen, and such as nothing uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from fxcompile.channel_graph import ChannelGraph
from fxcompile.contracts import Exact
from fxcompile.program import Program
from fxcompile.rewriting import ChannelPass, GroupSite, Removal, Site, Skip

from ._dead_channels import removals


@dataclass(frozen=True)
class DeadSite(GroupSite):
    """A group with what goes there."""

    removal: Removal = field(kw_only=True)


class RemoveDeadChannels(ChannelPass):
    """conv[O, C, ...] -> norm, activation -> conv[P, O, ...]  =>  conv[o, C, ...] -> the same -> conv[P, o, ...]

    without the channels that hold the same number whatever the input (filters of zeros, norms without a scale, what
    activations make of these), and those that no layer has a weight for. Like `prune-filters`, it takes with them all
    that must go with them, and leaves those where that is still needed.

    A constant c gives W c, summed over all taps, to the bias of a layer that takes it. Behind zero padding that would
    be wrong at the border, where some taps see zeros: there one such channel stays, i, and its column becomes
    W_i + sum_j (c_j / c_i) W_j. Channels that are zero just go. What goes may leave other channels without use, so that
    the pass looks again until it finds nothing.
    """

    name: ClassVar = "remove-dead-channels"
    contract: ClassVar = Exact()
    idempotent: ClassVar = True
    until_done: ClassVar = True

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Each group of which some channels go; with reasons, those with dead channels that stay."""
        graph = ChannelGraph.of(program)
        for group, found in removals(graph):
            if isinstance(found, str):
                yield Skip(group.name, found)
            else:
                site = GroupSite.of_group(program, group)
                yield DeadSite(site.nodes, site.layers, site.name, group=group, removal=found)

    def removal(self, site: GroupSite) -> Removal:
        """What was found to go."""
        assert isinstance(site, DeadSite)
        return site.removal
