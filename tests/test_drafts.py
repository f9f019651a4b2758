"""Drafts of the passes that split a layer: their layers are their weight, and data and joint steps bring it nearer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fxcompile.passes import Bottleneck, GroupShuffle, SplitKernels, StackKernels
from fxcompile.passes._drafts import Pilot, Sight, prospects
from fxcompile.passes._ranks import Draft, RankedPass
from helpers import conv, images, outputs, with_layers
from torch import Tensor, nn

from fxcompile.calibration import as_calibration
from fxcompile.patches import patches
from fxcompile.planning import Planning
from fxcompile.rewriting import Site
from fxcompile.tracing import trace

WIDE: list[RankedPass] = [
    SplitKernels(rank=0.5, round_to=1),
    Bottleneck(rank=0.5, round_to=1),
    Bottleneck(rank=0.5, style="inception", round_to=1),
    Bottleneck(rank=0.5, style="cp", round_to=1),
    GroupShuffle(rank=0.5, round_to=1),
    GroupShuffle(rank=0.5, style="depthwise", round_to=1),
    GroupShuffle(rank=0.5, style="shuffle-unit", round_to=1),
    GroupShuffle(rank=0.5, style="permuted"),
    StackKernels(rank=0.5, round_to=1),
    Bottleneck(rank=0.5, style="cp", round_to=1),
    GroupShuffle(rank=0.5, style="permuted"),
    SplitKernels(arrangement="parallel"),
    SplitKernels(arrangement="parallel", merge="concat"),
]


def site_of(pass_: RankedPass, layer: nn.Module, x: Tensor) -> Site:
    (site,) = pass_.sites(trace(layer, x[:2]))
    assert isinstance(site, Site)
    return site


def gram_of(layer: Any, x: Tensor) -> Tensor:
    """S [g, F, F], from the rows themselves."""
    if isinstance(layer, nn.Linear):
        return (x.mT @ x / len(x)).unsqueeze(0)
    rows = patches(layer, x).movedim(1, 0)
    return rows.mT @ rows / rows.shape[1]


def lost(layer: Any, draft: Draft, gram: Tensor) -> float:
    """tr(E S Eᵀ)"""
    lacks = (layer.weight.detach() - draft.weight).flatten(1).unflatten(0, (len(gram), -1))
    return float((lacks @ gram * lacks).sum())


def with_ridge(gram: Tensor) -> Tensor:
    """S as every fit sees it, held near the weight where the data say little."""
    return gram + 1e-2 * gram.diagonal(dim1=1, dim2=2).mean() * torch.eye(gram.shape[1], dtype=gram.dtype)


@pytest.mark.parametrize("pass_", WIDE, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_layers_of_a_draft_compute_its_weight(pass_: RankedPass, groups: int) -> None:
    layer = conv(8 * groups, 6 * groups, 5, 5, padding=2, stride=(2, 1), groups=groups)
    x = images(4, 8 * groups, 9, 8)
    site = site_of(pass_, layer, x)
    for gram, steps in ((None, 0), (gram_of(layer, x), 0), (gram_of(layer, x), 5)):
        draft = pass_.draft(site, layer.weight.detach(), gram, steps)
        dense = with_layers(layer)
        dense.weight.data = draft.weight
        wanted = outputs(dense, x)
        assert float((outputs(nn.Sequential(*draft.layers), x) - wanted).abs().max()) <= 1e-12 * float(
            wanted.abs().max()
        )


@pytest.mark.parametrize("pass_", WIDE, ids=str)
def test_data_and_then_joint_steps_bring_a_draft_nearer(pass_: RankedPass) -> None:
    layer, x = conv(16, 12, 5, 5, padding=2), images(12, 16, 12, 12)
    site, gram = site_of(pass_, layer, x), gram_of(layer, x)
    weight = layer.weight.detach()
    blind, seen, stepped = (
        lost(layer, pass_.draft(site, weight, *given), with_ridge(gram)) for given in ((), (gram,), (gram, 12))
    )
    if not isinstance(pass_, StackKernels):  # whose start knows the weight alone
        assert seen < 0.9 * blind
    assert stepped < 0.95 * blind
    assert stepped <= seen
    assert pass_.takes_steps == (stepped < seen)


@pytest.mark.parametrize("pass_", [item for item in WIDE if item.takes_steps], ids=str)
def test_a_draft_takes_as_many_steps_as_it_is_given(pass_: RankedPass) -> None:
    layer, x = conv(12, 10, 5, 5, padding=2), images(8, 12, 9, 9)
    site, gram, weight = site_of(pass_, layer, x), gram_of(layer, x), layer.weight.detach()
    errors = [lost(layer, pass_.draft(site, weight, gram, steps), with_ridge(gram)) for steps in (0, 1, 16)]
    assert errors[0] > errors[1] > 1.0003 * errors[2]


def test_a_linear_layer_s_draft_is_the_best_of_its_rank() -> None:
    layer = nn.Linear(12, 10).double()
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ torch.randn(
        12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    pass_ = Bottleneck(rank=3)
    draft = pass_.draft(site_of(pass_, layer, x), layer.weight.detach(), gram_of(layer, x))
    values = torch.linalg.svdvals(layer.weight.detach() @ x.mT)
    assert lost(layer, draft, gram_of(layer, x)) == pytest.approx(float(values[3:].square().sum()) / 200, rel=1e-6)
    y = outputs(nn.Sequential(*draft.layers), x) - layer.bias.detach()
    assert float((y - x @ draft.weight.mT).abs().max()) < 1e-12 * float(y.abs().max())


def test_no_steps_are_taken_where_a_fit_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = conv(8, 8, 3, 3), images(6, 8, 8, 8)
    pass_ = Bottleneck(rank=0.5, round_to=1)
    site, gram, weight = site_of(pass_, layer, x), gram_of(layer, x), layer.weight.detach()
    before, after = pass_.draft(site, weight, gram), pass_.draft(site, weight, gram, 12)
    assert not torch.equal(before.weight, after.weight)
    monkeypatch.setattr("fxcompile.passes._chain_fitting._STEP", 1.0)
    assert torch.equal(pass_.draft(site, weight, gram, 12).weight, before.weight)


def test_a_layer_that_nothing_serves_has_no_options() -> None:
    layer, x = conv(8, 8, 3, 3), images(12, 8, 9, 9)
    program = trace(layer, x[:2])
    site = next(iter(Bottleneck().sites(program)))
    assert isinstance(site, Site)
    planning = Planning(program, as_calibration(x, program.inputs), 0, lambda *_: None, [])
    (found,) = prospects(planning, "drafts", [(site, [])])
    assert (found.site, found.curves, found.reason) == (site, [], "")


@pytest.mark.parametrize("pass_", [StackKernels(rank=4), GroupShuffle(rank=0.4), Bottleneck(rank=0.4)], ids=str)
def test_a_large_layer_s_pilot_takes_steps_where_its_fit_does(
    pass_: RankedPass, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stacks and shuffles are refined whatever the size; others start near the data, and stay there."""
    layer, x = conv(8, 8, 5, 5, padding=2), images(12, 8, 9, 9)
    sight = Sight(site_of(pass_, layer, x), layer.weight.detach(), gram_of(layer, x), 1.0, None)
    monkeypatch.setattr("fxcompile.passes._chain_fitting._STEP", 1.0)
    pilot = Pilot.of([(0.4, pass_)], sight)
    after = pilot.after(5, sight)
    if isinstance(pass_, Bottleneck):
        assert after is pilot
    else:
        assert after.error < 0.98 * pilot.start
