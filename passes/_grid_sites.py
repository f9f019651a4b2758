"""Where `reduce-grid` finds a convolution with the pooling behind it."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import fx, nn

from fxcompile.labels import node_name
from fxcompile.layers import BATCH_NORMS, is_finite
from fxcompile.program import Program, dtype_of
from fxcompile.rewriting import Site

from .fold_batchnorm import affine
from .head_to_conv import ELEMENTWISE

MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AVG_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
CLAMPS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)


def to_pooling(program: Program, node: fx.Node) -> list[fx.Node]:
    """The nodes from a convolution to a pooling with a stride, with norms and what works on each value between; none
    where there is no such pooling.
    """
    nodes = [node]
    while True:
        users = list(nodes[-1].users)
        pool = next((user for user in users if makes_smaller(program.layer(user))), None)
        if pool is not None:
            return [*nodes, pool]
        if len(users) != 1 or not isinstance(program.layer(users[0]), (*BATCH_NORMS, *ELEMENTWISE)):
            return []
        nodes.append(users[0])


def makes_smaller(layer: nn.Module | None) -> bool:
    """Whether it is a pooling whose windows are more than one pixel apart."""
    return isinstance(layer, (*MAX_POOLS, *AVG_POOLS)) and max(each_axis(layer, "stride")) > 1


def each_axis(layer: Any, name: str) -> tuple[int, ...]:
    """A pooling's `kernel_size`, `stride`, `padding` or `dilation` along each axis."""
    value = getattr(layer, name, 1)
    dims = (*MAX_POOLS, *AVG_POOLS).index(type(layer)) % 3 + 1
    return tuple(value) if isinstance(value, tuple) else (value,) * dims


def unfit(site: Site) -> str | None:
    """Why the nodes of a site are none that strided branches can stand for, or None."""
    pool: Any = site.layers[-1]
    if not isinstance(pool, (*MAX_POOLS, *AVG_POOLS)):
        return None
    between = list(site.layers[1:-1])
    for node in site.nodes[:-1]:
        if len(node.users) > 1:
            return f"the value of '{node_name(node)}' is used elsewhere, not only by its pooling"
    if between and isinstance(between[0], BATCH_NORMS):
        norm: Any = between.pop(0)
        if norm.running_mean is None:
            return "the norm ahead of its pooling keeps no statistics and normalises by the batch"
        if not all(map(is_finite, affine(norm))):
            return "the scale or shift of the norm ahead of its pooling is not finite"
    if between and isinstance(between[0], CLAMPS):
        between.pop(0)
    if between:
        return f"{type(between[0]).__name__} stands ahead of its pooling, and only a batch norm and then a ReLU may"
    if getattr(pool, "return_indices", False):
        return "its pooling gives indices too"
    if pool.ceil_mode and any(
        reach(size, gap) < step + pad
        for size, gap, step, pad in zip(
            *(each_axis(pool, name) for name in ("kernel_size", "dilation", "stride", "padding")), strict=True
        )
    ):
        return "its pooling leaves out windows that begin behind the map"
    return None


def alone(program: Program, taken: Container[fx.Node]) -> Iterator[Site]:
    """Poolings with a stride over maps of numbers, but for those already taken."""
    names: set[str] = set()
    for node in program.graph.nodes:
        layer = program.layer(node)
        if makes_smaller(layer) and node not in taken and (dtype_of(node) or torch.int64).is_floating_point:
            name = node_name(node)
            yield Site.of(program, node, name=node.name if name in names else name)
            names.add(name)


def reach(size: int, gap: int) -> int:
    """Pixels from the first to the last tap of a kernel."""
    return gap * (size - 1) + 1
