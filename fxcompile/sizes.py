"""Spells in one way what depends on the sizes of the inputs: numbers where they are fixed, the batch as one node.

Models ask for sizes all over forward (`b, c, h, w = x.shape`), and `torch.export` writes most of them out as numbers.
Running the graph on shapes for a larger batch and for larger maps tells which sizes are fixed by the layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompile.functional import is_plain
from fxcompile.program import ORIGIN, fetch, record_shape
from fxcompile.resizing import SIZED, BatchFreer, Shape, Shapes, batched, inputs_of, larger_maps
from fxcompile.trees import drop_dead_code, place

FOLDABLE = (torch.zeros, torch.ones, torch.full, torch.arange, torch.linspace, torch.eye)
"""Functions that make a constant where their arguments are numbers."""


def settle(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite sizes, reshapes and constants of a canonical graph in place; new constants are put into the tree."""
    functions = {node.target for node in graph.nodes if node.op == "call_function"}
    if functions & {torch.Tensor.size, torch.reshape, *SIZED}:
        shapes = Shapes(graph, root)
        inputs = inputs_of(graph)
        base = shapes.run(inputs)
        batch = BatchFreer(shapes, base).run()
        maps = shapes.run(larger_maps(inputs), base) if torch.Tensor.size in functions else {}
        Settler(graph, base, batch, maps).run()
    fold_constants(graph, root)
    drop_dead_code(graph)


class Settler:
    """Rewrites a graph by what its nodes gave: for the example's sizes, for a larger batch, and for larger maps."""

    def __init__(
        self, graph: fx.Graph, base: dict[fx.Node, Any], batch: dict[fx.Node, Any], maps: dict[fx.Node, Any]
    ) -> None:
        self.graph = graph
        self.base = base
        self.runs = (batch, maps)
        self.varying: set[fx.Node] = set()
        self.batch_input = next(iter(batched(inputs_of(graph))), None)
        self.batch_node: fx.Node | None = None

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node in self.base and is_plain(self.base[node]) and node.op == "call_function":
                self._number(node)
            elif node.target is torch.reshape and node in self.base:
                self._reshape(node)
            elif node.target is torch.Tensor.expand and node in self.base:
                self._expand(node)

    def _number(self, node: fx.Node) -> None:
        """A number: itself where it is fixed, the batch's node where it is the batch."""
        value = self.base[node]
        own = any(node in run and run[node] != value for run in self.runs)
        if not own and not any(item in self.varying for item in node.all_input_nodes):
            replace_uses(node, value)
            return
        self.varying.add(node)
        source = self.batch_input
        if source is None or (node.target is torch.Tensor.size and node.args == (source, 0)):
            if self.batch_node is None and source is not None:
                self.batch_node = node
            elif self.batch_node is not None:
                replace_uses(node, self.batch_node)
            return
        sizes = [run.get(node) for run in self.runs]
        wanted = [_size(run.get(source)) for run in self.runs]
        follows = isinstance(value, int) and value == _size(self.base[source]) and sizes[0] == wanted[0] != value
        if follows and sizes[1] in (None, value):
            if self.batch_node is None:
                self.batch_node = self._make_batch_node(source)
            replace_uses(node, self.batch_node)

    def _make_batch_node(self, source: fx.Node) -> fx.Node:
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            made = self.graph.call_function(torch.Tensor.size, (source, 0))
        made.meta[ORIGIN] = source.meta.get(ORIGIN, ())
        self.varying.add(made)
        return made

    def _seen(self, node: fx.Node, source: fx.Node) -> list[tuple[Shape, Shape]]:
        """The shapes that a node's source and the node itself were seen to have, the example's first."""
        return [
            (tuple(run[source].shape), tuple(run[node].shape))
            for run in (self.base, *self.runs)
            if isinstance(run.get(node), Tensor) and isinstance(run.get(source), Tensor)
        ]

    def _reshape(self, node: fx.Node) -> None:
        source, given = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(given, tuple)
        seen = self._seen(node, source)
        after = seen[0][1]
        if math.prod(after) == 0 or len({len(shape) for _, shape in seen}) != 1:
            return
        merged = merged_axes(seen)
        if merged is not None:
            node.target, node.args = torch.flatten, (source, *merged)
            node._rename("flatten")
            return
        free = [axis for axis in range(len(after)) if len({shape[axis] for _, shape in seen}) > 1]
        if len(given) != len(after):
            return
        if node not in self.runs[0] and -1 in [size for size in given if isinstance(size, int)]:
            return  # the larger batch was not followed to here: the axis that is left open may be the batch's
        sizes = [given[axis] if axis in free else size for axis, size in enumerate(after)]
        if free and -1 not in [size for size in sizes if isinstance(size, int)]:
            sizes[free[0]] = -1
        node.args = (source, tuple(sizes))

    def _expand(self, node: fx.Node) -> None:
        source, sizes = node.args
        assert isinstance(source, fx.Node)
        seen = self._seen(node, source)
        before, after = seen[0]
        if not isinstance(sizes, tuple) or len(sizes) != len(after):
            return
        added = len(after) - len(before)
        held: list[Any] = []
        for axis, size in enumerate(sizes):
            same = axis >= added and all(old[axis - added] == new[axis] for old, new in seen)
            fixed = len({new[axis] for _, new in seen}) == 1
            held.append(-1 if same else after[axis] if fixed else size)
        node.args = (source, tuple(held))
        if not added and all(isinstance(size, int) and size == -1 for size in held):
            node.replace_all_uses_with(source)


def _size(value: Any) -> int | None:
    return int(value.shape[0]) if isinstance(value, Tensor) and value.dim() else None


def replace_uses(node: fx.Node, value: Any) -> None:
    """Put a number, or another node, in the place of a node wherever it is used."""
    if node is value:
        return
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda item: value if item is node else item)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda item: value if item is node else item)


def merged_axes(pairs: Sequence[tuple[Shape, Shape]]) -> tuple[int, int] | None:
    """The first and last of the neighbouring axes that a reshape puts together, if that is all it does."""
    before, after = pairs[0]
    length = len(before) - len(after)
    if length < 1:
        return None
    for start in reversed(range(len(after))):
        end = start + length
        if all(
            new == (*old[:start], math.prod(old[start : end + 1]), *old[end + 1 :]) and len(old) == len(before)
            for old, new in pairs
        ):
            return start, end
    return None


def fold_constants(graph: fx.Graph, root: nn.Module) -> None:
    """Compute what is made from numbers and buffers alone; parameters stay, as they may be trained."""
    values: dict[fx.Node, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            held = fetch(root, str(node.target))
            if not isinstance(held, nn.Parameter):
                values[node] = held
            continue
        foldable = node.op == "call_function" and (node.all_input_nodes or node.target in FOLDABLE)
        if foldable and all(item in values for item in node.all_input_nodes):
            function: Any = node.target
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                value = function(*args, **kwargs)
            if isinstance(value, Tensor):
                values[node] = value
    count = 0
    for node in list(values):
        if node.op == "get_attr" or all(user in values for user in node.users):
            continue
        while hasattr(root, name := f"constant_{count}" if count else "constant"):
            count += 1
        place(root, name, values[node].clone())
        with graph.inserting_before(node):
            made = graph.get_attr(name)
        made.meta.update(node.meta)
        record_shape(made, values[node])
        node.replace_all_uses_with(made)


def record_missing_shapes(graph: fx.Graph, root: nn.Module) -> None:
    """Note the shapes of the nodes that stand for no single node of the raw graph."""
    if all("tensor_meta" in node.meta for node in graph.nodes if node.op != "output"):
        return
    for node, value in Shapes(graph, root).run(inputs_of(graph)).items():
        if "tensor_meta" not in node.meta:
            record_shape(node, value)
