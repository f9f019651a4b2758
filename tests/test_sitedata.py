"""Sites are fitted in the order of the data, on what they will really get, towards what the original gave."""

from __future__ import annotations

import weakref
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
from fxcompile.sitedata import SiteData, synthetic_batch
from fxcompile.tracing import trace
from fxcompile.walking import Walk


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


def test_what_is_not_finite_where_the_original_is_has_an_infinite_error() -> None:
    """NaN would be above no `max_error`, and the site would be kept."""
    program, x = traced(), randn(40, 2, 8, 8, seed=1)
    site = Site.of(program, next(node for node, _ in program.layers(nn.Conv2d)))

    class Lost(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return site.layer(x).sub(0.9).log()

    assert data_of(program, x, [site]).error(site, Lost()) == float("inf")


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


def test_a_fixed_batch_is_kept_whole_however_little_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcompile.sitedata.MEMORY", 1)
    model = Net(lambda net, x: net.a(x).reshape(4, -1), a=nn.Conv2d(2, 4, 3)).eval()
    program = trace(model, randn(4, 2, 8, 8))
    site = Site.of(program, next(node for node, _ in program.layers(nn.Conv2d)))
    data = data_of(program, randn(80, 2, 8, 8), [site])
    assert [len(given) for given, _ in data.fit_pairs(site)] == [4]
    assert [len(given) for given, _ in data.held_pairs(site)] == [4]


def test_no_sample_is_both_fitted_to_and_measured_on() -> None:
    program, x = traced(), randn(37, 2, 8, 8, seed=1)
    site = Site.of(program, next(node for node, _ in program.layers(nn.Conv2d)))
    data = data_of(program, x, [site])
    fit, held = (torch.cat([given for given, _ in pairs]) for pairs in (data.fit_pairs(site), data.held_pairs(site)))
    places = [int((x - sample).flatten(1).abs().amax(1).argmin()) for sample in (*fit, *held)]
    assert sorted(places) == list(range(37))
    assert len(held) == 9
    for given, wanted in data.held_pairs(site):
        assert torch.allclose(site.layer(given), wanted, atol=1e-6)


class Branching(nn.Module):
    """A residual and a concatenation: `c` and `d` see what several layers before them gave."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def features(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """What goes into each layer, and what comes out."""
        a = self.a(x)
        b = self.b(a.relu())
        joined = torch.cat([b + a, b.sigmoid()], 1)
        c = self.c(joined)
        return {"a": (x, a), "b": (a.relu(), b), "c": (joined, c), "d": (c + a, self.d(c + a))}

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)["d"][1]


class Halve(Damage):
    """Puts two layers in the place of one, the first of them at half of its weight."""

    name: ClassVar = "halve"

    def rewrite(self, site: Site) -> Replacement:
        self.seen[site.name] = site
        width = site.layer.out_channels
        second = nn.Conv2d(width, width, 1)
        with torch.no_grad():
            second.weight.copy_(torch.eye(width)[:, :, None, None])
            second.bias.zero_()
        return [with_parameters(site.layer, weight_matrix(site.layer) * self.factor, site.layer.bias), second]


def test_every_site_of_a_branching_network_is_fitted_to_the_original_from_what_is_already_rewritten() -> None:
    """Held against a copy of the model in which the layers that a site follows are those that came out of the run."""
    model, x = Branching().eval(), randn(24, 2, 8, 8, seed=1)
    with torch.no_grad():
        original = model.features(x)
    Halve.seen.clear()
    result = PassManager([Halve()], calibration=x).run(trace(model, x[:2]))
    assert [site.outcome for site in result.record.passes[0].sites] == ["kept"] * 4
    rewritten = Branching().eval()
    for name in ("a", "b", "c", "d"):
        with torch.no_grad():
            inputs, wanted = rewritten.features(x)[name][0], original[name][1]
        pairs = Halve.seen[name].pairs
        given, outputs = (torch.cat(list(side)) for side in zip(*pairs, strict=True))
        assert len(given) == 18
        places = [int((inputs - sample).flatten(1).abs().amax(1).argmin()) for sample in given]
        assert len(set(places)) == 18
        assert torch.allclose(inputs[places], given, atol=1e-5)
        assert torch.allclose(wanted[places], outputs, atol=1e-5)
        layers = [layer for _, layer in result.program.layers(nn.Conv2d)]
        at = 2 * "abcd".index(name)
        setattr(rewritten, name, nn.Sequential(*layers[at : at + 2]))
    with torch.no_grad():
        assert torch.allclose(rewritten(x), result.program(x), atol=1e-5)


def test_without_data_the_inputs_are_drawn_from_the_range_of_the_examples() -> None:
    program = trace(Net(lambda net, x: net.a(x), a=nn.Conv2d(2, 4, 3)).eval(), 5 + 2 * randn(8, 2, 16, 16))
    (first,), (again,), (other,) = (synthetic_batch(program, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == program.examples[0].shape
    assert float(first.mean()) == pytest.approx(5, abs=0.2)
    assert float(first.std()) == pytest.approx(2, abs=0.1)
    site = Site.of(program, next(node for node, _ in program.layers(nn.Conv2d)))
    ((given, wanted),) = data_of(program, None, [site]).held_pairs(site)
    assert torch.equal(given, first)
    assert torch.allclose(site.layer(given), wanted, atol=1e-6)


def test_each_input_of_several_has_the_rows_of_the_same_samples() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(2, 4, 3)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return self.a(x + shift)

    x = randn(20, 2, 5, 5, seed=1)
    shift = x.mean((1, 2, 3), keepdim=True)
    program = trace(Two().eval(), (x[:2], shift[:2]))
    original = program.snapshot()
    site = Site.of(program, next(node for node, _ in program.layers(nn.Conv2d)))
    data = SiteData.of(program, original, as_calibration({"shift": shift, "x": x}, program.inputs), [site], seed=0)
    given = torch.cat([inputs for inputs, _ in (*data.fit_pairs(site), *data.held_pairs(site))])
    assert all((x + shift - sample).flatten(1).abs().amax(1).min() < 1e-6 for sample in given)


@pytest.mark.parametrize("depth", [4, 16])
def test_what_is_held_at_a_site_does_not_grow_with_the_depth_of_the_network(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from outside: values that both walks computed and anything still refers to, when a site is rewritten."""
    refs: list[weakref.ref[Tensor]] = []
    compute = Walk._compute

    def counted(self: Walk, node: Any, index: int) -> Any:
        value = compute(self, node, index)
        if node.op in ("call_module", "call_function"):
            refs.append(weakref.ref(value))
        return value

    monkeypatch.setattr(Walk, "_compute", counted)
    alive: list[int] = []

    class Looking(Damage):
        name: ClassVar = "looking"

        def rewrite(self, site: Site) -> Replacement:
            alive.append(sum(ref() is not None for ref in refs))
            return [with_parameters(site.layer, weight_matrix(site.layer) * 0.9, site.layer.bias)]

    layers = [layer for _ in range(depth) for layer in (nn.Conv2d(2, 2, 3, padding=1), nn.ReLU())]
    program = trace(nn.Sequential(*layers).eval(), randn(2, 2, 8, 8))
    PassManager([Looking()], calibration=randn(24, 2, 8, 8), verify="off").run(program)
    assert len(alive) == depth
    batches = 2  # 18 samples to fit to, 6 to measure on
    assert max(alive) <= 4 * batches  # a site's inputs and outputs, and a ReLU's input on either side
