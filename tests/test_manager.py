"""The pass manager keeps, leaves, rolls back and raises as the contract says, and records all of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from fxcompile.passes import EliminateIdentity, FoldBatchNorm
from torch import Tensor, nn

from fxcompile.contracts import Approximate, Exact, Trained
from fxcompile.dumping import dump
from fxcompile.errors import ContractError, RewriteError, UsageError
from fxcompile.fitting import with_parameters
from fxcompile.manager import PassManager
from fxcompile.patches import weight_matrix
from fxcompile.program import FEATURE, ORIGIN, Program
from fxcompile.rewriting import Pass, Replacement, Site, Skip
from fxcompile.tracing import trace


class Net(nn.Module):
    """Two convolutions with batch norms, a residual add and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)) + y)
        return self.head(self.drop(y.mean((2, 3))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    for norm in (model.bn1, model.bn2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def program(net: Net) -> Program:
    return trace(net, torch.randn(2, 3, 10, 10))


def scaled(layer: nn.Conv2d, factor: float) -> nn.Module:
    return with_parameters(layer, weight_matrix(layer) * factor, layer.bias)


class Scale(Pass):
    """A wrong or lossy pass: multiplies each convolution's weight."""

    name: ClassVar = "scale"
    contract: ClassVar = Exact()
    factor: float = 1.001

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        for node, layer in program.layers(nn.Conv2d):
            if layer.in_channels == 3:
                yield Skip.of(node, "it takes the image")
            else:
                yield Site.of(program, node)

    def rewrite(self, site: Site) -> Replacement:
        return [scaled(site.layer, self.factor)]


class Lossy(Scale):
    """The same, which says that it is approximate."""

    name: ClassVar = "lossy"
    contract: ClassVar = Approximate()


class Choosing(Lossy):
    """Three candidates, of which the second is the nearest, and the third saves more than the others."""

    name: ClassVar = "choosing"

    def candidates(self, site: Site) -> Iterator[Replacement]:
        yield [scaled(site.layer, 1.5)]
        yield [scaled(site.layer, 1.01)]
        yield [thinned(site.layer)]


def thinned(layer: nn.Conv2d) -> nn.Module:
    """The middle tap alone."""
    kernel = nn.Conv2d(layer.in_channels, layer.out_channels, 1).requires_grad_(False)
    kernel.weight.copy_(layer.weight[:, :, 1:2, 1:2])
    return kernel


@pytest.mark.parametrize("calibrated", [False, True])
def test_of_the_candidates_the_nearest_is_taken(program: Program, calibrated: bool) -> None:
    data = torch.randn(32, 3, 10, 10, generator=torch.Generator().manual_seed(1)) if calibrated else None
    (skipped, site) = PassManager([Choosing()], calibration=data).run(program).record.passes[0].sites
    assert (skipped.outcome, site.outcome) == ("left", "kept")
    assert site.error < 0.011
    assert site.after.macs == site.before.macs


class Halved(Lossy):
    """Its weights must stay what it makes of them."""

    name: ClassVar = "halved"
    refit: ClassVar = False


@pytest.mark.parametrize(("kind", "solved"), [(Lossy, True), (Halved, False)])
def test_the_last_layer_is_solved_for_unless_the_pass_says_no(
    program: Program, kind: type[Lossy], solved: bool
) -> None:
    data = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    result = PassManager([kind(factor=0.5)], calibration=data).run(program)
    (_, site) = result.record.passes[0].sites
    weight, wanted = (item.module.get_submodule(site.name).weight for item in (result.program, program))
    assert torch.equal(weight, wanted / 2) == (not solved)
    assert site.error < 0.02 if solved else site.error > 0.4


def test_candidates_that_save_too_little_are_none(program: Program) -> None:
    (_, site) = PassManager([Choosing(min_saving=0.5)]).run(program).record.passes[0].sites
    assert (site.outcome, site.reason, site.after.macs) == ("kept", "", site.before.macs // 9)
    (_, site) = PassManager([Choosing(min_saving=0.95)]).run(program).record.passes[0].sites
    assert (site.outcome, site.reason) == ("left", "it would save 89% of its MACs, below min_saving=0.95")


def test_exact_passes_keep_the_function(program: Program, net: Net) -> None:
    result = PassManager([FoldBatchNorm(), EliminateIdentity()]).run(program)
    x = torch.randn(5, 3, 10, 10)
    wanted = net(x)
    assert (result.module(x) - wanted).abs().max() < 1e-6 * wanted.abs().max()
    assert [report.outcome for report in result.record.passes] == ["kept", "kept"]
    assert result.record.after.parameters == result.record.before.parameters - 4 * 8 + 8  # conv1 gains a bias
    assert not list(result.program.layers(nn.BatchNorm2d, nn.Dropout))


def test_the_program_given_is_untouched(program: Program) -> None:
    before = program.module.code
    weights = {name: tensor.clone() for name, tensor in program.module.state_dict().items()}
    PassManager([FoldBatchNorm()]).run(program)
    assert program.module.code == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in program.module.state_dict().items())


def test_a_broken_contract_names_pass_site_and_smallest_input(program: Program) -> None:
    with pytest.raises(ContractError) as caught:
        PassManager([Scale()]).run(program)
    text = str(caught.value)
    assert "layer 'conv2'" in text
    assert "pass 'scale'" in text
    assert "the smallest input found is impulse at 0% of the map, 1 sample, seed 0" in text


def test_rollback_leaves_the_site_as_it_was(program: Program) -> None:
    result = PassManager([Scale(), FoldBatchNorm()], verify="rollback").run(program)
    first, second = result.record.passes
    assert first.outcome == "left"
    assert [(site.name, site.outcome) for site in first.sites] == [("conv1", "left"), ("conv2", "rolled back")]
    assert second.outcome == "kept"
    x = torch.randn(2, 3, 10, 10)
    assert torch.allclose(result.module(x), program(x), atol=1e-5)


def test_verify_off_keeps_whatever_the_pass_says(program: Program) -> None:
    result = PassManager([Scale(factor=2.0)], verify="off").run(program)
    assert result.record.passes[0].examples == 0
    assert torch.equal(result.program.module.conv2.weight, 2 * program.module.conv2.weight)


def test_keep_goes_on_and_writes_down_what_broke(program: Program) -> None:
    result = PassManager([Scale(), FoldBatchNorm()], verify="keep").run(program)
    first, second = result.record.passes
    assert (first.outcome, second.outcome) == ("kept", "kept")
    kept = first.sites[1]
    assert (kept.name, kept.outcome) == ("conv2", "kept")
    assert kept.reason.startswith("pass 'scale' breaks its contract (exact) there: ")
    wrong = PassManager([Scale(), FoldBatchNorm()], verify="off").run(program)
    assert torch.equal(result.program.module.conv2.weight, wrong.program.module.conv2.weight)


class OutOfContext(Pass):
    """Right for its site taken alone, wrong in the network: it moves a shared value's consumer."""

    name: ClassVar = "out-of-context"
    contract: ClassVar = Exact()

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        for node, _ in program.layers(nn.BatchNorm2d):
            yield Site.of(program, node)

    def rewrite(self, site: Site) -> Replacement:
        site.node.replace_input_with(site.node.all_input_nodes[0], site.node.all_input_nodes[0])
        for other in site.node.graph.nodes:  # what no pass may do: edit the graph elsewhere
            if other.name == "add":
                other.args = (other.args[0], other.args[0])
        return [site.layer]


def test_what_only_the_whole_network_shows_is_found_and_rolled_back(program: Program) -> None:
    with pytest.raises(ContractError, match="out-of-context"):
        PassManager([OutOfContext()]).run(program)
    result = PassManager([OutOfContext()], verify="rollback").run(program)
    assert result.record.passes[0].outcome == "rolled back"
    x = torch.randn(2, 3, 10, 10)
    assert torch.equal(result.program(x), program(x))
    kept = PassManager([OutOfContext()], verify="keep").run(program)
    assert kept.record.passes[0].outcome == "kept"
    assert kept.record.passes[0].reason.startswith("pass 'out-of-context' breaks its contract (exact) there: ")
    assert not torch.allclose(kept.program(x), program(x), rtol=1e-2)


class Rounded(nn.Module):
    """Two layers with whole numbers between them, and no straight-through estimate: only the second learns."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).to(torch.int32).to(x.dtype))


class Cut(Pass):
    """Puts a layer that cannot learn in front of each convolution of eight channels."""

    name: ClassVar = "cut"
    contract: ClassVar = Trained()

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        for node, layer in program.layers(nn.Conv2d):
            if layer.in_channels == 8:
                yield Site.of(program, node)

    def rewrite(self, site: Site) -> Replacement:
        return Rounded(nn.Conv2d(8, 8, 1), site.layer)


def test_a_trained_pass_must_let_gradients_reach_every_parameter(program: Program) -> None:
    with pytest.raises(ContractError, match="no gradient reaches parameter 'conv2"):
        PassManager([Cut()]).run(program)


def test_what_the_model_itself_keeps_from_training_is_no_breach() -> None:
    """Layers ahead of a cast to whole numbers in the model learn nothing, before as after the rewrite."""

    class Coded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Conv2d(3, 8, 5), nn.Conv2d(8, 4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.back((8 * self.front(x)).to(torch.int32).to(x.dtype))

    torch.manual_seed(0)
    program = trace(Coded().eval(), torch.randn(2, 3, 12, 12))
    result = PassManager("stack-kernels(rank=4, activation=relu, min_saving=none)").run(program)
    assert [site.outcome for site in result.record.passes[0].sites] == ["kept", "kept"]
    assert all(parameter.grad is None for parameter in program.module.parameters())


def test_a_layer_that_does_not_train_excuses_no_layer_whose_name_begins_like_its_own() -> None:
    class Coded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(8, 1, 1))
            self.conv, self.conv2 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2((self.conv(x) + self.shift).to(torch.int32).to(x.dtype))

    torch.manual_seed(0)
    program = trace(Coded().eval(), 9 * torch.randn(2, 3, 6, 6))
    with pytest.raises(ContractError, match="no gradient reaches parameter 'conv2"):
        PassManager([Cut()]).run(program)


class Wrong(Pass):
    """Returns layers that do not fit."""

    name: ClassVar = "wrong"
    contract: ClassVar = Exact()
    channels: int = 9

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        yield Site.of(program, next(node for node, _ in program.layers(nn.Conv2d)))

    def rewrite(self, site: Site) -> Replacement:
        return [nn.Conv2d(3, self.channels, 3, padding=1)]


def test_a_wrong_shape_is_refused_by_name(program: Program) -> None:
    with pytest.raises(RewriteError, match=r"layer 'conv1': its replacement gives \(2, 9, 10, 10\)"):
        PassManager([Wrong()], verify="off").run(program)


def test_max_error_and_min_saving_leave_sites(program: Program) -> None:
    data = torch.randn(64, 3, 10, 10)
    held = PassManager([Lossy(factor=1.5, max_error=0.05)], calibration=data).run(program).record.passes[0]
    assert held.outcome == "kept"  # least squares goes back to the original weights
    report = PassManager([Lossy(factor=1.5, max_error=0.1)]).run(program).record.passes[0]
    assert report.outcome == "left"
    assert "is above max_error=0.1" in report.sites[1].reason
    report = PassManager([Lossy(min_saving=0.1)]).run(program).record.passes[0]
    assert report.sites[1].reason == "it would save none of its MACs, below min_saving=0.1"
    report = PassManager([Lossy(min_saving=0)]).run(program).record.passes[0]
    assert report.sites[1].reason == "it would save none of its MACs, against min_saving=0"
    assert PassManager([Lossy(min_saving=-0.1)]).run(program).record.passes[0].outcome == "kept"


@pytest.mark.parametrize(
    ("wanted", "saving", "reason"),
    [
        (None, -5.0, None),
        (0.1, 0.1, None),
        (0.1, 0.09, "it would save 9% of its MACs, below min_saving=0.1"),
        (0.1, -0.42, "it would cost 42% more MACs than it does, against min_saving=0.1"),
        (0.1, None, "it would save none of its MACs, below min_saving=0.1"),
        (0.0, 0.01, None),
        (0.0, 1e-15, "it would save none of its MACs, against min_saving=0"),
        (0.0, None, None),
        (-0.1, -0.1, None),
        (-0.1, -0.2, "it would cost 20% more MACs than it does, against min_saving=-0.1"),
    ],
)
def test_what_saves_too_little_is_said_in_words(wanted: float | None, saving: float | None, reason: str | None) -> None:
    assert Lossy(min_saving=wanted).too_little(saving) == reason


class Thin(Scale):
    """The middle tap alone, which saves, and is wrong."""

    name: ClassVar = "thin"

    def rewrite(self, site: Site) -> Replacement:
        return [thinned(site.layer)]


class Thinner(Thin):
    """The same, which says that it is approximate."""

    name: ClassVar = "thinner"
    contract: ClassVar = Approximate()


@pytest.mark.parametrize("pass_", [Thin(), Thinner(max_error=1e-3), Thinner(min_saving=0.95)], ids=str)
def test_a_site_that_is_not_kept_costs_what_it_did(program: Program, pass_: Pass) -> None:
    (_, site) = PassManager([pass_], verify="rollback").run(program).record.passes[0].sites
    assert site.outcome == ("rolled back" if type(pass_) is Thin else "left")
    assert site.before.macs > 0
    assert site.after == site.before


def test_fitting_finds_the_original_again(program: Program) -> None:
    data = torch.randn(64, 3, 10, 10)
    result = PassManager([Lossy(factor=0.5)], calibration=data).run(program)
    site = result.record.passes[0].sites[1]
    assert site.outcome == "kept"
    assert site.error is not None
    assert site.error < 0.02
    unfitted = PassManager([Lossy(factor=0.5)]).run(program).record.passes[0]
    assert unfitted.sites[1].error is not None
    assert unfitted.sites[1].error > 0.3
    assert "no calibration data" in unfitted.measured_on


def test_only_and_skip_select_layers(program: Program) -> None:
    kept = PassManager([FoldBatchNorm(only="conv1")]).run(program).record.passes[0]
    assert [site.name for site in kept.sites] == ["conv1"]
    kept = PassManager([FoldBatchNorm(skip=["*1"])]).run(program).record.passes[0]
    assert [site.name for site in kept.sites] == ["conv2"]


def test_origins_and_features_survive(program: Program) -> None:
    result = PassManager([FoldBatchNorm()]).run(program)
    node = next(node for node in result.program.graph.nodes if node.target == "conv1")
    assert node.meta[ORIGIN] == ("conv1", "bn1")
    assert node.meta[FEATURE] == "bn1"
    assert "from [conv1, bn1]" in dump(result.program)


def test_one_seed_gives_the_same_bits(program: Program) -> None:
    data = torch.randn(32, 3, 10, 10)
    first, second = (PassManager("fold-batchnorm", calibration=data, seed=3).run(program) for _ in range(2))
    for a, b in zip(first.module.state_dict().values(), second.module.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_module_trains_without_touching_the_original(program: Program, net: Net) -> None:
    result = PassManager([FoldBatchNorm()]).run(program)
    before = [tensor.clone() for tensor in net.parameters()]
    module = result.module.train()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.randn(4, 3, 10, 10)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("change", ["step", "statistics"])
def test_what_was_trained_is_not_written_as_it_was_before(program: Program, tmp_path: Path, change: str) -> None:
    result = PassManager([EliminateIdentity()]).run(program)
    module, file = result.module, tmp_path / "net.onnx"
    result.save_onnx(file)
    before = file.read_bytes()
    if change == "step":
        with torch.no_grad():
            next(module.parameters()).mul_(1.01)
    else:
        module.train()(torch.randn(4, 3, 10, 10))
    with pytest.raises(UsageError, match="trace it again"):
        result.save_onnx(file)
    assert file.read_bytes() == before


def test_dump_dir_holds_the_graph_after_each_pass(program: Program, tmp_path) -> None:  # type: ignore[no-untyped-def]
    PassManager([FoldBatchNorm(), EliminateIdentity()], dump_dir=tmp_path / "dump").run(program)
    names = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert names == ["00-traced.py", "01-fold-batchnorm.py", "02-eliminate-identity.py"]
    assert "bn1" in (tmp_path / "dump" / names[0]).read_text()
    assert "self.bn1" not in (tmp_path / "dump" / names[1]).read_text()


def test_an_empty_pipeline_changes_nothing(program: Program) -> None:
    result = PassManager("").run(program)
    assert result.record.passes == []
    assert result.record.before == result.record.after


def test_what_is_no_pass_and_no_program_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"FoldBatchNorm is no pass; give an instance, FoldBatchNorm\(\)"):
        PassManager([FoldBatchNorm])  # type: ignore[list-item]
    with pytest.raises(UsageError, match=r"Linear is no program; trace the model first"):
        PassManager("").run(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_word_that_verify_does_not_know_is_refused() -> None:
    with pytest.raises(UsageError, match="verify cannot be 'rolback'; did you mean 'rollback'"):
        PassManager("", verify="rolback")  # type: ignore[arg-type]


def test_the_error_of_a_pass_is_that_of_the_worst_output() -> None:
    """Boxes a thousand times larger than scores do not hide what becomes of the scores."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores, self.boxes = nn.Conv2d(3, 4, 5, padding=2), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.scores(x), 1000 * self.boxes(x)

    torch.manual_seed(0)
    model, data = Head().eval(), torch.randn(16, 3, 9, 9)
    result = PassManager("stack-kernels(rank=0.3)", calibration=data).run(trace(model, data[:2]))
    report = result.report().passes[0]
    assert report.error == pytest.approx(report.sites[0].error)
    assert report.error > 0.05  # type: ignore[operator]


def test_a_single_calibration_sample_is_not_called_held_out(program: Program) -> None:
    data = torch.randn(1, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    (report,) = PassManager([Lossy()], calibration=data).run(program).record.passes
    assert report.measured_on == "the one calibration sample, which was fitted to as well"


def test_a_glob_that_matches_no_layer_is_noted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2)).eval()
    record = PassManager("stack-kernels(skip=[nothere], only=[0])").run(trace(model, torch.randn(2, 3, 9, 9))).report()
    (note,) = [note for note in record.notes if "skip" in note]
    assert note.startswith("stack-kernels: skip=nothere matches no layer")


def test_as_many_inputs_are_drawn_as_the_user_wants_for_the_network_and_the_file(
    program: Program, tmp_path: Path
) -> None:
    for wanted, of_passes, of_file in ((None, 20, 8), (1, 1, 1), (25, 25, 25)):
        result = PassManager([FoldBatchNorm()], verify_examples=wanted).run(program)
        assert result.record.passes[0].examples == of_passes
        report = result.save_onnx(tmp_path / "m.onnx")
        assert report.file is not None
        assert report.file.examples == of_file
