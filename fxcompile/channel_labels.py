"""Labels for the channels of a network's values: channels with one label must go together.

Each axis of each value, and each axis of each stored tensor, either bears a label for each of its entries or is
*rigid* (None): its entries cannot go. Labels are numbers; what two operands of an addition, say, have in one place gets
tied, and what an operation cannot do without is fixed, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from fxcompile.program import Program, fetch, shape_of

Labels = NDArray[np.int64]
"""[size of the axis]: a label for each entry."""

Axes = tuple[Labels | None, ...]
"""For each axis of a tensor its labels; None where it is rigid."""

Value = Axes | list["Axes | None"] | None
"""Of a tensor, of a tuple of tensors, or of what is none."""

Kept = Callable[[Labels], NDArray[np.bool_]]
"""Which entries of an axis stay, by its labels."""

Resize = Callable[[Kept], tuple[tuple[Any, ...], dict[str, Any]]]
"""New arguments for a call whose sizes change, from what stays."""


class Role(Enum):
    """What entries of a stored tensor are to a channel: they make it, belong to it, or take it."""

    OUTPUT = "output"
    OWN = "own"
    INPUT = "input"


@dataclass(eq=False)
class Slot:
    """An axis of a stored tensor with an entry, or several, for each channel.

    Attributes:
        owner: the layer that holds the tensor, by its target; or the tensor's own target where none does.
        name: of the tensor in the layer; "" where there is no layer.
        tensor: as it is stored.
        labels: [tensor.shape[axis]].
        also: the owners of the same tensor elsewhere.
    """

    owner: str
    name: str
    tensor: Tensor
    axis: int
    labels: Labels
    role: Role
    also: list[tuple[str, Role]] = field(default_factory=list)

    @property
    def holders(self) -> list[tuple[str, Role]]:
        """All layers that hold the tensor, with what its entries are to the channels there."""
        return [(self.owner, self.role), *self.also]


class Labelling:
    """Labels of one program, as they are found in one walk over its graph.

    Attributes:
        values: what is known of each node's value.
        slots: by `id` of the tensor and the axis.
        groups: by the target of a layer, the labels of its groups, where these can go.
        resized: calls whose arguments depend on how many channels there are.
        orders: by the target of a stored order of channels, the labels that they are taken from, and which are taken.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[fx.Node, Value] = {}
        self.slots: dict[tuple[int, int], Slot] = {}
        self.groups: dict[str, Labels] = {}
        self.resized: dict[fx.Node, Resize] = {}
        self.orders: dict[str, tuple[Labels, Labels]] = {}
        self.count = 0
        self._ties: list[tuple[Labels, Labels]] = []
        self._fixed: list[tuple[Labels, str]] = []

    def fresh(self, size: int) -> Labels:
        """Labels that nothing has yet."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def tie(self, first: Labels, second: Labels) -> None:
        """What has a label of the one and what has the label of the other in the same place go together."""
        if first is not second:
            self._ties.append(tuple(map(np.ravel, np.broadcast_arrays(first, second))))  # type: ignore[arg-type]

    def tied_over(self, labels: Labels, axis: int) -> Labels:
        """The labels of a matrix tied along an axis, which is gone in what is returned."""
        first: Labels = np.take(labels, 0, axis)
        if labels.shape[axis] > 1:
            self.tie(np.expand_dims(first, axis), labels)
        return first

    def fix(self, labels: Labels | None, reason: str) -> None:
        """None of these can go."""
        if labels is not None and labels.size:
            self._fixed.append((labels.ravel(), reason))

    def fix_all(self, value: Value, reason: str) -> None:
        """No channel of a value, or of several, can go."""
        for item in value or ():
            if isinstance(item, np.ndarray):
                self.fix(item, reason)
            else:
                self.fix_all(item, reason)

    def together(self, axes: Iterable[tuple[Labels | None, int]], reason: str) -> Labels | None:
        """The labels of axes that are taken entry by entry, an axis of one for all entries of the others.

        Args:
            axes: labels and size of each.
            reason: why none can go where an axis is rigid.
        """
        whole = list(axes)
        size = max((size for _, size in whole), default=1)
        own = [labels for labels, count in whole if count == size]
        found = [labels for labels in own if labels is not None]
        for labels in found[1:]:
            self.tie(found[0], labels)
        if not found:
            return None
        if len(found) < len(own):
            self.fix(found[0], reason)
        return found[0]

    def slot(
        self, owner: str, name: str, axis: int, labels: Labels | None, role: Role, reason: str = "it is shared"
    ) -> Labels | None:
        """Enter labels of an axis of a stored tensor, which are tied to those that it has from elsewhere.

        Args:
            labels: None for an axis that is rigid here.

        Returns:
            The labels; None where the tensor is none.
        """
        held = fetch(self.program.module, f"{owner}.{name}" if name else owner)
        if held is None:
            return labels
        known = self.slots.get((id(held), axis))
        if labels is None:
            labels = self.fresh(held.shape[axis])
            self.fix(labels, reason)
        if known is None:
            self.slots[id(held), axis] = Slot(owner, name, held, axis, labels, role)
            return labels
        self.tie(known.labels, labels)
        if (known.owner, known.role) != (owner, role):
            known.also.append((owner, role))
        return known.labels

    def outputs(self, owner: str, name: str, axis: int, role: Role = Role.OUTPUT) -> Labels:
        """The labels of an axis of a stored tensor, new ones unless it has some."""
        held = fetch(self.program.module, f"{owner}.{name}" if name else owner)
        known = self.slots.get((id(held), axis))
        labels = self.fresh(held.shape[axis]) if known is None else known.labels
        entered = self.slot(owner, name, axis, labels, role)
        assert entered is not None
        return entered

    def roots(self) -> Labels:
        """[labels]: the least label of all that each label goes together with."""
        graph: nx.Graph[int] = nx.Graph()
        for first, second in self._ties:
            graph.add_edges_from(zip(first.tolist(), second.tolist(), strict=True))
        roots = np.arange(self.count, dtype=np.int64)
        for component in nx.connected_components(graph):
            members = list(component)
            roots[members] = min(members)
        return roots

    def reasons(self, roots: Labels) -> dict[int, str]:
        """By root, the first reason why it cannot go."""
        found: dict[int, str] = {}
        for labels, reason in self._fixed:
            for root in np.unique(roots[labels]).tolist():
                found.setdefault(root, reason)
        return found

    def axes(self, node: object) -> Axes:
        """What is known of a node's tensor; nothing of what is no node, or no tensor."""
        value = self.values.get(node) if isinstance(node, fx.Node) else ()
        if isinstance(value, tuple):
            return value
        return rigid(len(shape_of(node) or ())) if isinstance(node, fx.Node) else ()

    def layer(self, node: fx.Node) -> nn.Module | None:
        return self.program.layer(node)


def rigid(rank: int) -> Axes:
    """Axes none of which can be changed."""
    return (None,) * rank


def replaced(axes: Sequence[Labels | None], axis: int, labels: Labels | None) -> Axes:
    """The same axes but for one."""
    return (*axes[:axis], labels, *axes[axis + 1 :])
