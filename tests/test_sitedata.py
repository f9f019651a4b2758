"""Sites are fitted in the order of the data, on what they will really get, towards what the original gave."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from helpers import Net
from torch import Tensor, nn

from fxcompile import layer_stats
from fxcompile.calibration import as_calibration
from fxcompile.contracts import Approximate
from fxcompile.errors import CalibrationError
from fxcompile.fitting import refit, with_parameters
from fxcompile.manager import PassManager
from fxcompile.patches import weight_matrix
from fxcompile.program import FEATURE, Program
from fxcompile.rewriting import Pass, Replacement, Site
from fxcompile.sitedata import SiteData
from fxcompile.tracing import trace


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Damage(Pass):
    """Replaces every convolution by one with a worse weight; keeps what it was given."""

    name: ClassVar = "damage"
    contract: ClassVar = Approximate()
    seen: ClassVar[dict[str, Site]] = {}
    factor: float = 0.5

    def sites(self, program: Program) -> Any:
        yield from (Site.of(program, node) for node, _ in program.layers(nn.Conv2d))

    def rewrite(self, site: Site) -> Replacement:
        self.seen[site.name] = site
        return [with_parameters(site.layer, weight_matrix(site.layer) * self.factor, site.layer.bias)]


def two(net: Net, x: Tensor) -> Tensor:
    return net.b(net.a(x).relu())


def traced(function: Any = two, **layers: nn.Module) -> Program:
    torch.manual_seed(0)
    layers = layers or {"a": nn.Conv2d(2, 4, 3, padding=1), "b": nn.Conv2d(4, 3, 3)}
    return trace(Net(function, **layers).eval(), randn(2, 2, 8, 8))


def data_of(program: Program, calibration: Tensor | None, sites: list[Site]) -> SiteData:
    original = program.snapshot()
    for node in (*original.graph.nodes, *program.graph.nodes):
        node.meta[FEATURE] = node.name
    data = None if calibration is None else as_calibration(calibration, program.inputs)
    return SiteData.of(program, original, data, sites, seed=0)


def test_each_site_gets_its_new_inputs_and_the_original_outputs() -> None:
    program, x = traced(), randn(40, 2, 8, 8, seed=1)
    a, b = program.module.a, program.module.b
    result = PassManager([Damage()], calibration=x).run(program)
    second = Damage.seen["b"]
    inputs, outputs = (torch.cat(list(side)) for side in zip(*second.pairs, strict=True))
    assert len(inputs) == 30  # three quarters of the data are to fit to
    new = result.module.a(x).relu()
    for given, wanted in zip(inputs, outputs, strict=True):
        at = int((new - given).flatten(1).norm(dim=1).argmin())
        assert torch.allclose(new[at], given, atol=1e-6)
        assert torch.allclose(b(a(x[at : at + 1]).relu())[0], wanted, atol=1e-5)
    assert not torch.allclose(new, a(x).relu(), atol=1e-3)


def test_the_stated_error_is_that_of_the_samples_held_out() -> None:
    program, x = traced(), randn(40, 2, 8, 8, seed=1)
    site = Site.of(program, next(node for node, _ in program.layers(nn.Conv2d)))
    data = data_of(program, x, [site])
    held = torch.cat([given for given, _ in data.held_pairs(site)])
    assert len(held) == 10
    worse = with_parameters(site.layer, weight_matrix(site.layer) * 0.7, site.layer.bias)
    wanted = site.layer(held)
    assert data.error(site, [worse]) == pytest.approx(float((worse(held) - wanted).norm() / wanted.norm()), rel=1e-4)


def test_the_last_layer_is_solved_for_and_kept_only_if_nearer_on_held_out_data() -> None:
    program, x = traced(), randn(40, 2, 8, 8, seed=1)
    site = Site.of(program, next(node for node, _ in program.layers(nn.Conv2d)))
    data = data_of(program, x, [site])
    worse = with_parameters(site.layer, weight_matrix(site.layer) * 0.7, site.layer.bias)
    (fitted,), error = data.fit(site, [worse])  # type: ignore[misc]
    assert error < 0.02 < data.error(site, [worse])
    assert torch.allclose(fitted.weight, refit(worse, data.fit_pairs(site)).weight, atol=1e-6)
    replacement, unchanged = data.fit(site, [site.layer])
    assert replacement[0] is site.layer  # type: ignore[index]
    assert unchanged < 1e-6


def test_statistics_that_a_pass_collected_are_not_collected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = traced(), randn(40, 2, 8, 8, seed=1)
    site = Site.of(program, next(node for node, _ in program.layers(nn.Conv2d)))
    data = data_of(program, x, [site])
    site = site.with_pairs(data.fit_pairs(site))
    assert site.collected is None
    assert site.statistics() is site.statistics() is site.collected
    torch.manual_seed(1)
    first, last = nn.Conv2d(2, 3, 1, padding=1, bias=False), nn.Conv2d(3, 4, 3)
    streamed = data.statistics(site.with_pairs(site.pairs), [first, last])
    monkeypatch.setattr(layer_stats.LayerStats, "update", None)
    derived = data.statistics(site, [first, last])
    for mine, theirs in zip(derived.raw(), streamed.raw(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_a_site_takes_no_more_rows_than_a_fit_needs() -> None:
    """18 features: 8,372 rows of the 56,448 that 72 samples of 28 x 28 have, alike from each batch and each time."""
    program, x = trace(nn.Conv2d(2, 3, 3, padding=1), randn(2, 2, 28, 28)), randn(96, 2, 28, 28, seed=1)
    site = Site.of(program, next(node for node, _ in program.layers(nn.Conv2d)))
    data = data_of(program, x, [site])
    site = site.with_pairs(data.fit_pairs(site))
    assert 8372 <= site.statistics().rows <= 8372 + len(site.pairs)
    again = site.with_pairs(site.pairs).statistics()
    assert torch.equal(again.centred().gram, site.statistics().centred().gram)


def test_a_layer_that_is_called_again_is_fitted_to_all_its_calls() -> None:
    """The second call sees what the first never does: only it tells the weights of the second channel."""

    def twice(net: Net, x: Tensor) -> Tensor:
        return net.a(x * net.mask(x)) + net.a(x.flip(1) * 3)

    class Mask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)

    program, x = traced(twice, a=nn.Conv2d(2, 4, 3), mask=Mask()), randn(40, 2, 8, 8, seed=1)
    before = program(x)
    result = PassManager([Damage(factor=0.0)], calibration=x).run(program)
    assert len(Damage.seen["a"].pairs) == 2
    assert result.record.passes[0].sites[0].error < 0.05
    assert float((result.program(x) - before).norm() / before.norm()) < 0.05


def test_a_layer_called_on_its_own_output_is_fitted_too() -> None:
    def again(net: Net, x: Tensor) -> Tensor:
        return net.a(net.a(x).relu())

    program, x = traced(again, a=nn.Conv2d(2, 2, 3, padding=1)), randn(40, 2, 8, 8, seed=1)
    before = program(x)
    result = PassManager([Damage(factor=0.7)], calibration=x).run(program)
    assert float((result.program(x) - before).norm() / before.norm()) < 0.05


def test_without_calibration_data_nothing_is_fitted() -> None:
    program = traced()
    site = Site.of(program, next(node for node, _ in program.layers(nn.Conv2d)))
    data = data_of(program, None, [site])
    assert data.fit_pairs(site) == ()
    worse = with_parameters(site.layer, weight_matrix(site.layer) * 0.7, site.layer.bias)
    replacement, error = data.fit(site, [worse])
    assert replacement == [worse]
    assert error > 0.1


def test_data_that_does_not_fit_into_memory_is_cut_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = traced(), randn(80, 2, 8, 8, seed=1)
    monkeypatch.setattr("fxcompile.sitedata.MEMORY", 100_000)
    site = Site.of(program, next(node for node, _ in program.layers(nn.Conv2d)))
    data = data_of(program, x, [site])
    used = sum(len(given) for given, _ in (*data.fit_pairs(site), *data.held_pairs(site)))
    assert used < 80
    assert data.note is not None
    assert "of 80 calibration samples" in data.note


def test_a_fixed_batch_needs_whole_batches() -> None:
    model = Net(lambda net, x: net.a(x).reshape(4, -1), a=nn.Conv2d(2, 4, 3)).eval()
    program = trace(model, randn(4, 2, 8, 8))
    assert not program.batch_is_free
    site = Site.of(program, next(node for node, _ in program.layers(nn.Conv2d)))
    data = data_of(program, randn(18, 2, 8, 8), [site])
    assert {len(given) for given, _ in (*data.fit_pairs(site), *data.held_pairs(site))} == {4}
    with pytest.raises(CalibrationError, match="4 samples at once"):
        data_of(program, randn(8, 2, 8, 8), [site])
