"""Layers over weights without their zeros compute what the dense layers do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fxcompile.passes import Sparsify
from helpers import images
from torch import nn

from fxcompile.manager import PassManager
from fxcompile.sparse_layers import SparseLayer, is_product, share_of_time
from fxcompile.tracing import trace


def thinned(layer: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight *= torch.rand(layer.weight.shape, generator=generator) < 0.2
    return layer.double()


@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(12, 7), (5, 12)),
        (nn.Linear(12, 7, bias=False), (2, 3, 12)),
        (nn.Conv1d(6, 9, 1), (2, 6, 5)),
        (nn.Conv2d(6, 9, 1, stride=(2, 1)), (2, 6, 5, 4)),
        (nn.Conv3d(6, 9, 1, bias=False), (1, 6, 3, 2, 4)),
        (nn.Conv2d(6, 9, 1), (6, 5, 4)),
    ],
    ids=str,
)
def test_they_compute_what_the_layer_does(layer: Any, shape: tuple[int, ...], layout: Any) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dense = thinned(layer)
    sparse = SparseLayer(dense, layout)
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(sparse.weight, dense.weight)
    stored = int((dense.weight != 0).sum())
    assert len(sparse.values) == stored
    assert sparse.bytes == 16 * stored + 8 * (dense.weight.shape[0 if layout == "csr" else 1] + 1)


def test_only_products_of_one_matrix_have_such_a_form() -> None:
    assert is_product(nn.Linear(3, 4))
    assert is_product(nn.Conv2d(4, 4, 1, stride=2))
    for layer in (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, padding=1), nn.ReLU()):
        assert not is_product(layer)


def test_a_nearly_empty_matrix_is_faster_and_a_full_one_slower() -> None:
    layer = nn.Linear(1024, 1024)
    full = share_of_time(layer, (64, 1024))
    layer.weight.data *= torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.002
    assert share_of_time(layer, (64, 1024)) < full


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_the_module_runs_by_them_where_they_are_faster(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcompile.passes.sparsify.share_of_time", lambda layer, shape: share)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 49, 5)).double().eval()
    x = images(16, 4, 9, 9)
    result = PassManager([Sparsify(ratio=0.8, execution="csr")], calibration=x).run(trace(net, (x[:2],)))
    layers = [type(result.module.get_submodule(name)) for name in ("1", "3")]
    assert layers == [SparseLayer if share < 1 else type(result.module.get_submodule(name)) for name in ("1", "3")]
    torch.testing.assert_close(result.module(x), result.program.module(x), rtol=1e-10, atol=1e-10)
    count = 2 if share < 1 else 0
    assert result.record.notes[0].startswith(
        f"sparsify: by torch's CSR products, {count} of 2 linear layers and 1x1 convolutions are faster in Python"
    )
    plain = PassManager([Sparsify(ratio=0.8)], calibration=x).run(trace(net, (x[:2],)))
    assert not any(isinstance(layer, SparseLayer) for layer in plain.module.modules())
