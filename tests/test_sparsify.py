"""sparsify: which weights become zero, how near the rest comes, and that zeros stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fxcompile.passes import Sparsify
from fxcompile.passes._sparse import Pattern, mask_of, refined, thinned
from fxcompile.passes._stack_refining import held
from helpers import conv, images
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxcompile.errors import PipelineError
from fxcompile.manager import PassManager, Result
from fxcompile.masks import Mask
from fxcompile.pipeline import parse_pipeline
from fxcompile.testing import check_pass
from fxcompile.tracing import trace


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2), nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8),
    ).double().eval()  # fmt: skip


def thinner(net: nn.Module | None = None, calibrated: bool = True, **options: Any) -> Result:
    x = images(64, 4, 9, 9)
    program = trace(net or model(), (x[:2],))
    return PassManager([Sparsify(**options)], calibration=x if calibrated else None).run(program)


def zeros(result: Result) -> dict[str, float]:
    layers = result.program.layers(nn.Conv2d, nn.Linear)
    return {str(node.target): float((layer.weight == 0).double().mean()) for node, layer in layers}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": 0.9},
        {"ratio": 0.6, "scope": "network"},
        {"error": 0.2},
        {"pattern": "1:2"},
        {"block": 2},
        {"method": "magnitude"},
        {"method": "least-squares"},
    ],
    ids=str,
)
def test_it_holds_on_drawn_networks(options: dict[str, Any]) -> None:
    check_pass(Sparsify(**options), examples=25, seed=0, onnx_examples=1)


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_as_many_weights_are_zero_as_are_wanted(ratio: float, calibrated: bool) -> None:
    found = zeros(thinner(calibrated=calibrated, ratio=ratio))
    for name in ("0", "2", "7"):
        assert found[name] == pytest.approx(ratio, abs=0.01)
    assert found["4"] == 0


def test_a_network_wide_ratio_counts_all_weights_together() -> None:
    result = thinner(ratio=0.7, scope="network")
    layers = {str(node.target): layer for node, layer in result.program.layers(nn.Conv2d, nn.Linear)}
    weights = [layers[name].weight for name in ("0", "2", "7")]
    gone = sum(int((weight == 0).sum()) for weight in weights)
    assert gone / sum(weight.numel() for weight in weights) == pytest.approx(0.7, abs=0.01)
    assert len(set(zeros(result).values())) > 2


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:2"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_so_many_of_each_run_of_channels_stay(pattern: str, calibrated: bool) -> None:
    kept, of = map(int, pattern.split(":"))
    result = thinner(calibrated=calibrated, pattern=pattern)
    for name in ("0", "2", "7"):
        weight = result.program.module.get_submodule(name).weight.detach()
        runs = (weight != 0).unflatten(1, (-1, of)).sum(2)
        assert torch.equal(runs, torch.full_like(runs, kept)), name


def test_blocks_go_as_one() -> None:
    result = thinner(ratio=0.5, block=4)
    weight = result.program.module.get_submodule("0").weight.detach()
    runs = (weight != 0).unflatten(1, (-1, 4)).sum(2)
    assert set(runs.flatten().tolist()) == {0, 4}


def test_as_sparse_as_an_error_allows() -> None:
    shares = []
    for error in (0.05, 0.2, 0.5):
        result = thinner(error=error)
        sites = [site for site in result.record.passes[0].sites if site.outcome == "kept"]
        assert all(site.error < 1.5 * error for site in sites)
        shares.append(zeros(result)["2"])
    assert shares == sorted(shares)
    assert shares[0] < 0.6 < shares[2]


def test_data_bring_it_nearer_than_magnitude() -> None:
    for ratio in (0.5, 0.8):
        blind = thinner(ratio=ratio, method="magnitude", calibrated=False)
        seeing, best = thinner(ratio=ratio, method="magnitude"), thinner(ratio=ratio)
        x = images(32, 4, 9, 9, seed=7)
        wanted = model()(x)
        errors = [
            float((item.module(x) - wanted).detach().norm() / wanted.norm().detach()) for item in (blind, seeing, best)
        ]
        assert errors[1] < 0.8 * errors[0]
        assert errors[2] <= 1.02 * errors[1]


def test_zeros_stay_zero_in_training_and_when_it_is_read_again() -> None:
    result = thinner(ratio=0.8)
    module = result.module
    layer: Any = module.get_submodule("2")
    assert isinstance(layer.parametrizations.weight[0], Mask)
    before = layer.weight.detach().clone()
    optimiser = torch.optim.Adam(module.parameters(), lr=0.05)
    for step in range(3):
        optimiser.zero_grad()
        module(images(8, 4, 9, 9, seed=step)).square().sum().backward()
        optimiser.step()
    assert torch.equal(layer.weight == 0, before == 0)
    assert not torch.equal(layer.weight, before)
    again = PassManager([]).run(trace(module.eval(), (images(2, 4, 9, 9),)))
    assert torch.equal(again.program.module.get_submodule("2").weight, layer.weight)
    assert parametrize.is_parametrized(again.module.get_submodule("2"))
    assert not parametrize.is_parametrized(again.module.get_submodule("4"))


def test_what_was_not_trained_is_saved(tmp_path: Any) -> None:
    result = thinner(ratio=0.8)
    assert result.module is not None
    float32 = PassManager([Sparsify(ratio=0.8)]).run(trace(model().float(), (images(2, 4, 9, 9).float(),)))
    assert float32.module is not None
    float32.save_onnx(tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").exists()


def test_what_stays_is_said() -> None:
    sites = {
        site.name: site
        for site in thinner(
            pattern="2:4",
        )
        .record.passes[0]
        .sites
    }
    assert sites["4"].reason == "it takes one channel, or one for each group: few weights, of which each is worth many"
    assert sites["0"].change == "Conv2d 4->16 3x3 -> Conv2d 4->16 3x3, 50.0% zeros"
    odd = nn.Sequential(conv(3, 8, 3, 3)).eval()
    result = PassManager([Sparsify(pattern="2:4")]).run(trace(odd, (images(2, 3, 9, 9),)))
    assert result.record.passes[0].sites[0].reason == "its 3 channels are no multiple of 4"


@pytest.mark.parametrize(
    "text", ["ratio=1", "pattern=4:2", "pattern=half", "ratio=0.5, error=0.1", "pattern=2:4, block=2"]
)
def test_options_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(PipelineError):
        parse_pipeline(f"sparsify({text})")


# the mathematics


def problem(features: int = 24, outputs: int = 5, groups: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(groups, features, features, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, 400, features, generator=generator, dtype=torch.float64) @ mixed
    weight = torch.randn(groups, outputs, features, generator=generator, dtype=torch.float64)
    return weight, x.mT @ x / 400


def error(weight: Tensor, target: Tensor, gram: Tensor) -> float:
    lacks = weight - target
    return float((lacks @ gram * lacks).sum())


def test_what_is_solved_for_is_the_least_squares_solution_on_its_support() -> None:
    weight, gram = problem()
    stays = mask_of(weight.abs(), 0.5, Pattern())
    found = refined(weight * stays, stays, weight, gram, 200)
    system = held(gram)
    for group in range(2):
        for row in range(5):
            own = stays[group, row]
            best = torch.linalg.solve(system[group][own][:, own], system[group][own] @ weight[group, row])
            torch.testing.assert_close(found[group, row, own], best, rtol=1e-7, atol=1e-7)
            assert not found[group, row, ~own].any()


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(2, 4), Pattern(block=3)])
def test_rounds_come_nearer_than_magnitude_solved_for(pattern: Pattern) -> None:
    weight, gram = problem()
    stays = mask_of(weight.abs(), 0.5, pattern)
    at_once = refined(weight * stays, stays, weight, gram, 200)
    found = thinned(weight, gram, 0.5, pattern)
    assert float((found == 0).double().mean()) == pytest.approx(0.5, abs=0.01)
    assert error(found, weight, gram) < error(at_once, weight, gram)


def test_a_weight_that_stands_in_for_itself_twice_goes_for_nothing() -> None:
    """Two features that are always the same: half of the weights can go."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator, dtype=torch.float64).repeat_interleave(2, 1)
    weight = torch.randn(1, 4, 16, generator=generator, dtype=torch.float64)
    gram = (x.mT @ x / 200)[None]
    found = thinned(weight, gram, 0.5, Pattern(1, 2))
    assert error(found, weight, gram) < 1e-3 * float((weight @ gram * weight).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_that_have_no_sparse_form_are_not_timed(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)).to(dtype).eval()
    result = PassManager([Sparsify(ratio=0.5)]).run(trace(net, (images(2, 3, 9, 9).to(dtype),)))
    assert zeros(result)["1"] == pytest.approx(0.5, abs=0.02)
    assert result.record.notes == []


def test_a_layer_that_bears_no_zeros_is_left() -> None:
    site = thinner(error=1e-9).record.passes[0].sites[1]
    assert (site.outcome, site.reason) == ("left", "it could not be fitted: no share of zeros keeps its error to 1e-09")
