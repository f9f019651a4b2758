"""Which channels of a network go together, and whether they can go.

A channel of one layer may have to go with channels of others: of the layers that its output is added to, of a
depthwise convolution behind it, of what takes it beside others in a concatenation. All that goes together is a *unit*;
units that the same layers make and take, whose channels could change places, are a *group*. Removing a unit takes rows
out of the layers that make it, entries out of the norms it passes and columns out of the layers that take it, and
leaves every other number of the network as it is: the outputs are what they would be if all those were zero.

Built in one walk over the graph, in time that grows with the number of its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from fxcompile.channel_calls import unknown
from fxcompile.channel_functions import FUNCTIONS
from fxcompile.channel_labels import Labelling, Labels, Role, Slot, Value, rigid
from fxcompile.channel_layers import LAYERS
from fxcompile.layers import BATCH_NORMS, INSTANCE_NORMS
from fxcompile.program import Program, dtype_of, fetch, output_node, shape_of


@dataclass(frozen=True, eq=False)
class Member:
    """An axis of a stored tensor, and where the units of a group lie on it.

    Attributes:
        places: [units, n], the entries of each unit.
    """

    slot: Slot
    places: NDArray[np.int64]

    @property
    def owner(self) -> str:
        """The layer that holds the tensor, by its target."""
        return self.slot.owner

    @property
    def role(self) -> Role:
        """Whether the entries make a channel, belong to it, or take it."""
        return self.slot.role


@dataclass(frozen=True, eq=False)
class Group:
    """Units that the same layers make and take.

    Attributes:
        name: of the first layer that makes them; where it makes several groups, with the place of this one.
        roots: [units], the label of each.
        members: all axes of stored tensors that they lie on, in the order of the graph.
        reason: why none of them can go, or "".
    """

    name: str
    roots: Labels
    members: tuple[Member, ...]
    reason: str = ""

    def __len__(self) -> int:
        return len(self.roots)

    def of(self, role: Role) -> list[Member]:
        """The members of a role."""
        return [member for member in self.members if member.role is role]

    def __str__(self) -> str:
        """`conv1: 64 channels of conv1, layer1.0.conv2; taken by layer1.0.conv1`; and why none can go."""

        def owners(role: Role) -> str:
            return ", ".join(dict.fromkeys(member.owner for member in self.of(role)))

        each = f" in units of {self.channels}" if self.channels > 1 else ""
        text = f"{self.name}: {len(self) * self.channels} channels{each} of {owners(Role.OUTPUT)}"
        if owners(Role.OWN):
            text += f"; with {owners(Role.OWN)}"
        text += f"; taken by {owners(Role.INPUT) or 'no layer'}"
        return f"{text}; none can go: {self.reason}" if self.reason else text

    @property
    def channels(self) -> int:
        """How many channels of the first layer a unit has."""
        return int(self.members[0].places.shape[1])

    @property
    def holders(self) -> list[tuple[str, Role]]:
        """The layers that they lie in, with what they are there, in the order of the graph."""
        return [holder for member in self.members for holder in member.slot.holders]

    @property
    def taken(self) -> bool:
        """Whether a layer takes them."""
        return any(role is Role.INPUT for _, role in self.holders)


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """What goes together in a program.

    Attributes:
        labels: of all axes of values and stored tensors.
        roots: [labels], by label that of its unit.
        groups: what layers make and take, in the order of the layers that make it, what cannot go with the reason.
        untaken: what layers make and none takes, where it can go: it is dropped, or multiplied with what goes with it.
    """

    program: Program
    labels: Labelling = field(repr=False)
    roots: Labels = field(repr=False)
    groups: tuple[Group, ...]
    untaken: tuple[Group, ...] = ()

    @classmethod
    def of(cls, program: Program) -> ChannelGraph:
        """The channel graph of a program."""
        labels = Labelling(program)
        for node in program.graph.nodes:
            labels.values[node] = value_of(labels, node)
        for node in output_node(program.graph).all_input_nodes:
            labels.fix_all(labels.values[node], "they are an output of the model")
        roots = labels.roots()
        found = groups_of(labels, roots)
        taken, untaken = (tuple(group for group in found if group.taken is wanted) for wanted in (True, False))
        return cls(program, labels, roots, taken, untaken)

    @property
    def all(self) -> tuple[Group, ...]:
        """All groups, those first that layers take."""
        return self.groups + self.untaken

    @cached_property
    def _group_of(self) -> dict[int, tuple[Group, int]]:
        return {int(root): (group, index) for group in self.all for index, root in enumerate(group.roots)}

    def unit(self, node: fx.Node, channel: int, axis: int = 1) -> tuple[Group, int] | None:
        """The group of what goes with a channel of a node's value, and its number there; None where no layer makes it,
        or none takes it and it cannot go.

        Args:
            axis: of the channels.
        """
        labels = self.labels.axes(node)[axis]
        return None if labels is None else self._group_of.get(int(self.roots[labels[channel]]))

    def __str__(self) -> str:
        """Each group on a line."""
        return "\n".join(map(str, self.all))

    def layers(self, group: Group) -> list[str]:
        """The layers that hold entries for a group's channels, and norms without any, which only count them."""
        names = {owner for owner, _ in group.holders}
        own = np.isin(self.roots, group.roots)
        for node in self.program.graph.nodes:
            layer = self.program.layer(node)
            counts = isinstance(layer, (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm)) and not layer.state_dict()
            if counts and any(labels is not None and own[labels].any() for labels in self.labels.axes(node)):
                names.add(str(node.target))
        return sorted(names)

    def group(self, name: str) -> Group:
        """The group of a name.

        Raises:
            KeyError: there is none.
        """
        found = [group for group in self.all if group.name == name]
        if not found:
            raise KeyError(name)
        return found[0]


def value_of(labels: Labelling, node: fx.Node) -> Value:
    """What is known of a node's value, from what is known of its operands."""
    if node.op == "placeholder":
        return rigid(len(shape_of(node) or ()))
    if node.op == "get_attr":
        return constant(labels, node)
    if node.op == "output":
        return None
    if node.op == "call_module":
        layer = labels.layer(node)
        rule = LAYERS.get(type(layer)) if layer is not None else None
        first = node.args[0] if node.args else None
        if rule is None or not isinstance(first, fx.Node) or shape_of(first) is None:
            return unknown(labels, node)
        return rule(labels, node, layer, labels.axes(first))
    function = FUNCTIONS.get(node.target)
    return unknown(labels, node) if function is None else function(labels, node)


def constant(labels: Labelling, node: fx.Node) -> Value:
    """A stored tensor: entries of each axis may go, if what it meets lets them."""
    target = str(node.target)
    held = fetch(labels.program.module, target)
    dtype = dtype_of(node)
    if dtype is None or not dtype.is_floating_point:
        return rigid(len(shape_of(node) or ()))
    return tuple(
        labels.outputs(target, "", axis, Role.OWN) if size > 1 else None for axis, size in enumerate(held.shape)
    )


def groups_of(labels: Labelling, roots: Labels) -> list[Group]:
    """The units that some layer makes, and some layer takes or none needs, by what they have in common."""
    slots = list(labels.slots.values())
    print_of, made, taken = (np.zeros(len(roots), dtype=np.uint64) for _ in range(3))
    generator = np.random.default_rng(0)
    for slot, mark in zip(slots, generator.integers(1, 2**63, len(slots), dtype=np.uint64), strict=True):
        own = roots[slot.labels]
        np.add.at(print_of, own, mark)  # what a unit has in common with others, as one number
        roles = {slot.role, *(role for _, role in slot.also)}
        for role, marks in ((Role.OUTPUT, made), (Role.INPUT, taken)):
            if role in roles:
                marks[own] = 1
    reasons = labels.reasons(roots)
    needed = np.zeros(len(roots), dtype=bool)
    needed[list(reasons)] = True
    chosen = np.flatnonzero((made > 0) & ((taken > 0) | ~needed))
    fixed = {root: number for number, root in enumerate(sorted(reasons))}
    alike: dict[tuple[int, bool], list[int]] = {}
    for root in chosen.tolist():
        alike.setdefault((int(print_of[root]), root in fixed), []).append(root)
    units_of = [np.array(members, dtype=np.int64) for members in alike.values()]
    number, rank = (np.full(len(roots), -1, dtype=np.int64) for _ in range(2))
    for index, members in enumerate(units_of):
        number[members], rank[members] = index, np.arange(len(members))
    lying: list[list[Member]] = [[] for _ in units_of]
    for slot in slots:
        own = roots[slot.labels]
        places = np.flatnonzero(number[own] >= 0)
        order = places[np.lexsort((rank[own[places]], number[own[places]]))]  # by group, then by unit
        for part in np.split(order, np.flatnonzero(np.diff(number[own[order]])) + 1):
            if len(part):
                index = number[own[part[0]]]
                lying[index].append(Member(slot, part.reshape(len(units_of[index]), -1)))
    groups = []
    for units, axes in zip(units_of, lying, strict=True):
        first = next(member for member in axes if member.role is Role.OUTPUT)
        ordered = (first, *(member for member in axes if member is not first))
        groups.append(Group(first.owner, units, ordered, reasons.get(int(units[0]), "")))
    return named(groups, slots)


def named(groups: Sequence[Group], slots: Sequence[Slot]) -> list[Group]:
    """In the order of their first layers, with names of their own."""
    numbers = {id(slot): number for number, slot in enumerate(slots)}
    ordered = sorted(groups, key=lambda group: (numbers[id(group.members[0].slot)], int(group.members[0].places[0, 0])))
    counts: dict[str, int] = {}
    for group in ordered:
        counts[group.name] = counts.get(group.name, 0) + 1
    result = []
    for group in ordered:
        name = group.name
        if counts[name] > 1:
            name = f"{name}:{int(group.members[0].places.min())}"
        result.append(Group(name, group.roots, group.members, group.reason))
    return result
