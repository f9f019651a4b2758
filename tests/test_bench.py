"""The benchmark's networks have the layers they say and sites for all passes; its verdicts follow from its figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fxcompile as fxc

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import bench
import networks


def leaves(model: torch.nn.Module) -> int:
    return sum(1 for module in model.modules() if not list(module.children()))


@pytest.mark.parametrize("shape", networks.UNITS)
@pytest.mark.parametrize("layers", [60, 100])
def test_a_network_has_exactly_so_many_layers(shape: str, layers: int) -> None:
    model = networks.network(shape, layers)
    assert leaves(model) == layers
    assert model(torch.randn(2, 3, networks.SIZE, networks.SIZE)).shape == (2, 10)


@pytest.mark.parametrize("shape", networks.UNITS)
def test_every_pass_has_sites_in_it(shape: str) -> None:
    program = fxc.trace(networks.network(shape, 100), torch.randn(2, 3, networks.SIZE, networks.SIZE))
    record = fxc.PassManager(bench.PIPELINE, verify="off").run(program).report()
    assert all(any(site.outcome == "kept" for site in item.sites) for item in record.passes)


def test_resnet_152_has_its_parameters() -> None:
    assert sum(p.numel() for p in networks.resnet152().parameters()) == 60_192_808


def run(layers: int, peak: int = 0, **seconds: float) -> Any:
    return bench.Run(str(layers), layers, 100, peak, {"export": 1.0, **seconds})


def test_growth_is_held_to_n_log_n() -> None:
    assert bench.growth_faults([run(100, analysis=1.0), run(1000, analysis=15.0)]) == []
    (fault,) = bench.growth_faults([run(100, analysis=1.0), run(1000, analysis=30.0)])
    assert fault.startswith("analysis grows 30.0 times from 100 to 1000, n log n with a margin would be 22.5")
    assert bench.growth_faults([run(100, analysis=1e-4), run(1000, analysis=0.04)]) == []


def test_the_rest_is_held_to_the_exporter_and_memory_to_the_model() -> None:
    assert bench.export_faults(run(10, analysis=0.9)) == []
    assert bench.export_faults(run(10, analysis=1.1)) == ["10: 1.1 s beside 1.0 s of torch.onnx.export"]
    assert bench.memory_faults(run(10, peak=1399), 1000) == []
    assert len(bench.memory_faults(run(10, peak=1400), 1000)) == 1


def test_a_fit_is_held_to_seconds_and_bytes() -> None:
    def fitted(seconds: float, peak: int) -> Any:
        return bench.Run("split-kernels 512 3x3 at 7x7", 1, 100, peak, {"split-kernels": seconds})

    assert bench.refit_faults(fitted(20.0, 2_000_000_100), 100) == []
    (fault,) = bench.refit_faults(fitted(20.1, 0), 0)
    assert fault == "split-kernels 512 3x3 at 7x7: 20.1 s, the goal is 20 s"
    (fault,) = bench.refit_faults(fitted(1.0, 2_100_000_100), 100)
    assert fault.endswith("2100 MB above importing torch, the goal is 2000 MB")


def test_the_features_that_are_fitted_to_are_alike() -> None:
    maps = networks.features(20, 96, 7)
    assert maps.shape == (20, 96, 7, 7)
    assert float(maps.min()) == 0
    values = torch.linalg.svdvals((maps - maps.mean((0, 2, 3), keepdim=True)).movedim(1, 0).flatten(1).double())
    assert float(values[:48].square().sum() / values.square().sum()) > 0.7
    assert networks.single(96, 3)(maps).shape == maps.shape
