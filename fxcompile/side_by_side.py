"""A compiled program beside its original, layer by layer: what each one breaks itself, inherits, and costs at the end.

A layer is a node of the original and the node that computes it now (`FEATURE`). Between layers, either program's part
can be taken out and run on the other's values. So what a layer makes of it is measured in four ways:

    error    its value against the original's: what it inherits and what it adds
    own      the compiled layer on the original's inputs, against the original layer: what it adds
    alone    the error of the outputs with this one layer as compiled, and all else the original's
    mended   the error of the outputs with this one layer as in the original, and all else as compiled
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxcompile.distance import Distance
from fxcompile.labels import describe_node, node_name
from fxcompile.program import FEATURE, Program, dtype_of, fetch, shape_of
from fxcompile.progress import Progress
from fxcompile.regions import region_inputs, run_region
from fxcompile.rewriting import Site
from fxcompile.walking import Walk
from fxcompile.yardstick import Yardstick

OWN_ROUNDING = 16.0
"""How many units of rounding a layer's own error must exceed to be followed to the outputs."""

Removed = Mapping[str, str]
"""Nodes of the original that nothing computes any more, with the node whose value now stands in for theirs."""


@dataclass
class LayerError:
    """One layer, by the names of the original model; see the module for the four errors.

    Attributes:
        name: the layer, or the node where a function computes it.
        kind: what it was in the original.
        error, own, alone, mended: relative L2 errors, of the worst output for the last two. `own` is None where the
            layer has no counterpart to be taken out; `alone` and `mended` are None where its own error is rounding.
        inherited: the largest `error` among the layers that it takes its inputs from.
        by: what rewrote it: a pass's name and the site's, in order.
    """

    name: str
    kind: str
    error: float
    own: float | None = None
    alone: float | None = None
    mended: float | None = None
    inherited: float = 0.0
    by: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """What a donor computes in the place of one node of a host: run on the host's values.

    Attributes:
        inputs: a node of the host for each value that the part takes, or the value itself.
        site: the donor's nodes; None where the part is nothing and the first input is the result.
    """

    inputs: tuple[fx.Node | Any, ...]
    site: Site | None

    def sources(self) -> list[fx.Node]:
        """The nodes of the host that it takes."""
        return [item for item in self.inputs if isinstance(item, fx.Node)]

    def run(self, value_of: Callable[[fx.Node], Any]) -> Tensor:
        """The value that it gives in the host's place."""
        values = [value_of(item) if isinstance(item, fx.Node) else item for item in self.inputs]
        if self.site is None:
            value: Tensor = values[0]
            return value
        with torch.no_grad():
            return run_region(self.site, values)


class SideBySide:
    """The original and the compiled program, node for node.

    Args:
        removed: nodes of the original that were replaced by nothing, with the node before them.
    """

    def __init__(self, original: Program, compiled: Program, removed: Removed) -> None:
        self.original, self.compiled = original, compiled
        named = {node.name: node for node in original.graph.nodes}
        self.ours: dict[fx.Node, fx.Node] = {}
        for node in compiled.graph.nodes:
            theirs = named.get(node.meta.get(FEATURE, ""))
            if theirs is not None and node.op not in ("get_attr", "output") and _alike(node, theirs):
                self.ours[theirs] = node
        self.theirs: dict[fx.Node, list[fx.Node]] = {node: [theirs] for theirs, node in self.ours.items()}
        for name in removed:
            stand_in = name
            while stand_in in removed:
                stand_in = removed[stand_in]
            now = self.ours.get(named.get(stand_in))  # type: ignore[arg-type]
            if name in named and now is not None and _alike(now, named[name]):
                self.ours[named[name]] = now
                self.theirs[now].append(named[name])

    def nodes(self) -> list[fx.Node]:
        """The original's nodes that have a counterpart, in the order of the data; no inputs."""
        return [node for node in self.original.graph.nodes if node in self.ours and node.op != "placeholder"]

    def compiled_part(self, node: fx.Node) -> Part | None:
        """What the compiled program computes for a node of the original, taking the original's values."""
        now = self.ours[node]
        if self.theirs[now][0] is not node:  # it was replaced by nothing
            return Part((self.theirs[now][0],), None)
        nodes = _back(now, self.theirs)
        inputs: list[Any] = []
        for item in region_inputs(nodes):
            if item.op == "get_attr":
                inputs.append(fetch(self.compiled.module, str(item.target)))
                continue
            source = self._meant(node, self.theirs[item])
            if source is None or not source < node:
                return None
            inputs.append(source)
        return Part(tuple(inputs), Site.of(self.compiled, *nodes))

    def original_part(self, node: fx.Node) -> Part | None:
        """What the original computes for one of its nodes, taking the compiled program's values."""
        now = self.ours[node]
        if self.theirs[now] != [node]:
            return None
        nodes = _back(node, self.ours)
        inputs: list[Any] = []
        for item in region_inputs(nodes):
            if item.op != "get_attr" and not self.ours[item] < now:
                return None
            constant = item.op == "get_attr"
            inputs.append(fetch(self.original.module, str(item.target)) if constant else self.ours[item])
        return Part(tuple(inputs), Site.of(self.original, *nodes))

    def _meant(self, node: fx.Node, candidates: Sequence[fx.Node]) -> fx.Node | None:
        """Of several nodes of the original for which one value stands now, the one that a node takes."""
        if len(candidates) == 1:
            return candidates[0]
        found, waiting, seen = set(), [node], {node}
        while waiting:
            for item in waiting.pop().all_input_nodes:
                if item in candidates:
                    found.add(item)
                elif item not in seen:
                    seen.add(item)
                    waiting.append(item)
        return found.pop() if len(found) == 1 else None


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes compute one tensor each, of one shape and dtype."""
    return shape_of(a) is not None and shape_of(a) == shape_of(b) and dtype_of(a) == dtype_of(b)


def _back(node: fx.Node, known: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """A node and all before it back to known ones, inputs and constants, in the order of the graph."""
    found, waiting = {node}, [node]
    while waiting:
        for item in waiting.pop().all_input_nodes:
            if item not in known and item not in found and item.op not in ("placeholder", "get_attr"):
                found.add(item)
                waiting.append(item)
    return sorted(found)


class _Lent:
    """A walk whose values are kept as long as somebody still wants them."""

    def __init__(self, walk: Walk, wanted: Iterable[fx.Node]) -> None:
        self.walk = walk
        self.left = Counter(wanted)
        walk.wanted.update(self.left)

    def value(self, node: fx.Node) -> Any:
        return self.walk.values_of(node)[0]

    def give_back(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            self.left[node] -= 1
            if not self.left[node]:
                self.walk.take(node)


def layer_errors(pair: SideBySide, yard: Yardstick, progress: Progress) -> dict[fx.Node, LayerError]:
    """All layers that can be compared, in the order of the data, by their nodes in the original.

    One forward pass of either program, and for each layer with an error of its own two times the rest of the network.
    """
    nodes = pair.nodes()
    parts = {node: part for node in nodes if (part := pair.compiled_part(node)) is not None}
    errors = {node: Distance() for node in nodes}
    own = {node: Distance() for node in parts}
    alone: dict[fx.Node, _Ends] = {}
    floor = OWN_ROUNDING * torch.finfo(pair.original.dtype).eps
    for index, batch in enumerate(yard.batches):
        theirs = _Lent(
            Walk(pair.original, [batch]), [*nodes, *(item for part in parts.values() for item in part.sources())]
        )
        ours = _Lent(Walk(pair.compiled, [batch]), [pair.ours[node] for node in nodes])
        for count, node in enumerate(nodes):
            progress("comparing layers", index * len(nodes) + count, 2 * len(nodes) * len(yard.batches))
            value = theirs.value(node)
            errors[node].add(ours.value(pair.ours[node]), value)
            if node in parts:
                given = parts[node].run(theirs.value)
                here = Distance()
                here.add(given, value)
                own[node].join(here)
                if not here.value <= floor:
                    alone.setdefault(node, _Ends(yard)).add(index, theirs.walk.fork(node, [given]).outputs()[0])
                theirs.give_back(parts[node].sources())
            theirs.give_back([node])
            ours.give_back([pair.ours[node]])
    mended = _mended(pair, yard, list(alone), progress)
    made: dict[fx.Node, LayerError] = {}
    for node in nodes:
        row = made[node] = LayerError(
            name=node_name(node),
            kind=describe_node(pair.original, node),
            error=errors[node].value,
            own=own[node].value if node in own else None,
            alone=alone[node].value if node in alone else None,
            mended=mended[node].value if node in mended else None,
        )
        before_it = parts[node].sources() if node in parts else node.all_input_nodes
        row.inherited = max((made[item].error for item in before_it if item in made), default=0.0)
    return made


def _mended(pair: SideBySide, yard: Yardstick, nodes: Sequence[fx.Node], progress: Progress) -> dict[fx.Node, _Ends]:
    """The outputs of the compiled program with one of these layers as it was, for each of them."""
    parts = {pair.ours[node]: (node, part) for node in nodes if (part := pair.original_part(node)) is not None}
    ends = {node: _Ends(yard) for node, _ in parts.values()}
    hosts = [node for node in pair.compiled.graph.nodes if node in parts]
    for index, batch in enumerate(yard.batches):
        walk = _Lent(
            Walk(pair.compiled, [batch]), [*hosts, *(item for _, part in parts.values() for item in part.sources())]
        )
        for count, host in enumerate(hosts):
            progress(
                "mending layers", (len(yard.batches) + index) * len(hosts) + count, 2 * len(hosts) * len(yard.batches)
            )
            node, part = parts[host]
            walk.value(host)
            ends[node].add(index, walk.walk.fork(host, [part.run(walk.value)]).outputs()[0])
            walk.give_back([*part.sources(), host])
    return ends


class _Ends:
    """How far the outputs of a changed program are from the original's; a batch that is not added had no difference."""

    def __init__(self, yard: Yardstick) -> None:
        self.yard = yard
        self.added: set[int] = set()
        self.distances = [Distance() for _ in yard.program.output_names]

    def add(self, index: int, outputs: tuple[Tensor, ...]) -> None:
        self.added.add(index)
        for distance, given, wanted in zip(self.distances, outputs, self.yard.outputs[index], strict=True):
            distance.add(given, wanted)

    @property
    def value(self) -> float:
        """The worst output's error."""
        for index in range(len(self.yard.outputs)):
            if index not in self.added:
                self.add(index, self.yard.outputs[index])
        return max((distance.value for distance in self.distances), default=0.0)
