"""Runs a canonical graph on shapes alone, for inputs of other sizes, and frees the batch where a number holds it fast.

A graph exported for one batch size has that size written into it: `reshape(x, (1, 8, 49))`, `expand(token, (1, -1,
-1))`, `zeros((2, 1, 64))`. Running it with a larger batch shows where: at the first operation that does not fit. What
is written there or in what leads there is put in terms of the input's batch, and the walk goes on. Whether the
result is right for other batches is for the caller to check with numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompile.layers import converted, on_meta
from fxcompile.program import ORIGIN, dtype_of, fetch, shape_of

SIZED: dict[Any, int] = {
    torch.Tensor.expand: 1,
    torch.Tensor.repeat: 1,
    torch.zeros: 0,
    torch.ones: 0,
    torch.full: 0,
    torch.empty: 0,
    torch.arange: 0,
    F.affine_grid: 1,
}
"""Functions that make a tensor of given sizes, and which argument those are."""

CREATION = (torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.linspace, torch.eye)
"""Functions that make a tensor from numbers."""

Shape = tuple[int, ...]


class DoesNotFit(Exception):
    """A node cannot take inputs of these sizes."""


class Shapes:
    """What each node of a graph gives, on the meta device: tensors without values, and numbers."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph = graph
        self.root = root
        self._layers: dict[str, nn.Module] = {}

    def run(self, inputs: dict[fx.Node, Shape], base: dict[fx.Node, Any] | None = None) -> dict[fx.Node, Any]:
        """The values of all nodes, or of those ahead of the first that does not fit.

        Args:
            inputs: the shape of each placeholder.
            base: values for the same batch; a reshape that lets the batch grow with the maps does not fit, as
                `view(-1, 400)` ahead of a linear layer.
        """
        values: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            try:
                values[node] = self.compute(node, values, inputs)
            except DoesNotFit:
                break
            if base is not None and node.target is torch.reshape:
                before, after = _shapes(base[node.args[0]]), _shapes(base[node])
                if before[:1] == after[:1] == _shapes(values[node.args[0]])[:1] != _shapes(values[node])[:1]:
                    del values[node]
                    break
        return values

    def compute(self, node: fx.Node, values: dict[fx.Node, Any], inputs: dict[fx.Node, Shape]) -> Any:
        """One node's value from those of its arguments.

        Raises:
            DoesNotFit: it does not take them.
        """
        if node.op == "placeholder":
            return torch.empty(inputs[node], dtype=dtype_of(node), device="meta")
        if node.op == "get_attr":
            return fetch(self.root, str(node.target)).to("meta")
        if node.op == "output":
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: values[item])
        function: Any = self._layer(str(node.target)) if node.op == "call_module" else node.target
        if node.target in CREATION:
            kwargs = {**kwargs, "device": "meta"}
        try:
            with torch.no_grad():
                return function(*args, **kwargs)
        except Exception as error:  # whatever an operator raises, it does not take these shapes
            raise DoesNotFit from error

    def _layer(self, target: str) -> nn.Module:
        if target not in self._layers:
            self._layers[target] = converted(self.root.get_submodule(target), on_meta)
        return self._layers[target]


def inputs_of(graph: fx.Graph) -> dict[fx.Node, Shape]:
    """The placeholders and their shapes."""
    return {node: shape_of(node) or () for node in graph.nodes if node.op == "placeholder"}


def batched(inputs: dict[fx.Node, Shape]) -> list[fx.Node]:
    """The inputs that share the first axis of the first one."""
    sizes = [shape[0] if shape else None for shape in inputs.values()]
    return [node for node, size in zip(inputs, sizes, strict=True) if size is not None and size == sizes[0]]


def larger_batch(inputs: dict[fx.Node, Shape]) -> dict[fx.Node, Shape]:
    """The same inputs with a batch of more than twice the size, which no other axis has by doubling."""
    free = batched(inputs)
    return {node: (2 * shape[0] + 1, *shape[1:]) if node in free else shape for node, shape in inputs.items()}


def larger_maps(inputs: dict[fx.Node, Shape]) -> dict[fx.Node, Shape]:
    """The same inputs, the axes after batch and channels twice as long."""
    return {node: (*shape[:2], *(2 * size for size in shape[2:])) for node, shape in inputs.items()}


class BatchFreer:
    """Runs a graph with a larger batch and rewrites the numbers that stand in its way.

    Attributes:
        values: what each node gives for the larger batch, as far as it came.
    """

    def __init__(self, shapes: Shapes, base: dict[fx.Node, Any]) -> None:
        self.shapes = shapes
        self.graph = shapes.graph
        self.base = base
        self.original = inputs_of(self.graph)
        self.inputs = larger_batch(self.original)
        self.batch = next(iter(batched(self.original)), None)
        self.size = self.original[self.batch][0] if self.batch is not None else 0
        self.values: dict[fx.Node, Any] = {}
        self._batch_node: fx.Node | None = None
        self._outside: dict[fx.Node, int] = {}
        self._choices: dict[fx.Node, list[tuple[int, int]]] = {}
        self._forced: dict[fx.Node, list[tuple[int, int]]] = {}

    def run(self) -> dict[fx.Node, Any]:
        """The values for the larger batch, the graph rewritten where it had to be."""
        if self.batch is None:
            return {}
        nodes, position, attempts = list(self.graph.nodes), 0, 0
        while position < len(nodes):
            node = nodes[position]
            try:
                self.values[node] = self._step(node)
                position += 1
            except DoesNotFit:
                back = self._other_choice()
                attempts += 1
                if back is None or attempts > 200:
                    break
                position = nodes.index(back)
                for later in nodes[position:]:
                    self.values.pop(later, None)
        return self.values

    def _other_choice(self) -> fx.Node | None:
        """The last reshape that could have gone another way, which it now does."""
        while self._choices:
            node, waiting = self._choices.popitem()
            if waiting:
                self._forced[node] = waiting
                return node
        return None

    def batch_node(self) -> fx.Node:
        """The node for the size of the batch, made when it is first asked for."""
        if self._batch_node is None:
            assert self.batch is not None
            last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                self._batch_node = self.graph.call_function(torch.Tensor.size, (self.batch, 0))
                self._batch_node.meta[ORIGIN] = self.batch.meta.get(ORIGIN, ())
            self.base[self._batch_node] = self.size
            self.values[self._batch_node] = 2 * self.size + 1
        return self._batch_node

    def _step(self, node: fx.Node) -> Any:
        self._outside[node] = next((self._outside[item] for item in node.all_input_nodes if self.grown(item)), 1)
        if node.target in (torch.reshape, torch.flatten):
            self._free_reshape(node)
        elif node.target is torch.Tensor.expand:
            self._free_expand(node)
        try:
            return self.shapes.compute(node, self.values, self.inputs)
        except DoesNotFit:
            return self._repair(node)

    def grown(self, node: fx.Node) -> bool:
        """Whether a node gives more for a larger batch."""
        return bool(_shapes(self.values.get(node)) != _shapes(self.base.get(node)))

    def _free_reshape(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before, now, after = (_shapes(values.get(item)) for values, item in
                              ((self.base, source), (self.values, source), (self.base, node)))  # fmt: skip
        if now == before or math.prod(before) == 0:
            return
        ways = self._forced.pop(node, None) or ways_to_follow(before, now, after, self.size, self._outside[source])
        if not ways:
            return
        (axis, outside), *others = ways
        self._outside[node] = outside
        sizes = node.args[1]
        if node.target is torch.reshape and isinstance(sizes, tuple) and all(isinstance(size, int) for size in sizes):
            node.args = (source, tuple(-1 if position == axis else size for position, size in enumerate(after)))
            self._choices[node] = others

    def _free_expand(self, node: fx.Node) -> None:
        source, sizes = node.args
        before, after = _shapes(self.base.get(source)), _shapes(self.base.get(node))  # type: ignore[arg-type]
        now = _shapes(self.values.get(source))  # type: ignore[arg-type]
        if now == before or not isinstance(sizes, tuple) or len(before) != len(after) or len(sizes) != len(after):
            return
        kept = [old == new for old, new in zip(before, after, strict=True)]
        moved = [old != new for old, new in zip(before, now, strict=True)]
        node.args = (
            source,
            tuple(-1 if keep and move else size for keep, move, size in zip(kept, moved, sizes, strict=True)),
        )

    def _repair(self, node: fx.Node) -> Any:
        """Put sizes ahead of a node in terms of the batch until it fits.

        Raises:
            DoesNotFit: it never does.
        """
        candidates = self._candidates(node)
        axes = sorted({axis for candidate in candidates for axis in self._axes(candidate)})
        attempts = [[(candidate, axis) for candidate in candidates if axis in self._axes(candidate)] for axis in axes]
        if len(candidates) > 1:
            attempts += [[(candidate, axis)] for candidate in candidates for axis in self._axes(candidate)]
        for attempt in attempts:
            kept = [(candidate, candidate.args) for candidate, _ in attempt]
            for candidate, axis in attempt:
                candidate.args = self._with_batch(candidate, axis)
            try:
                return self._again([candidate for candidate, _ in attempt], node)
            except DoesNotFit:
                for candidate, args in kept:
                    candidate.args = args
                self._again([candidate for candidate, _ in attempt], None)
        raise DoesNotFit

    def _again(self, changed: Sequence[fx.Node], last: fx.Node | None) -> Any:
        """Compute again what depends on changed nodes; then the value of a node that has none yet."""
        stale = set(changed)
        for node in list(self.values):
            if node in stale or any(item in stale for item in node.all_input_nodes):
                stale.add(node)
                self.values[node] = self.shapes.compute(node, self.values, self.inputs)
        return None if last is None else self.shapes.compute(last, self.values, self.inputs)

    def _candidates(self, node: fx.Node) -> list[fx.Node]:
        """The node itself and what it is computed from, not by way of the batch, where sizes are written out."""
        found: list[fx.Node] = []
        waiting, seen = [node], {node}
        for item in waiting:
            if self._axes(item):
                found.append(item)
            for source in item.all_input_nodes:
                if source not in seen and not self.grown(source) and source.op == "call_function":
                    seen.add(source)
                    waiting.append(source)
        return found

    def _axes(self, node: fx.Node) -> list[int]:
        """Which of the sizes written in a node may be the batch."""
        index = SIZED.get(node.target)
        if index is None or len(node.args) <= index:
            return []
        sizes = node.args[index]
        listed = sizes if isinstance(sizes, tuple) else (sizes,)
        return [axis for axis, size in enumerate(listed) if isinstance(size, int) and size == self.size]

    def _with_batch(self, node: fx.Node, axis: int) -> tuple[Any, ...]:
        args = list(node.args)
        index = SIZED[node.target]
        sizes, size = args[index], self.batch_node()
        if isinstance(sizes, tuple):
            args[index] = tuple(size if position == axis else old for position, old in enumerate(sizes))
        else:
            args[index] = size
        return tuple(args)


def _shapes(value: Any) -> Any:
    """The shape of a tensor, of each tensor in a list; numbers stand for themselves."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(_shapes(item) for item in value)
    return value


def ways_to_follow(before: Shape, now: Shape, after: Shape, batch: int, outside: int) -> list[tuple[int, int]]:
    """The axes of a reshaped tensor that may grow with the batch, the likeliest first.

    Args:
        before: shape of the source for the example's batch.
        now: its shape for a larger batch; one axis is longer.
        after: shape of the result for the example's batch.
        batch: size of the example's batch.
        outside: how many elements of something else the longer axis holds outside the batch.

    Returns:
        Each axis with what it then holds outside the batch.

    A step along the batch is a step of so many elements. The axis looked for reaches from that step to `batch` times
    it. For a batch of one that is a point: an axis of one element there, else the axis that ends or starts there.
    """
    longer = [axis for axis, (old, new) in enumerate(zip(before, now, strict=True)) if old != new]
    if len(longer) != 1 or before[longer[0]] % (batch * outside):
        return []
    step = before[longer[0]] // (batch * outside) * math.prod(before[longer[0] + 1 :])
    strides = [math.prod(after[axis + 1 :]) for axis in range(len(after))]
    holding = [
        (axis, stride * size // (step * batch))
        for axis, (size, stride) in enumerate(zip(after, strides, strict=True))
        if stride <= step
        and step % stride == 0
        and step * batch <= stride * size
        and (stride * size) % (step * batch) == 0
    ]
    if batch > 1:
        return holding[:1]
    alone = [way for way in holding if after[way[0]] == 1]
    inside = [way for way in holding if way[1] > 1 and strides[way[0]] < step]
    ends = [way for way in holding if way[1] == 1 and after[way[0]] > 1]
    starts = [way for way in holding if way[1] > 1 and strides[way[0]] == step]
    return alone or inside or ends + starts
