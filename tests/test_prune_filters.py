"""prune-filters: which filters go, how many, and what the layers behind make of the rest."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from fxcompile.passes import PruneFilters, Sparsify
from helpers import images, randn
from torch import Tensor, nn

from fxcompile.errors import BudgetError, PipelineError
from fxcompile.manager import PassManager, Result
from fxcompile.pipeline import parse_pipeline
from fxcompile.testing import check_pass
from fxcompile.tracing import trace


def chain(widths: tuple[int, ...] = (3, 16, 16, 8), bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for ins, outs in pairwise(widths):
        layers += [nn.Conv2d(ins, outs, 3, padding=1, bias=bias), nn.BatchNorm2d(outs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5)).double().eval()


def pruned(model: nn.Module, calibrated: bool = True, **options: Any) -> Result:
    x = images(64, 3, 12, 12)
    return PassManager([PruneFilters(**options)], calibration=x if calibrated else None).run(trace(model, (x[:2],)))


def widths(result: Result) -> list[int]:
    return [layer.out_channels for _, layer in result.program.layers(nn.Conv2d)]


IMPORTANCES = ["least-squares", "l1", "l2", "geometric-median", "batch-norm", "activation", "taylor", "lamp", "random"]


@pytest.mark.parametrize(
    "options",
    [{"ratio": 0.5}, {"saving": 0.4}, {"ratio": 0.4, "scope": "network"}, {"ratio": 0.5, "iterations": 2}]
    + [{"importance": kind} for kind in IMPORTANCES[1:]],
    ids=str,
)
def test_it_holds_on_drawn_networks(options: dict[str, Any]) -> None:
    check_pass(PruneFilters(**options), examples=20, seed=0, onnx_examples=1)


def test_nothing_goes_at_a_ratio_of_nothing() -> None:
    for options in ({"ratio": 0}, {"saving": 0}):
        assert [site.outcome for site in pruned(chain(), **options).record.passes[0].sites] == ["left"] * 3


def test_a_ratio_of_each_layer() -> None:
    assert widths(pruned(chain(), ratio=0.5)) == [8, 8, 4]
    assert widths(pruned(chain(), ratio=0.25)) == [12, 12, 6]
    assert widths(pruned(chain(), ratio=0.95)) == [1, 1, 1]
    assert widths(pruned(chain(), ratio=0.3, round_to=4)) == [12, 12, 4]
    assert widths(pruned(chain((3, 64, 80, 8)), ratio=0.3)) == [48, 56, 6]


@pytest.mark.parametrize("objective", ["macs", "parameters", "bytes"])
@pytest.mark.parametrize("saving", [0.2, 0.6])
def test_as_much_is_saved_as_is_wanted_and_little_more(objective: str, saving: float) -> None:
    record = pruned(chain((3, 32, 32, 32)), saving=saving, objective=objective).record
    left = getattr(record.after, objective) / getattr(record.before, objective)
    assert 1 - saving - 0.06 <= left <= 1 - saving


def test_a_network_wide_ratio_counts_all_filters_together() -> None:
    found = widths(pruned(chain(), ratio=0.5, scope="network"))
    assert 18 <= sum(found) <= 20
    assert min(found) >= 1


def test_what_is_out_of_reach_is_said() -> None:
    with pytest.raises(BudgetError, match=r"saving=0.999 is out of reach: .* of the network's MACs are saved; choose"):
        pruned(chain(), saving=0.999)


@pytest.mark.parametrize("text", ["ratio=1", "ratio=0.5, saving=0.5", "objective=bytes", "importance=best"])
def test_options_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(PipelineError):
        parse_pipeline(f"prune-filters({text})")


def test_filters_that_others_can_stand_in_for_cost_nothing() -> None:
    """Half of the channels are linear in the other half, without an activation between: all can be made up for."""
    torch.manual_seed(1)
    model = (
        nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double().eval()
    )
    mix = torch.randn(4, 2).double()
    model[0].weight.data = (mix @ torch.randn(2, 3).double()).reshape(4, 3, 1, 1)
    result = pruned(model, ratio=0.5, only="0")
    assert widths(result)[0] == 2
    assert result.record.passes[0].sites[0].error < 0.02
    assert pruned(model, ratio=0.5, only="0", importance="random", repair=False).record.passes[0].sites[0].error > 0.1


def test_of_two_layers_that_share_channels_the_one_that_matters_to_the_outputs_has_its_way() -> None:
    class Two(nn.Module):
        """Four channels for one layer, twice as large, and four for another, whose output counts a thousand times."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 1)
            self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.first(x))
            return 1e-3 * self.left(y) + self.right(y)

    torch.manual_seed(0)
    model = Two().double().eval()
    with torch.no_grad():
        model.left.weight[:, 4:] *= 0.5
        model.right.weight[:, :4] *= 0.6
        model.first.weight[:4] *= 2
        model.first.bias.copy_(torch.arange(8) / 8)  # so that each can be told by it
    result = pruned(model, ratio=0.5)
    assert (result.program.module.get_submodule("first").bias >= 0.5).sum() == 4


def test_repair_brings_every_choice_nearer() -> None:
    for kind in IMPORTANCES:
        errors = [
            pruned(chain(), ratio=0.5, importance=kind, repair=repair).record.passes[0].error
            for repair in (True, False)
        ]
        assert errors[0] < errors[1], kind


def planted(scores: Tensor) -> nn.Sequential:
    """A network whose first layer's filters are the larger, and are scaled the more by its norm, the higher these."""
    model = chain((3, len(scores), 8))
    filters = randn(len(scores), 3, 3, 3)
    filters /= filters.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    model[0].weight.data = filters * scores.reshape(-1, 1, 1, 1)
    model[1].weight.data = scores.clone()
    model[1].bias.data = 2 * scores  # none is dead behind the ReLU
    return model


@pytest.mark.parametrize("kind", ["l1", "l2", "batch-norm", "activation", "lamp", "taylor", "least-squares"])
def test_the_filters_with_the_least_to_say_go_first(kind: str) -> None:
    """Each is ten times the one before, so that all criteria agree."""
    scores = torch.tensor([1.0, 0.001, 0.1, 0.01]).double()
    result = pruned(planted(scores), ratio=0.5, only="0", importance=kind)
    left = result.program.module.get_submodule("1").weight.detach()
    assert sorted(left.tolist()) == pytest.approx([0.1, 1.0])


def test_the_filter_that_is_nearest_to_all_others_goes_first() -> None:
    model = chain((3, 4, 8))
    corners = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1 / 3, 1 / 3, 1 / 3]]).double()
    model[0].weight.data = corners.reshape(4, 3, 1, 1).expand(4, 3, 3, 3).clone()
    result = pruned(model, ratio=0.25, only="0", importance="geometric-median", repair=False)
    assert torch.equal(result.program.module.get_submodule("0").weight[:, :, 1, 1], corners[:3])


def test_without_data_it_goes_by_the_weights() -> None:
    result = pruned(chain(), calibrated=False, ratio=0.5)
    assert widths(result) == [8, 8, 4]
    norms = chain()[0].weight.flatten(1).norm(dim=1)
    left = result.program.module.get_submodule("0").weight.flatten(1).norm(dim=1)
    assert torch.allclose(left.sort().values, norms.sort().values[8:])


def test_limits_leave_sites_as_they_are() -> None:
    sites = pruned(chain(), ratio=0.5, max_error=1e-6).record.passes[0].sites
    assert {site.outcome for site in sites} == {"left"}
    assert all("is above max_error=1e-06" in site.reason for site in sites)
    sites = pruned(chain(), ratio=0.5, min_saving=0.6).record.passes[0].sites
    assert {site.outcome for site in sites} == {"left"}  # 75 % of the later ones only as long as others go, too
    assert sites[0].reason == "it would save 50% of its MACs, below min_saving=0.6"
    sites = pruned(chain(), ratio=0.5, min_saving=0.45).record.passes[0].sites
    assert {site.outcome for site in sites} == {"kept"}


def test_what_each_site_saves_adds_up() -> None:
    for options in ({"ratio": 0.5}, {"ratio": 0.5, "iterations": 3}):
        report = pruned(chain(), **options).record.passes[0]
        saved = sum(site.before.parameters - site.after.parameters for site in report.sites)
        assert saved == report.before.parameters - report.after.parameters


def test_the_same_seed_gives_the_same_filters_and_another_others() -> None:
    first, second, other = (
        PassManager([PruneFilters(importance="random")], seed=seed).run(trace(chain(), (images(2, 3, 12, 12),)))
        for seed in (0, 0, 1)
    )
    weights = [result.program.module.get_submodule("0").weight for result in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_operation_that_is_not_known_keeps_what_is_around_it() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = chain((3, 8, 8)), nn.Linear(5, 5)
            self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.nn.functional.cosine_similarity(self.left(x), x[:, :1], dim=1)
            return self.head(self.body(x)) + y.mean() + self.right(self.left(x)).mean()

    result = pruned(Odd().double().eval(), ratio=0.5)
    sites = {site.name: site for site in result.record.passes[0].sites}
    assert sites["left"].outcome == "left"
    assert "cosine_similarity, which they are not followed through" in sites["left"].reason
    assert sites["body.0"].outcome == "kept"


class Residual(nn.Module):
    """`body` is added to `stem`: their filters go together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        out: Tensor = self.head(y + self.body(y).relu())
        return out


def test_any_layer_of_a_group_can_be_named() -> None:
    model = Residual().double().eval()
    assert widths(pruned(model, ratio=0.5)) == [4, 4, 2]
    for options in ({"skip": "body"}, {"skip": "stem"}, {"only": "head"}):
        assert widths(pruned(model, ratio=0.5, **options)) == [8, 8, 2]
    for name in ("stem", "body"):
        assert widths(pruned(model, ratio=0.5, only=name)) == [4, 4, 2]


@pytest.mark.parametrize("iterations", [1, 2, 3, 5, 8])
def test_as_many_filters_go_in_however_many_rounds(iterations: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=4), nn.ReLU(), nn.Conv2d(24, 4, 1)
    ).double().eval()  # fmt: skip
    assert widths(pruned(model, ratio=0.5, iterations=iterations)) == [12, 12, 4]
    assert widths(pruned(chain((3, 8, 8, 8)), ratio=0.3, iterations=iterations)) == [6, 6, 6]


class Reader(nn.Module):
    """Only a recurrent layer takes the filters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lstm, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.LSTM(96, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.conv(x).relu().permute(0, 3, 1, 2).flatten(2))
        out: Tensor = self.fc(y[:, -1])
        return out


def test_what_a_recurrent_layer_makes_of_it_counts() -> None:
    torch.manual_seed(0)
    model = Reader().double().eval()
    report = pruned(model, ratio=0.5).record.passes[0]
    (site,) = (site for site in report.sites if site.name == "conv")
    assert site.error == pytest.approx(report.error)
    assert site.error > 0
    assert pruned(model, ratio=0.5, max_error=1e-6).record.passes[0].outcome == "left"


def test_zeros_stay_when_filters_go() -> None:
    x = images(64, 3, 12, 12)
    passes = [Sparsify(ratio=0.6), PruneFilters(ratio=0.5)]
    result = PassManager(passes, calibration=x).run(trace(chain(), (x[:2],)))
    for name in ("0", "3", "6"):
        weight = result.program.module.get_submodule(name).weight
        assert float((weight == 0).double().mean()) > 0.2
    assert widths(result) == [8, 8, 4]


def test_a_layer_left_for_its_error_lets_others_stay_pruned() -> None:
    """Errors that one layer brings to the next go with it: not all that were above the limit are put back at once."""
    whole = pruned(chain(), ratio=0.5).record.passes[0].sites
    limit = sorted(site.error for site in whole)[1]
    sites = pruned(chain(), ratio=0.5, max_error=limit).record.passes[0].sites
    kept = [site for site in sites if site.outcome == "kept"]
    assert len(kept) >= 2
    assert all(site.error <= limit for site in kept)


@pytest.mark.parametrize("kind", ["least-squares", "activation", "taylor"])
def test_poolings_between_are_no_takers(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.AvgPool2d(3), nn.Conv2d(8, 4, 1)
    ).double().eval()  # fmt: skip
    assert widths(pruned(model, ratio=0.5, importance=kind)) == [4, 4, 4]
