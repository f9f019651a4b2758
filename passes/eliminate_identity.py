"""Removes what computes nothing: dropout, identities, reshapes to the same shape, a ReLU after a ReLU."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompile.contracts import Exact
from fxcompile.program import Program, dtype_of, shape_of
from fxcompile.rewriting import Pass, Site, Skip

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
IDEMPOTENT = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
"""Activations f with f(f(x)) = f(x)."""
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d,
            nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)  # fmt: skip


class EliminateIdentity(Pass):
    """x -> identity -> y  =>  x -> y

    Identities are: `nn.Identity`; dropout (in eval mode); reshape, flatten, permute, transpose and expand that change
    nothing; a cat of one tensor; padding by 0; a pool or interpolation of one pixel to the same size; a cast to the
    dtype that the tensor has; multiplying or dividing by 1 and adding 0; an idempotent activation that follows
    itself. Code whose result nothing uses goes too. Shapes are those of the example inputs; where a shape may differ
    for other batch sizes, the operation stays.
    """

    name: ClassVar = "eliminate-identity"
    contract: ClassVar = Exact()

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Each node that gives its input, in the order of the data."""
        free = program.batch_is_free
        for node in program.graph.nodes:
            if node.op not in ("call_module", "call_function") or not node.all_input_nodes:
                continue
            layer = program.layer(node)
            if layer is not None:
                if layer_is_identity(program, node, layer):
                    yield Site.of(program, node)
            elif function_is_identity(node, free):
                yield Site.of(program, node)

    def rewrite(self, site: Site) -> list[nn.Module]:
        """Nothing."""
        return []


def layer_is_identity(program: Program, node: fx.Node, layer: nn.Module) -> bool:
    """Whether a call of a layer gives its input."""
    source = node.all_input_nodes[0]
    if isinstance(layer, (nn.Identity, *DROPOUTS)):
        return True
    if isinstance(layer, IDEMPOTENT):
        before = program.layer(source)
        same = type(before) is type(layer)
        return same and (not isinstance(layer, nn.Hardtanh) or same_bounds(layer, before))
    if isinstance(layer, POOLS):
        return shape_of(node) == shape_of(source) and ones(layer.kernel_size) and ones(layer.stride)
    if isinstance(layer, ADAPTIVE):
        return shape_of(node) == shape_of(source) and ones(layer.output_size)
    if isinstance(layer, (nn.PixelShuffle, nn.PixelUnshuffle)):
        return shape_of(node) == shape_of(source)
    return isinstance(layer, nn.ChannelShuffle) and layer.groups == 1


def same_bounds(layer: nn.Hardtanh, before: nn.Module | None) -> bool:
    """Whether two hardtanh clip to the same interval."""
    return isinstance(before, nn.Hardtanh) and (layer.min_val, layer.max_val) == (before.min_val, before.max_val)


def ones(sizes: object) -> bool:
    """Whether a size is 1 on all axes."""
    return all(size == 1 for size in (sizes if isinstance(sizes, (tuple, list)) else (sizes,)))


def function_is_identity(node: fx.Node, batch_is_free: bool) -> bool:
    """Whether a call of a function gives its first argument."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return node.target is torch.cat and isinstance(source, (list, tuple)) and len(source) == 1
    before, after = shape_of(source), shape_of(node)
    if before is None or before != after or dtype_of(source) != dtype_of(node) or len(node.all_input_nodes) > 2:
        return False
    if node.target in (operator.mul, operator.truediv):
        return is_number(node.args[1], 1)
    if node.target in (operator.add, operator.sub):
        return is_number(node.args[1], 0)
    if node.target is torch.permute:
        return node.args[1] == tuple(range(len(before)))
    if node.target is torch.transpose:
        return node.args[1] == node.args[2]
    if node.target is torch.flatten:
        return node.args[1] == node.args[2]
    if node.target in (torch.reshape, torch.squeeze):
        # The first axis is the batch: a size of 1 there may be another number next time.
        return not batch_is_free or reshape_keeps_batch(node)
    if node.target is torch.Tensor.to:
        return len(node.args) == 2 and isinstance(node.args[1], torch.dtype) and not node.kwargs
    if node.target in (torch.Tensor.float, torch.Tensor.double, torch.Tensor.half, torch.clone):
        return not node.kwargs
    if node.target is F.pad:
        amounts = node.args[1]
        return isinstance(amounts, (tuple, list)) and all(amount == 0 for amount in amounts)
    return False


def reshape_keeps_batch(node: fx.Node) -> bool:
    """Whether a reshape that gives the same shape for the examples does so for every batch size."""
    if node.target is torch.squeeze:
        return len(node.args) > 1 and node.args[1] not in (0, -len(node.meta["tensor_meta"].shape))
    sizes = node.args[1]
    if not isinstance(sizes, (tuple, list)) or not sizes:
        return False
    first = sizes[0]
    own_batch = isinstance(first, fx.Node) and first.target is torch.Tensor.size and first.args == (node.args[0], 0)
    return (own_batch or first == -1) and all(isinstance(size, int) for size in sizes[1:])


def is_number(value: object, wanted: int) -> bool:
    """Whether an operand is that very number, not a tensor."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == wanted
