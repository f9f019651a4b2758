"""Linear layers and 1x1 convolutions over a weight that is stored without its zeros, for running in Python."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxcompile.latency import interleaved
from fxcompile.masks import SPARSE

Layout = Literal["csr", "csc"]


class SparseLayer(nn.Module):
    """What a linear layer or a 1x1 convolution computes, by the product of a sparse matrix with a dense one.

    Args:
        layer: of one group, without padding.
        layout: by rows (`torch.sparse_csr`), or by columns (`torch.sparse_csc`).

    The weight is stored as three buffers, and does not train.
    """

    pointers: Tensor
    indices: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, layer: Any, layout: Layout = "csr") -> None:
        super().__init__()
        self.shape, self.layout = tuple(layer.weight.shape), layout
        self.stride = tuple(getattr(layer, "stride", ()))
        matrix = layer.weight.detach().flatten(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that sparse tensors are in beta
            if layout == "csr":
                held = matrix.to_sparse_csr()
                parts = held.crow_indices(), held.col_indices()
            else:
                held = matrix.to_sparse_csc()
                parts = held.ccol_indices(), held.row_indices()
        for name, tensor in zip(("pointers", "indices", "values"), (*parts, held.values()), strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    @property
    def matrix(self) -> Tensor:
        """[O, C], sparse."""
        make = torch.sparse_csr_tensor if self.layout == "csr" else torch.sparse_csc_tensor
        size = (self.shape[0], self.shape[1])
        return make(self.pointers, self.indices, self.values, size, check_invariants=False)

    @property
    def weight(self) -> Tensor:
        """As the layer had it."""
        return self.matrix.to_dense().reshape(self.shape)

    @property
    def bytes(self) -> int:
        """Of the stored weight."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.pointers, self.indices, self.values))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., O], or [N, C, *positions] -> [N, O, *positions]"""
        if self.stride:
            for axis, step in enumerate(reversed(self.stride), 1):
                x = x.movedim(-axis, 0)[::step].movedim(0, -axis)
            x = x.movedim(-1 - len(self.stride), -1)
        y = (self.matrix @ x.reshape(-1, x.shape[-1]).mT).mT.reshape(*x.shape[:-1], -1)
        if self.bias is not None:
            y = y + self.bias
        return y.movedim(-1, -1 - len(self.stride)) if self.stride else y


def is_product(layer: object) -> bool:
    """Whether a layer is a product of one matrix with each pixel or row."""
    if isinstance(layer, nn.Linear):
        return True
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return False
    return max(layer.kernel_size) == 1 == layer.groups and layer.padding in ((0,) * len(layer.kernel_size), "valid")


@torch.no_grad()
def share_of_time(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """The time that the sparse product takes beside the dense one, on an input of this shape, here and now."""
    weight: Any = layer.weight
    x = torch.zeros(shape, dtype=weight.dtype)
    sparse = SparseLayer(layer)
    dense, other = interleaved([lambda: layer(x), lambda: sparse(x)])
    return other / dense


def put_sparse_layers(module: nn.Module) -> None:
    """Put a sparse layer in the place of every layer of a module that is marked for it."""
    for owner in list(module.modules()):
        for name, layer in list(owner.named_children()):
            if getattr(layer, SPARSE, False):
                owner.add_module(name, SparseLayer(layer))
