"""Walks a program and its original side by side over calibration data, for fitting in the order of the data.

Each site is fitted on the inputs that it will really get, from layers already rewritten, towards what the original
computed there. So the walk may not run ahead: it computes a node's values for all batches when they are asked for, and
forgets them when nothing needs them any more. Two forward passes in all, however many sites there are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcompile.program import Program, dtype_of, fetch, flatten_tensors, output_node, shape_of

MEMORY = 1_500_000_000
"""Bytes of activations that a walk may hold at once, over all batches."""


class Walk:
    """The values of one program's nodes over a list of batches, computed in the order of the graph.

    Args:
        program: may be edited while the walk goes on, at and after the node where it stands.
        batches: flat inputs, a tuple of tensors each.
        wanted: nodes whose values will be taken, each as often as it stands here; they are kept until then.
    """

    def __init__(self, program: Program, batches: Sequence[tuple[Tensor, ...]], wanted: Iterable[fx.Node] = ()) -> None:
        self.program = program
        self.batches = batches
        self.wanted = Counter(wanted)
        self.values: dict[fx.Node, list[Any]] = {}
        self.done: set[fx.Node] = set()
        self.next: fx.Node | None = next(iter(program.graph.nodes), None)
        self.inputs = 0

    def values_of(self, node: fx.Node) -> list[Tensor]:
        """The values of a node, one for each batch; walks on as far as the node."""
        while node not in self.done:
            if self.next is None or self.next.op == "output":
                raise LookupError(f"node '{node.name}' is not ahead")
            self._step(self.next)
        return self.values[node]

    def take(self, node: fx.Node) -> list[Tensor]:
        """The same, and forget them if nothing else needs them."""
        values = self.values_of(node)
        self.wanted[node] -= 1
        self._forget(node)
        return values

    def _step(self, node: fx.Node) -> None:
        with torch.no_grad():
            self.values[node] = [self._compute(node, index) for index in range(len(self.batches))]
        if node.op == "placeholder":
            self.inputs += 1
        self.done.add(node)
        for item in (*node.all_input_nodes, node):
            self._forget(item)
        self.next = node.next

    def resume_at(self, node: fx.Node) -> None:
        """Go on with this node: what stood here has been replaced."""
        self.next = node

    def fork(self, node: fx.Node, values: list[Any]) -> Walk:
        """A walk of its own which goes on from the node computed last, with other values for it: for all batches, or
        for the first of them.
        """
        fork = Walk(self.program, self.batches[: len(values)])
        fork.values = {**self.values, node: values}
        fork.done, fork.next, fork.inputs = set(self.done), self.next, self.inputs
        return fork

    def outputs(self) -> list[tuple[Tensor, ...]]:
        """Walk to the end: the program's flat outputs, batch by batch."""
        result = output_node(self.program.graph).args[0]
        for node in output_node(self.program.graph).all_input_nodes:
            self.values_of(node)

        def of_batch(index: int) -> tuple[Tensor, ...]:
            return flatten_tensors(fx.node.map_arg(result, lambda item: self.values[item][index]))

        return list(map(of_batch, range(len(self.batches))))

    def _forget(self, node: fx.Node) -> None:
        if self.wanted[node] <= 0 and all(user in self.done for user in node.users):
            self.values.pop(node, None)

    def _compute(self, node: fx.Node, index: int) -> Any:
        if node.op == "placeholder":
            return self.batches[index][self.inputs]
        if node.op == "get_attr":
            return fetch(self.program.module, str(node.target))
        args = fx.node.map_arg(node.args, lambda item: self.values[item][index])
        kwargs = fx.node.map_arg(node.kwargs, lambda item: self.values[item][index])
        if node.op == "call_module":
            return self.program.module.get_submodule(str(node.target))(*args, **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def live_bytes(program: Program) -> int:
    """The most bytes of activations that a walk holds at once, for the example inputs."""
    last: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        for item in node.all_input_nodes:
            last[item] = node
    ending: dict[fx.Node, list[fx.Node]] = {}
    for item, user in last.items():
        ending.setdefault(user, []).append(item)
    now = most = 0
    for node in program.graph.nodes:
        now += node_bytes(node)
        most = max(most, now)
        now -= sum(node_bytes(item) for item in ending.get(node, ()))
        if node not in last:
            now -= node_bytes(node)
    return most


def node_bytes(node: fx.Node) -> int:
    """Bytes of the tensor that a node computes for the example inputs; 0 for weights."""
    shape, dtype = shape_of(node), dtype_of(node)
    if shape is None or dtype is None or node.op == "get_attr":
        return 0
    return math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
