"""The kit breaks what is wrong, says how in a file of its own, and leaves what is right in peace."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import explicit_padding as passes
import pytest
import torch
from explicit_padding import ExplicitPadding
from fxcompile.passes import EliminateIdentity, FoldBatchNorm
from gallery.pools import OverwritesABranch
from hypothesis import strategies as st
from pydantic import Field
from torch import nn

from fxcompile.comparing import Broken
from fxcompile.contracts import Approximate, Contract
from fxcompile.drawing import KINDS, Case, Inputs
from fxcompile.errors import UsageError
from fxcompile.layers import shallow_copy
from fxcompile.program import InputSpec, Program
from fxcompile.rewriting import Pass, Site, Skip
from fxcompile.testing import (
    Network,
    NothingChecked,
    PassFailure,
    Recipe,
    Step,
    check_pass,
    check_pipeline,
    networks,
    promises,
    structure,
)
from fxcompile.testing.checks import LONGEST, file_name
from fxcompile.testing.reproducing import inputs_text
from fxcompile.testing.trial import Trial


def broken(pass_: Pass, **options: object) -> PassFailure:
    with pytest.raises(PassFailure) as caught:
        check_pass(pass_, **{"examples": 300, "seed": 0, "onnx_examples": 0, **options})  # type: ignore[arg-type]
    return caught.value


# right passes


@pytest.mark.parametrize("pass_", [ExplicitPadding(), passes.Rescaled(), FoldBatchNorm(), EliminateIdentity()], ids=str)
def test_a_right_pass_holds_and_had_enough_to_do(pass_: Pass) -> None:
    summary = check_pass(pass_, examples=60, seed=1, onnx_examples=1)
    assert summary.networks == 60
    assert summary.with_sites >= 20
    assert summary.sites >= summary.with_sites
    assert summary.invalid <= 3
    assert summary.exported == 1


def test_right_passes_hold_together_in_any_order() -> None:
    summary = check_pipeline([ExplicitPadding(), FoldBatchNorm(), EliminateIdentity()], examples=60, seed=0)
    assert summary.with_sites >= 20


# wrong passes


@pytest.mark.parametrize(
    ("pass_", "promise", "evidence"),
    [
        (passes.SwappedSides(), "completes", "RewriteError"),
        (passes.OneSide(), "same_function", "differs by"),
        (passes.ForgottenDilation(), "completes", "RewriteError"),
        (passes.DroppedBias(), "same_function", "differs by"),
        (passes.RoundedWeight(), "same_function", "differs by"),
        (passes.CopiedWeight(), "nothing_copied", "the network grew by"),
        (passes.WrittenWeight(), "model_untouched", "has other values than before"),
        (passes.FrozenWeight(), "same_trainable", "trained in the model, and does not any more"),
        (passes.GlobalRandom(), "model_untouched", "the global random generator of torch was used"),
        (passes.NeverTheSame(), "repeatable", "a second run with the same seed gives something else"),
        (passes.NeverDone(), "idempotent", "run again on its own result, the pass rewrites"),
        (passes.DeafToSkip(), "selection", "the pass rewrites 'conv"),
        (passes.EditsElsewhere(), "same_function", "differs by"),
        (passes.Crashes(), "completes", "fails with KeyError: 'groups'"),
        (passes.OtherKernel(), "layers_consistent", "and yet its weight has shape"),
        (passes.Forgetful(), "gradients", "all gradients are zero"),
    ],
    ids=lambda value: str(value) if isinstance(value, Pass) else "",
)
def test_a_wrong_pass_is_found_and_shrunk(pass_: Pass, promise: str, evidence: str) -> None:
    failure = broken(pass_)
    assert failure.promise == promise
    assert evidence in failure.evidence
    assert failure.network is not None
    assert len(failure.network.steps) <= 5
    assert str(failure).startswith(f"{pass_} breaks a promise: ")
    assert failure.reproducer in str(failure)
    assert "hypothesis" not in failure.reproducer


def test_a_division_by_the_norm_of_a_dead_filter_is_found() -> None:
    failure = broken(passes.DeadFilter())
    assert failure.promise in ("same_function", "verified")
    assert failure.network is not None
    assert "dead filters" in dict(failure.network.odd).values()


def test_the_smallest_input_is_named_and_the_manager_agrees() -> None:
    failure = broken(passes.OneSide())
    assert "on impulse at 0% of the map, 1 sample, seed 0" in str(failure)
    assert "The pass manager's own verification finds it, too." in str(failure)
    assert failure.network is not None
    ((_, shape),) = failure.network.inputs
    assert max(shape) <= 2


def test_one_seed_finds_the_same_failure() -> None:
    first, second = broken(passes.OneSide(), seed=5), broken(passes.OneSide(), seed=5)
    assert first.network == second.network
    assert first.reproducer == second.reproducer


def test_approximate_passes_are_held_to_equality_on_demand() -> None:
    assert check_pass(passes.Louder(), examples=30, seed=0, onnx_examples=1).with_sites > 5
    failure = broken(passes.Louder(), exact=True)
    assert failure.promise == "same_function"
    assert "differs by" in failure.evidence
    assert "the pass manager" not in str(failure).lower()  # which holds it to the contract that it has


def test_a_pass_without_sites_is_not_taken_for_right() -> None:
    with pytest.raises(NothingChecked, match=r"none of 25 networks had a site of no-sites, so nothing was checked"):
        check_pass(passes.NoSites(), examples=25, seed=0)


class Lenient(ExplicitPadding):
    """Takes what its own limits forbid."""

    name: ClassVar[str] = "lenient"
    amount: int = Field(1, ge=1, le=4)

    def __init__(self, **options: object) -> None:
        super().__init__(**{**options, "amount": 1} if options.get("amount") == 5 else options)  # type: ignore[arg-type]


def test_options_outside_of_their_limits_must_be_refused() -> None:
    failure = broken(Lenient())
    assert failure.promise == "options"
    assert "lenient takes amount=5, which is outside of its limits" in str(failure)


class WrongAtItsLimit(ExplicitPadding):
    name: ClassVar[str] = "wrong-at-its-limit"
    amount: float = Field(0.5, gt=0, le=1)

    def sides(self, conv: nn.Conv2d) -> tuple[int, int, int, int]:
        left, right, top, bottom = super().sides(conv)
        return (left + right, 0, top, bottom) if self.amount == 1 else (left, right, top, bottom)


def test_options_at_their_limits_must_be_honoured() -> None:
    assert "wrong-at-its-limit(amount=1.0) breaks a promise" in str(broken(WrongAtItsLimit()))


class MisfitAtItsLimit(WrongAtItsLimit):
    """Its replacement does not fit: that is no way to refuse an option."""

    name: ClassVar[str] = "misfit-at-its-limit"

    def sides(self, conv: nn.Conv2d) -> tuple[int, int, int, int]:
        left, right, top, bottom = ExplicitPadding.sides(self, conv)
        return (left + 1, right, top, bottom) if self.amount == 1 else (left, right, top, bottom)


class RefusesItsLimit(MisfitAtItsLimit):
    name: ClassVar[str] = "refuses-its-limit"

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        if self.amount == 1:
            raise UsageError("amount=1 does not suit this network")
        yield from super().sites(program)


def test_an_option_may_be_refused_and_not_by_what_does_not_fit() -> None:
    assert "misfit-at-its-limit(amount=1.0) breaks a promise" in str(broken(MisfitAtItsLimit()))
    assert check_pass(RefusesItsLimit(), examples=100, seed=0, onnx_examples=0).with_sites > 20


class OnlyAfterFolding(ExplicitPadding):
    """Wrong for convolutions of which a batch norm was folded."""

    name: ClassVar[str] = "only-after-folding"

    def sides(self, conv: nn.Conv2d) -> tuple[int, int, int, int]:
        left, right, top, bottom = super().sides(conv)
        return (left + right, 0, top, bottom) if getattr(conv, "marked", False) else (left, right, top, bottom)


class Marks(ExplicitPadding):
    """Right by itself; leaves a mark."""

    name: ClassVar[str] = "marks"

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        for node, conv in program.layers(nn.Conv2d):
            if not hasattr(conv, "marked"):
                yield Site.of(program, node)

    def rewrite(self, site: Site) -> list[nn.Module]:
        conv = nn.Conv2d(
            site.layer.in_channels, site.layer.out_channels, site.layer.kernel_size, padding=site.layer.padding,
            device="meta", **self.arguments(site.layer),
        )  # fmt: skip
        conv.weight, conv.bias, conv.marked = site.layer.weight, site.layer.bias, True  # type: ignore[assignment]
        return [conv]


def test_passes_that_break_each_other_are_found_in_the_order_that_does() -> None:
    for right in (OnlyAfterFolding(), Marks()):
        assert check_pass(right, examples=30, seed=0, onnx_examples=0).with_sites > 5
    with pytest.raises(PassFailure) as caught:
        check_pipeline([OnlyAfterFolding(), EliminateIdentity(), Marks()], examples=200, seed=0)
    assert str(caught.value).startswith("marks, only-after-folding breaks a promise: ")


def test_a_pipeline_without_passes_or_sites_is_not_taken_for_right() -> None:
    with pytest.raises(UsageError, match="no passes"):
        check_pipeline([])
    with pytest.raises(NothingChecked, match="had a site of no-sites or no-sites"):
        check_pipeline([passes.NoSites(), passes.NoSites()], examples=25, seed=0)


# networks of one's own, planted steps, kept failures


def test_networks_of_ones_own_are_drawn_from_and_shrunk_by_hypothesis() -> None:
    strided = networks().filter(lambda network: "stride" in network.source)
    failure = broken(passes.OneSide(), networks=strided)
    assert failure.network is not None
    assert "stride" in failure.network.source
    assert len(failure.network.steps) <= 5


class RareSite(ExplicitPadding):
    """Its sites have a kernel of 7 with a dilation of 3 and padding; wrong there."""

    name: ClassVar[str] = "rare-site"

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        for item in super().sites(program):
            if isinstance(item, Site) and (item.layer.kernel_size, item.layer.dilation) == ((7, 7), (3, 3)):
                yield item


def test_an_author_can_say_what_makes_a_site() -> None:
    rare = Recipe((Step("convolution", (("kernel", 7), ("dilation", 3), ("padding", "half"))),))
    summary = check_pass(RareSite(), examples=60, seed=0, sites=[rare], onnx_examples=0)
    assert summary.with_sites > 5


@pytest.mark.usefixtures("random_draws")
def test_failures_are_kept_and_tried_first(tmp_path: Path) -> None:
    with pytest.raises(PassFailure):
        check_pass(passes.OneSide(), examples=300, onnx_examples=0, database=tmp_path)
    assert any(tmp_path.rglob("*"))
    failure = broken(passes.OneSide(), seed=None, examples=1, database=tmp_path)
    assert failure.promise == "same_function"


@pytest.mark.usefixtures("random_draws")
def test_a_seed_does_not_take_the_kept_failures_away(tmp_path: Path) -> None:
    with pytest.raises(PassFailure):
        check_pass(passes.OneSide(), examples=300, seed=4, onnx_examples=0, database=str(tmp_path))
    assert any(tmp_path.rglob("*"))
    assert broken(passes.OneSide(), seed=77, examples=1, database=tmp_path).promise == "same_function"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: check_pass(ExplicitPadding(), examples=0), "examples is 0, and nothing would be checked"),
        (lambda: check_pass(ExplicitPadding), r"is no pass; write ExplicitPadding\(\)"),
        (lambda: check_pass("fold-batchnorm"), "'fold-batchnorm' is no pass; give an instance"),
        (lambda: check_pipeline(ExplicitPadding(), examples=-1), "examples is -1"),
        (lambda: Recipe((Step("convolutoin"),)), "no step 'convolutoin' .* did you mean 'convolution'"),
    ],
)
def test_what_cannot_be_checked_is_said_in_a_sentence(call: Callable[[], object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        call()


class LargeKernel(ExplicitPadding):
    """Its sites have a kernel of 7."""

    name: ClassVar[str] = "large-kernel"

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        for item in super().sites(program):
            if isinstance(item, Site) and max(item.layer.kernel_size) == 7:
                yield item


def test_few_sites_are_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"only [1-9] of 100 networks had a site, so little was checked"):
        check_pass(LargeKernel(), examples=100, seed=0, networks=networks(), onnx_examples=0)


def test_long_pipelines_have_short_names_of_their_own() -> None:
    assert file_name("split-kernels(rank=0.5)") == "split-kernels-rank-0-5-"
    first, second = (file_name("x" * 300 + end) for end in "ab")
    assert first != second
    assert len(first) == len(second) <= LONGEST + 13


def test_gradients_that_are_only_rounding_may_become_zero() -> None:
    """The last norm takes out every scale and shift before it: no gradient but rounding in the model itself."""
    torch.manual_seed(5)
    norm = nn.BatchNorm2d(1, affine=False, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), norm).double().eval()
    promises.gradients(Trial(model, (torch.randn(1, 1, 1, 3).double(),), (FoldBatchNorm(),), [], exact=False, seed=0))


class Darker(passes.Louder):
    """Approximate: takes so much from every output."""

    name: ClassVar[str] = "darker"
    contract: ClassVar[Contract] = Approximate()
    by: float = 0.0

    def rewrite(self, site: Site) -> list[nn.Module]:
        layer: Any = shallow_copy(site.layer)
        layer.bias = nn.Parameter(layer.bias.detach() - self.by)
        return [layer]


def test_an_error_may_switch_off_one_pixel_and_not_all_that_there_are() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU()).double().eval()
    nn.init.dirac_(model[0].weight)
    model[0].bias.data.zero_()
    example = -torch.rand((1, 1, 16, 16), generator=torch.Generator().manual_seed(0)).double()
    example[0, 0, 3, 5] = 0.01

    def look(by: float) -> None:
        promises.gradients(Trial(model, (example,), (Darker(by=by),), exact=False))

    look(0.001)
    look(0.02)
    with pytest.raises(Broken, match="all gradients are zero"):
        look(100.0)


class Brighter(passes.Louder):
    """Approximate: adds to every weight, to those that are zero too."""

    name: ClassVar[str] = "brighter"

    def weight(self, held: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(held.detach() + 0.01, held.requires_grad)


def test_an_infinite_error_is_stated_as_such() -> None:
    """Whatever stands for zero is infinitely far from it, in proportion."""
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False)).double().eval()
    nn.init.zeros_(model[0].weight)
    trial = Trial(model, (torch.randn(1, 1, 3, 3).double(),), (Brighter(),), [], exact=False, seed=0)
    (report,) = trial.result.record.passes
    assert (report.outcome, report.error) == ("kept", float("inf"))
    promises.stated_error(trial)
    for stated in (0.1, float("nan")):
        report.error = stated
        with pytest.raises(Broken, match=f"states an error of {stated} and inf is measured"):
            promises.stated_error(trial)


class ShiftsANorm(passes.Louder):
    """Changes a batch norm that is none of its business."""

    name: ClassVar[str] = "shifts-a-norm"

    def rewrite(self, site: Site) -> list[nn.Module]:
        (user,) = site.node.users
        root: Any = user.graph.owning_module
        norm: Any = shallow_copy(root.get_submodule(str(user.target)))
        norm.running_mean = norm.running_mean + 1
        root.set_submodule(str(user.target), norm)
        return super().rewrite(site)


def test_layers_outside_of_sites_keep_their_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)).double().eval()
    trial = Trial(model, (torch.randn(1, 1, 4, 4).double(),), (ShiftsANorm(),))
    with pytest.raises(Broken, match="layer '1' is in no site that was rewritten, and yet it has other tensors"):
        structure.rest_untouched(trial)


# reproducers


MODULE = """
from explicit_padding import *


class MyPass({base}):
    name = "my-pass"
"""


@pytest.mark.parametrize("base", ["OneSide", "DeafToSkip"])
def test_the_file_fails_for_the_wrong_pass_and_not_for_the_mended_one(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is run as a user would: by itself, with the pass imported from where it is."""
    home, here = tmp_path / "home", Path(__file__).parent
    home.mkdir()
    (home / "my_pass.py").write_text(f"import sys; sys.path.append({str(here)!r})" + MODULE.format(base=base))
    monkeypatch.syspath_prepend(home)
    sys.modules.pop("my_pass", None)
    failure = broken(importlib.import_module("my_pass").MyPass())
    file = tmp_path / "reproducer.py"
    file.write_text(failure.reproducer)
    wrong = subprocess.run([sys.executable, str(file)], capture_output=True, text=True)
    assert wrong.returncode == 1, wrong.stderr
    assert "max|d|" in wrong.stdout or "broken:" in wrong.stdout
    (home / "my_pass.py").write_text(
        f"import sys; sys.path.append({str(here)!r})" + MODULE.format(base="ExplicitPadding")
    )
    mended = subprocess.run([sys.executable, str(file)], capture_output=True, text=True)
    assert mended.returncode == 0, mended.stdout + mended.stderr


def test_a_pass_inside_of_a_function_is_written_out(tmp_path: Path) -> None:
    class Inner(passes.OneSide):
        name: ClassVar[str] = "inner"

    failure = broken(Inner())
    file = tmp_path / "reproducer.py"
    file.write_text(failure.reproducer)
    assert "class Inner(passes.OneSide):" in failure.reproducer
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "max|d|" in done.stdout


def as_file(pass_: Pass, folder: Path) -> subprocess.CompletedProcess[str]:
    """What the file says that shows how a pass is broken."""
    failure = broken(pass_)
    assert failure.promise == "same_function"
    (folder / "reproducer.py").write_text(failure.reproducer)
    return subprocess.run([sys.executable, str(folder / "reproducer.py")], capture_output=True, text=True)


def test_the_file_tells_what_is_written_to_inputs_and_what_is_not_finite(tmp_path: Path) -> None:
    done = as_file(OverwritesABranch(), tmp_path)
    assert (done.returncode, "the rewritten module writes to its inputs" in done.stdout) == (1, True), done
    done = as_file(passes.NotFinite(), tmp_path)
    assert (done.returncode, "an output is not finite where the model's is" in done.stdout) == (1, True), done


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_written_out_to_the_last_bit(kind: str) -> None:
    """Several of them, the first of one number only; a case that is not random draws nothing."""
    network = Network((("a", (1, 1, 1, 1)), ("b", (1, 2, 3, 3))), (), (), "a", seed=3)
    made = Inputs([InputSpec(name, shape, torch.float64, 0) for name, shape in network.inputs], network.examples())
    case = Case(kind, 2, 0.25, 5)
    space: dict[str, Any] = {"torch": torch}
    exec(inputs_text(network, [(case, made.make(case))], many=False), space)
    assert all(map(torch.equal, space["inputs"], made.make(case)))
    assert len(space["inputs"]) == 2


@st.composite
def one_network(draw: st.DrawFn) -> Network:
    return draw(networks(most=1))


def test_strategies_compose() -> None:
    assert check_pass(ExplicitPadding(), examples=15, seed=0, networks=one_network(), onnx_examples=0).networks == 15
