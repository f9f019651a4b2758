"""Removes what computes nothing: dropout, identities, reshapes to the same shape, a ReLU after a ReLU."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompile.contracts import Exact
from fxcompile.cost import samples
from fxcompile.labels import node_name
from fxcompile.program import Program, dtype_of, shape_of
from fxcompile.resizing import Shapes, inputs_of, larger_maps
from fxcompile.rewriting import Pass, Site, Skip

from ._call import Call
from ._ranges import UNCHANGED, evidence, lookup, what_of

Rule = Callable[[Any], bool]
"""Whether a call gives its input: from the layer, or from the arguments of a function after its input."""


def always(what: Any) -> bool:
    """In eval mode it is one."""
    return True


def ones(sizes: Any) -> bool:
    """Whether a size is 1 on all axes."""
    return all(size == 1 for size in (sizes if isinstance(sizes, (tuple, list)) else (sizes,)))


def one_pixel(pool: Any) -> bool:
    """A pool that takes each pixel by itself."""
    return ones(pool.kernel_size) and ones(pool.stride) and getattr(pool, "divisor_override", None) in (None, 1)


def number(wanted: int) -> Rule:
    """The operand is that very number, not a tensor."""
    return lambda args: isinstance(args[0], (int, float)) and not isinstance(args[0], bool) and args[0] == wanted


def slices(args: Any) -> bool:
    """An index of nothing but slices."""
    return all(
        isinstance(item, slice) or item is Ellipsis for item in (args[0] if isinstance(args[0], tuple) else args)
    )


LAYERS: dict[type[nn.Module], Rule] = {
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), always),
    **dict.fromkeys((nn.AlphaDropout, nn.FeatureAlphaDropout), always),
    **{getattr(nn, f"{kind}Pool{dims}d"): one_pixel for kind in ("Max", "Avg") for dims in (1, 2, 3)},
    nn.PixelShuffle: lambda layer: layer.upscale_factor == 1,
    nn.PixelUnshuffle: lambda layer: layer.downscale_factor == 1,
    nn.ChannelShuffle: lambda layer: layer.groups == 1,
}
FUNCTIONS: dict[Any, Rule] = {
    operator.mul: number(1),
    operator.truediv: number(1),
    operator.add: number(0),
    operator.sub: number(0),
    torch.pow: number(1),
    torch.permute: lambda args: list(args[0]) == sorted(args[0]),
    torch.clone: lambda args: not args,
    torch.cat: always,  # of one tensor
    torch.roll: lambda args: not any(args[0]),
    torch.Tensor.repeat: lambda args: ones(args[0]),
    F.pad: lambda args: isinstance(args[0], (tuple, list)) and all(amount == 0 for amount in args[0]),
}
"""Identities wherever their input and output have one shape and dtype."""

RESIZING: dict[Any, Rule] = {
    **{getattr(nn, f"Adaptive{kind}Pool{dims}d"): always for kind in ("Avg", "Max") for dims in (1, 2, 3)},
    nn.Unflatten: always,
    **dict.fromkeys((torch.reshape, torch.flatten, torch.squeeze, torch.Tensor.expand), always),
    operator.getitem: slices,
}
"""Identities if input and output have one shape whatever the size of the network's input."""

ORDERS = (torch.permute,)
SHAPES = (torch.reshape, torch.flatten)
PARTS = (torch.chunk, torch.split, torch.unbind)
AGAIN = (torch.floor, torch.ceil, torch.trunc, torch.round, torch.sign)
"""Functions that leave their own values as they are."""
INVERSES = {(operator.neg, operator.neg), (torch.unsqueeze, torch.squeeze), (torch.squeeze, torch.unsqueeze)}
"""Functions of which the second may undo the first: where it gives the same shape, it does."""


class EliminateIdentity(Pass):
    """x -> identity -> y  =>  x -> y

    Identities are: `nn.Identity`; dropout (in eval mode); reshape, flatten, permute, expand, slices and adaptive pools
    that change nothing; a cat of one tensor; padding by 0; a pool or interpolation of one pixel to the same size;
    multiplying or dividing by 1 and adding 0; an activation on values that it leaves as they are, as ReLU after ReLU
    or after a max pool of one, and rounding what was rounded. Of permutations or reshapes in a row one stays, or none;
    of two functions that undo each other, as a squeeze does an unsqueeze, none. What only fits the size
    of the example inputs stays: a squeeze that would take a batch of one, a pool to the size which the map just has.
    Code whose result nothing uses goes too.
    """

    name: ClassVar = "eliminate-identity"
    contract: ClassVar = Exact()

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Each node that gives its input, and each pair that is no more than one, in the order of the data."""
        sizes = _Sizes(program)
        taken: set[fx.Node] = set()
        for node in program.graph.nodes:
            if node.op not in ("call_module", "call_function") or not node.all_input_nodes:
                continue
            found = single(program, node, sizes) or repeated(program, node) or several(program, node, sizes)
            if found is None or taken & set(found):
                continue
            shared = next((item for item in found[:-1] if len(item.users) > 1), None)
            if shared is None:
                taken.update(found)
                yield Site.of(program, *found, name=node_name(node))
            elif node.op == "call_module":
                yield Skip.of(
                    node, f"the output of '{node_name(shared)}', after which it changes nothing, is used elsewhere"
                )

    def rewrite(self, site: Site) -> list[nn.Module]:
        """Nothing for an identity; of two operations the one that does for both; of a chain all but its last layer."""
        if len(site.nodes) == 1:
            return []
        first, last = site.nodes[0], site.nodes[-1]
        if last.target in ORDERS:
            order = functools.reduce(composed, map(order_of, site.nodes))
            return [] if order == sorted(order) else [Call(torch.permute, tuple(order))]
        if last.target in SHAPES:
            return [] if site.input_shape == site.output_shape else [Call(torch.reshape, last.args[1])]
        if first.target in PARTS or (first.target, last.target) in INVERSES:
            return []
        layers = iter(site.layers)
        chain = [next(layers) if node.op == "call_module" else Call.of(node) for node in site.nodes]
        return chain[:-1]


class _Sizes:
    """The shapes that a program's nodes have for inputs of other sizes; computed once, when they are asked for."""

    def __init__(self, program: Program) -> None:
        self.program = program

    @cached_property
    def runs(self) -> list[dict[fx.Node, Any]]:
        """What nodes give for a batch of one, for a larger one, and for larger maps, if the network takes those."""
        graph, inputs = self.program.graph, inputs_of(self.program.graph)
        shapes = Shapes(graph, self.program.module)
        batches = [1, 1 + samples(self.program)] if self.program.batch_is_free else []
        runs = [shapes.run(self.with_batch(size)) for size in batches]
        maps = shapes.run(larger_maps(inputs), shapes.run(inputs))
        return [*runs, maps] if len(maps) == len(graph.nodes) else runs

    def with_batch(self, size: int) -> dict[fx.Node, tuple[int, ...]]:
        """The shapes of the inputs for another number of samples."""
        axes = {spec.name: spec.batch_axis for spec in self.program.inputs}
        return {
            node: tuple(size if axis == axes.get(str(node.target)) else held for axis, held in enumerate(shape))
            for node, shape in inputs_of(self.program.graph).items()
        }

    def same(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether two nodes have one shape at all sizes."""
        pairs = [(run[node], run[source]) for run in self.runs if node in run and source in run]
        return all(isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape for a, b in pairs)


def single(program: Program, node: fx.Node, sizes: _Sizes) -> tuple[fx.Node, ...] | None:
    """The node, if it gives its only input."""
    source = node.all_input_nodes[0]
    if len(node.all_input_nodes) != 1 or shape_of(node) is None:
        return None
    if shape_of(source) != shape_of(node) or dtype_of(source) != dtype_of(node):
        return None
    kind, what = what_of(program, node)
    if kind is F.interpolate:
        scale = node.kwargs.get("scale_factor")
        found = ones(scale) if scale is not None else sizes.same(node, source)
    elif node.kwargs:
        found = False
    elif kind in RESIZING:
        found = RESIZING[kind](what) and sizes.same(node, source)
    else:
        rule = LAYERS.get(kind) or FUNCTIONS.get(kind)
        found = rule is not None and rule(what)
    return (node,) if found else None


def repeated(program: Program, node: fx.Node) -> tuple[fx.Node, ...] | None:
    """An activation after nodes whose values it leaves as they are: all of them."""
    limits = lookup(UNCHANGED, program, node)
    before = evidence(program, node.all_input_nodes[0], limits) if limits is not None else None
    return None if before is None else (*before, node)


def several(program: Program, node: fx.Node, sizes: _Sizes) -> tuple[fx.Node, ...] | None:
    """Permutations or reshapes in a row, a tensor split into one part, a function and its inverse: as one, or none."""
    for kind in (ORDERS, SHAPES):
        if node.target in kind:
            return row(node, kind, sizes)
    first = node.all_input_nodes[0]
    if len(node.all_input_nodes) != 1 or len(first.all_input_nodes) != 1 or len(first.users) != 1:
        return None
    source = first.all_input_nodes[0]
    if node.target in AGAIN and first.target is node.target and node.args[1:] == first.args[1:]:
        return None if node.kwargs or first.kwargs else (first, node)
    parted = node.target is operator.getitem and first.target in PARTS
    if (parted or (first.target, node.target) in INVERSES) and shape_of(node) == shape_of(source):
        return (first, node) if sizes.same(node, source) else None
    return None


def row(node: fx.Node, kind: Sequence[Any], sizes: _Sizes) -> tuple[fx.Node, ...] | None:
    """Permutations, or reshapes, in a row that are no more than one of them; as long as can be, and ending here."""
    nodes = [node]
    while (before := nodes[0].all_input_nodes[0]).target in kind and len(before.users) == 1:
        nodes.insert(0, before)
    here = len(nodes)
    while len(nodes[-1].users) == 1 and (after := next(iter(nodes[-1].users))).target in kind:
        nodes.append(after)
    ends = [end for end in range(2, len(nodes) + 1) if as_one(nodes[:end], kind, sizes)]
    return tuple(nodes[:here]) if ends and ends[-1] == here else None


def as_one(nodes: Sequence[fx.Node], kind: Sequence[Any], sizes: _Sizes) -> bool:
    """Whether one node does for all. The sizes of a reshape stand alone, those of a flatten do not."""
    if any(len(node.all_input_nodes) != 1 for node in nodes):
        return False
    if kind is ORDERS:
        return True
    last, source = nodes[-1], nodes[0].all_input_nodes[0]
    return sizes.same(last, source) if shape_of(last) == shape_of(source) else last.target is torch.reshape


def order_of(node: fx.Node) -> list[int]:
    """The order of all axes that a permutation gives."""
    return list(node.args[1])  # type: ignore[arg-type]


def composed(first: list[int], second: list[int]) -> list[int]:
    """One permutation for two in a row."""
    return [first[axis] for axis in second]
