"""The benchmark of pruning: its networks are those that they are named after, its verdicts follow from its figures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import fxcompile as fxc
from fxcompile.channel_graph import ChannelGraph
from fxcompile.cost import program_cost

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import networks
import pruning
from digits_resnet import ResNet18


def test_a_densenet_201_has_its_parameters_and_all_its_layers_lose_channels() -> None:
    model = networks.densenet201()
    assert sum(p.numel() for p in model.parameters()) == 20_013_928
    groups = ChannelGraph.of(fxc.trace(model, (torch.randn(1, 3, 32, 32),))).groups
    convolutions = sum(isinstance(layer, torch.nn.Conv2d) for layer in model.modules())
    assert len(groups) == convolutions == 200
    assert not any(group.reason for group in groups)


def test_a_resnet_18_has_its_layers() -> None:
    model = ResNet18(3, 1000).eval()
    whole = 11_689_512 - 64 * 3 * 7 * 7 + 64 * 3 * 3 * 3  # torchvision's, but for the stem
    assert sum(p.numel() for p in model.parameters()) == whole
    assert program_cost(fxc.trace(model, (torch.randn(1, 3, 28, 28),))).macs > 100_000_000


def row(accuracy: float, ratio: float = 0.5, tool: str = "fxcompile", way: str = "least-squares") -> pruning.Row:
    return pruning.Row("digits", tool, way, ratio, True, accuracy, 0.25, 0.5, 1.0)


def test_half_of_the_filters_may_cost_two_points() -> None:
    assert pruning.faults([row(0.97)], before=0.99) == []
    assert pruning.faults([row(0.96)], before=0.99) == ["digits: half of the filters cost 3.0%, the goal is 2%"]
    assert pruning.faults([row(0.5, ratio=0.75), row(0.5, way="l2")], before=0.99) == []


@pytest.mark.parametrize("ratio", pruning.RATIOS)
def test_the_best_of_the_others_must_be_behind_at_each_ratio(ratio: float) -> None:
    others = [row(0.98, ratio, "Torch-Pruning", "l1"), row(0.985, ratio, "Torch-Pruning", "l2")]
    assert pruning.faults([row(0.986, ratio), *others], before=0.99) == []
    (fault,) = pruning.faults([row(0.985, ratio), *others], before=0.99)
    assert fault == f"digits at {ratio}: 98.5% beside 98.5% of Torch-Pruning, l2"


def test_norms_are_taken_anew_from_the_images() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten()).eval()
    x = 20 * torch.rand(128, 1, 8, 8)
    pruning.renew_norms(model, pruning.Subject("", model, x, x, torch.zeros(128), "[]"))
    assert not model.training
    y = model(x).reshape(128, 4, -1).movedim(1, 0).flatten(1)
    assert torch.allclose(y.mean(1), torch.zeros(4), atol=1e-4)
    assert torch.allclose(y.var(1), torch.ones(4), atol=2e-2)
