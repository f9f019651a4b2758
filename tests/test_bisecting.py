"""Diagnoses name what was planted, and each of their figures is what plain torch gives for the same thing."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from culprits import Chain, Dropped, Forgetful, Meddling, Unclamped
from fxcompile.passes import EliminateIdentity, FoldBatchNorm, StackKernels
from helpers import Net, relative, with_layers
from torch import Tensor, nn

import fxcompile as fxc
from fxcompile.calibration import Calibration
from fxcompile.diagnosis import Diagnosis
from fxcompile.errors import CalibrationError
from fxcompile.manager import PassManager
from fxcompile.program import Program

CLOSE = 1e-5


@pytest.fixture(scope="module")
def net() -> Chain:
    return Chain()


@pytest.fixture(scope="module")
def program(net: Chain) -> Program:
    return fxc.trace(net, torch.randn(2, 4, 9, 9))


@pytest.fixture(scope="module")
def data() -> Tensor:
    return torch.randn(48, 4, 9, 9, generator=torch.Generator().manual_seed(1))


def held_out(data: Tensor, seed: int = 0) -> Tensor:
    """The quarter that nothing is fitted to: the first of a permutation drawn from the seed, in order."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data[order[: len(data) // 4].sort().values]


def layer_of(diagnosis: Diagnosis, name: str) -> Any:
    return next(item for item in diagnosis.layers if item.name == name)


def forgetful(net: Chain) -> Any:
    """What `Forgetful` makes of the network, by hand: conv2 with a norm without eps."""
    norm = copy.deepcopy(net.bn2)
    norm.eps = 0.0
    return with_layers(net, bn2=norm)


# a wrong exact pass


@pytest.fixture(scope="module")
def narrow(net: Chain) -> Chain:
    """The network with a variance in the second norm that is small beside eps."""
    made = copy.deepcopy(net)
    made.bn2.running_var.fill_(2e-3)
    made.bn2.weight.data.mul_(0.05)
    return made


def test_a_fold_that_forgets_eps_is_named_with_its_site(narrow: Chain, data: Tensor) -> None:
    program = fxc.trace(narrow, torch.randn(2, 4, 9, 9))
    found = fxc.bisect(program, [EliminateIdentity(), Forgetful(), FoldBatchNorm()], calibration=data, emit=False)
    wrong, x = forgetful(narrow), held_out(data)
    error = relative(wrong(x), narrow(x))
    assert found.is_off
    assert found.worst_pass is found.passes[1]
    assert found.worst_site is not None
    assert found.worst_site.name == "conv2"
    assert found.passes[0].errors == {"output": 0.0}
    assert found.passes[1].errors["output"] == pytest.approx(error, rel=1e-2)
    assert found.passes[1].change == pytest.approx(error, rel=1e-2)
    assert found.worst_site.only == pytest.approx(error, rel=1e-2)
    assert found.worst_site.without is not None
    assert found.worst_site.without < CLOSE
    assert found.passes[1].without is not None
    assert found.passes[1].without < CLOSE
    assert len(found.passes[1].broken) == 1
    assert found.passes[1].broken[0].startswith("layer 'conv2': pass 'forgetful-fold' breaks its contract (exact)")
    assert found.worst_site.mends == ["forgetful-fold(skip=[conv2])"]
    assert "the site that costs the most is 'conv2' of forgetful-fold" in str(found)


@pytest.mark.parametrize("where", ["conv1", "conv2", "conv3"])
def test_wherever_the_wrong_site_is_it_is_named(net: Chain, data: Tensor, where: str) -> None:
    made = copy.deepcopy(net)
    for norm in (made.bn1, made.bn2, made.bn3):
        norm.running_var.fill_(2e-3)
        norm.weight.data.mul_(0.05)
    program = fxc.trace(made, torch.randn(2, 4, 9, 9))
    found = fxc.bisect(program, [Forgetful(where=where)], calibration=data, emit=False, verify="off")
    assert found.worst_site is not None
    assert found.worst_site.name == where
    assert [item.name for item in found.layers if item.own and item.own > CLOSE] == [f"bn{where[-1]}"]
    assert found.worst_site.without is not None
    assert found.worst_site.without < CLOSE < found.errors["output"]


def test_the_layer_that_breaks_is_told_from_those_that_inherit(narrow: Chain, data: Tensor) -> None:
    program = fxc.trace(narrow, torch.randn(2, 4, 9, 9))
    found = fxc.bisect(program, [Forgetful()], calibration=data, emit=False)
    wrong, x = forgetful(narrow), held_out(data)
    assert [item.name for item in found.layers if item.own and item.own > CLOSE] == ["bn2"]
    broken, heir = layer_of(found, "bn2"), layer_of(found, "act2")
    own = relative(wrong.bn2(wrong.conv2(narrow.stage1(x))), narrow.bn2(narrow.conv2(narrow.stage1(x))))
    assert broken.own == pytest.approx(own, rel=1e-2)
    assert broken.inherited < CLOSE
    assert broken.by == [("forgetful-fold", "conv2")]
    assert heir.own == 0.0
    assert heir.error == pytest.approx(
        relative(wrong.stage2(wrong.stage1(x)), narrow.stage2(narrow.stage1(x))), rel=1e-2
    )
    assert heir.inherited == broken.error
    assert layer_of(found, "bn1").error < CLOSE
    assert " jump " in next(line for line in str(found).splitlines() if line.startswith("bn2 "))


def test_removing_what_computes_something_is_named_by_its_own_layer(net: Chain, program: Program, data: Tensor) -> None:
    found = fxc.bisect(program, [Dropped(only="act2")], calibration=data, emit=False)
    x = held_out(data)
    gone = layer_of(found, "act2")
    before = net.bn2(net.conv2(net.stage1(x)))
    assert gone.own == pytest.approx(relative(before, net.act2(before)), rel=1e-4)
    assert gone.alone == pytest.approx(relative(with_layers(net, act2=nn.Identity())(x), net(x)), rel=1e-4)
    assert [item.name for item in found.layers if item.own is None or item.own > CLOSE] == ["act2"]
    assert found.worst_site is not None
    assert found.worst_site.name == "act2"


def test_a_pass_that_changes_more_than_its_sites_is_told_by_the_layer(program: Program, data: Tensor) -> None:
    found = fxc.bisect(program, [Meddling()], calibration=data, emit=False)
    assert found.worst_pass is found.passes[0]
    assert found.passes[0].broken[0].startswith("pass 'meddle' breaks its contract (exact) there: ")
    assert [item.name for item in found.layers if item.own is None or item.own > CLOSE] == ["mean"]
    assert any(sentence.startswith("layer 'mean' is ") and sentence.endswith("more than its sites")
               for sentence in found.verdict())  # fmt: skip


# a lossy pass with one hard layer


def stacks(net: Chain, data: Tensor, **options: Any) -> dict[str, nn.Module]:
    """The stacks that a compilation puts in place of the convolutions, each with what follows it left as it is."""
    program = fxc.trace(net, torch.randn(2, 4, 9, 9))
    module = PassManager([StackKernels(rank=2, **options)], calibration=data).run(program).module
    return {name: getattr(module, name) for name in ("conv1", "conv2", "conv3")}


def as_module(layer: nn.Module) -> nn.Module:
    """A stack as it stands in the compiled module, as one layer."""
    return layer if isinstance(layer, nn.Conv2d) else nn.Sequential(*layer.children())


def test_the_hard_layer_of_a_lossy_pass_is_named(net: Chain, program: Program, data: Tensor) -> None:
    found = fxc.bisect(program, [FoldBatchNorm(), StackKernels(rank=2)], calibration=data, emit=False)
    assert found.worst_pass is found.passes[1]
    assert found.worst_site is not None
    assert found.worst_site.name == "conv2"
    assert found.worst_site.without is not None
    assert found.worst_site.without < 0.01 * found.errors["output"]
    assert len(found.sites) == 3
    assert found.worst_site.mends[0] == "stack-kernels(skip=[conv2], rank=2)"
    limited = [FoldBatchNorm(), *fxc.parse_pipeline(found.worst_site.mends[1])]
    outcomes = {
        site.name: site.outcome for site in PassManager(limited, calibration=data).run(program).record.passes[1].sites
    }
    assert outcomes == {"conv1": "kept", "conv2": "left", "conv3": "kept"}


def test_every_figure_is_what_plain_torch_gives(net: Chain, program: Program, data: Tensor) -> None:
    found = fxc.bisect(program, [StackKernels(rank=2)], calibration=data, emit=False)
    made = {name: as_module(layer) for name, layer in stacks(net, data).items()}
    x, wanted = held_out(data), net(held_out(data))
    compiled = with_layers(net, **made)
    assert found.errors["output"] == pytest.approx(relative(compiled(x), wanted), rel=1e-3)
    row = layer_of(found, "conv2")
    inputs, now = net.stage1(x), compiled.stage1(x)
    assert row.error == pytest.approx(relative(compiled.conv2(now), net.conv2(inputs)), rel=1e-3)
    assert row.own == pytest.approx(relative(compiled.conv2(inputs), net.conv2(inputs)), rel=1e-3)
    assert row.alone == pytest.approx(relative(with_layers(net, conv2=made["conv2"])(x), wanted), rel=1e-3)
    assert row.mended == pytest.approx(relative(with_layers(compiled, conv2=net.conv2)(x), wanted), abs=1e-6)
    site = next(item for item in found.sites if item.name == "conv2")
    others = {name: as_module(layer) for name, layer in stacks(net, data, skip="conv2").items()}
    itself = {name: as_module(layer) for name, layer in stacks(net, data, only="conv2").items()}
    assert site.without == pytest.approx(relative(with_layers(net, **others)(x), wanted), abs=1e-6)
    assert site.only == pytest.approx(relative(with_layers(net, **itself)(x), wanted), rel=1e-3)


def test_of_two_lossy_passes_the_worse_is_named(program: Program, data: Tensor) -> None:
    passes = [StackKernels(rank=2, only="conv3"), FoldBatchNorm(), StackKernels(rank=1, only="conv2")]
    found = fxc.bisect(program, passes, calibration=data, emit=False)
    assert found.worst_pass is found.passes[2]
    assert found.worst_site is not None
    assert (found.worst_site.name, found.worst_site.passed) == ("conv2", 2)
    both = layer_of(found, "bn2")
    assert both.by == [("fold-batchnorm", "conv2"), ("stack-kernels", "conv2")]


def test_a_budget_leaves_the_rest_measured_in_place(program: Program, data: Tensor) -> None:
    found = fxc.bisect(program, [StackKernels(rank=1)], calibration=data, emit=False, again=1)
    assert [item.without is not None for item in found.sites] == [True, False, False]
    assert {item.name for item in found.sites} == {"conv1", "conv2", "conv3"}
    for item in found.sites:
        row = layer_of(found, item.name)
        assert (item.alone, item.mended) == (row.alone, row.mended)
    assert "1 of 3 compiled again" in str(found)
    none = fxc.bisect(program, [StackKernels(rank=1)], calibration=data, emit=False, again=0)
    assert "none was compiled again" in " ".join(none.verdict())


# a given input


def test_a_case_shows_what_calibration_data_does_not(net: Chain, program: Program, data: Tensor) -> None:
    passes = [FoldBatchNorm(), Unclamped(only="act1")]
    calm = fxc.bisect(program, passes, calibration=0.1 * data, emit=False, verify="off")
    assert not calm.is_off
    huge = 1000 * data[:2]
    found = fxc.bisect(program, passes, calibration=0.1 * data, case=huge, emit=False, verify="off")
    error = relative(with_layers(net, act1=nn.ReLU())(huge), net(huge))
    assert found.is_off
    assert found.errors["output"] == pytest.approx(error, rel=1e-3)
    assert found.passes[1].held_out == calm.errors
    assert found.worst_pass is found.passes[1]
    assert found.worst_site is not None
    assert found.worst_site.name == "act1"
    assert found.measured_on == "the case of 2 samples"
    assert "the calibration data holds nothing like this case" in " ".join(found.verdict())


def test_an_error_that_is_not_finite_is_infinite(program: Program, data: Tensor) -> None:
    module = Net(lambda self, x: self.act(x).exp(), act=nn.ReLU6())
    found = fxc.bisect(fxc.trace(module, torch.zeros(1, 3)), [Unclamped()], case=torch.full((1, 3), 1e4), emit=False)
    assert found.errors["output"] == float("inf")
    held = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert held["errors"] == {"output": "inf"}
    assert found.worst_site is not None
    assert found.worst_site.name == "act"


def test_a_case_of_another_shape_is_refused(program: Program) -> None:
    with pytest.raises(CalibrationError, match="is 1x4x9x8 and Nx4x9x9 is wanted"):
        fxc.bisect(program, "", case=torch.zeros(1, 4, 9, 8))


# nothing wrong


def test_where_nothing_is_off_it_says_so(program: Program, data: Tensor) -> None:
    found = fxc.bisect(program, "fold-batchnorm, eliminate-identity", calibration=data)
    assert not found.is_off
    assert not found.file_is_off
    assert found.sites == []
    assert found.worst_pass is None
    assert len(found.verdict()) == 1
    assert found.verdict()[0].startswith("on 12 held-out calibration samples nothing is off: the error ")
    assert all(item.error < CLOSE and item.own is not None and item.own < CLOSE for item in found.layers)
    assert "8 layers, 3 rewritten: no error but rounding" in str(found)


def test_an_empty_pipeline_has_no_error(program: Program) -> None:
    found = fxc.bisect(program, "", emit=False)
    assert found.errors == {"output": 0.0}
    assert found.measured_on == "4 random batches (no calibration data)"
    assert not found.is_off


def test_the_program_given_is_untouched(program: Program, data: Tensor) -> None:
    before = program.module.code
    fxc.bisect(program, [FoldBatchNorm(), StackKernels(rank=1)], calibration=data, emit=False, again=1)
    assert program.module.code == before


def test_one_seed_gives_the_same_figures(program: Program, data: Tensor) -> None:
    first, second = (
        fxc.bisect(program, [StackKernels(rank=1)], calibration=data, emit=False, again=1, seed=5).as_dict()
        for _ in range(2)
    )
    assert {**first, "seconds": {}} == {**second, "seconds": {}}


# contracts


def test_rollback_measures_what_compiling_with_rollback_gives(narrow: Chain, data: Tensor) -> None:
    program = fxc.trace(narrow, torch.randn(2, 4, 9, 9))
    found = fxc.bisect(program, [Forgetful()], calibration=data, emit=False, verify="rollback")
    assert not found.is_off
    assert found.passes[0].rewritten == 2
    assert len(found.passes[0].broken) == 1
    assert found.passes[0].broken[0].startswith("layer 'conv2': ")


def test_off_looks_for_no_broken_contract(narrow: Chain, data: Tensor) -> None:
    program = fxc.trace(narrow, torch.randn(2, 4, 9, 9))
    found = fxc.bisect(program, [Forgetful()], calibration=data, emit=False, verify="off")
    assert found.passes[0].broken == []
    assert found.worst_site is not None
    assert found.worst_site.name == "conv2"


# networks of other shapes


def test_each_output_has_its_error(data: Tensor) -> None:
    torch.manual_seed(0)
    module = Net(
        lambda self, x: {"bad": self.one(self.act(x)), "good": self.two(x), "best": self.two(x).argmax(1)},
        one=nn.Linear(9, 5),
        two=nn.Linear(9, 5),
        act=nn.ReLU6(),
    ).eval()
    x = 10 * data[:, :, 0]
    found = fxc.bisect(fxc.trace(module, x[:2]), [Dropped()], case=x, emit=False)
    wanted = relative(module.one(x), module.one(module.act(x)))
    assert list(found.errors) == ["bad", "good", "best"]
    assert found.errors["bad"] == pytest.approx(wanted, rel=1e-5)
    assert (found.errors["good"], found.errors["best"]) == (0.0, 0.0)
    head = next(line for line in str(found).splitlines() if line.startswith("pass "))
    assert head.split() == ["pass", "bad", "good", "best", "by", "itself", "without"]


def test_a_layer_called_twice_is_one_site_in_two_places(data: Tensor) -> None:
    torch.manual_seed(0)
    module = Net(lambda self, x: self.conv(torch.relu(self.conv(x))), conv=nn.Conv2d(4, 4, 5, padding=2)).eval()
    found = fxc.bisect(fxc.trace(module, data[:2]), [StackKernels(rank=1)], calibration=data, emit=False)
    assert [item.name for item in found.sites] == ["conv"]
    rows = [item for item in found.layers if item.name == "conv"]
    assert [row.by for row in rows] == [[("stack-kernels", "conv")]] * 2
    assert all(row.own is not None and row.own > 0.01 for row in rows)
    assert found.worst_site is not None
    assert found.worst_site.without == 0.0


def test_a_fixed_batch_is_measured_in_whole_batches() -> None:
    torch.manual_seed(0)
    module = Net(lambda self, x: self.conv(x).reshape(2, -1), conv=nn.Conv2d(1, 2, 5, padding=2)).eval()
    program = fxc.trace(module, torch.randn(2, 1, 6, 6))
    assert not program.batch_is_free
    x = torch.randn(5, 1, 6, 6)
    found = fxc.bisect(program, [StackKernels(rank=1)], case=x)
    assert found.measured_on == "the case of 4 samples"
    stacked = PassManager([StackKernels(rank=1)]).run(program).module
    wanted = torch.cat([module(x[:2]), module(x[2:4])])
    assert found.errors["output"] == pytest.approx(
        relative(torch.cat([stacked(x[:2]), stacked(x[2:4])]), wanted), rel=1e-4
    )
    with pytest.raises(
        CalibrationError, match="the case has 1 samples and the network takes 2 at once; give 2 of them"
    ):
        fxc.bisect(program, "", case=x[:1])


# the file


def test_a_wrong_simplification_is_blamed_on_onnxsim(
    program: Program, data: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxsim

    real = onnxsim.simplify

    def spoilt(model: Any, **options: Any) -> Any:
        made, checked = real(model, **options)
        spoil(made.graph)
        return made, checked

    monkeypatch.setattr(onnxsim, "simplify", spoilt)
    found = fxc.bisect(program, [FoldBatchNorm()], calibration=data, verify="off")
    assert not isinstance(found.file, str)
    assert found.file is not None
    assert not found.is_off
    assert found.file.program["output"] > 0.01
    assert found.file.unsimplified is not None
    assert found.file.unsimplified["output"] < CLOSE
    assert "the step to blame is onnxsim" in " ".join(found.verdict())


def spoil(graph: Any) -> None:
    """Double every weight of the last layer."""
    import onnx

    weight = next(tensor for tensor in graph.initializer if "head" in tensor.name and len(tensor.dims) == 2)
    weight.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(weight), weight.name))


def test_a_wrong_export_is_blamed_on_the_exporter(
    program: Program, data: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxcompile import emission

    real = emission.export

    def spoilt(program: Program, opset: int | None) -> Any:
        changed = program.snapshot()
        wrong = copy.deepcopy(changed.module.head)
        wrong.weight.data.mul_(2)
        changed.module.set_submodule("head", wrong)
        return real(changed, opset)

    monkeypatch.setattr(emission, "export", spoilt)
    found = fxc.bisect(program, "", calibration=data)
    assert not isinstance(found.file, str)
    assert found.file is not None
    assert "does not compute what the program does" in found.file.refused
    wrong = with_layers(program.module, head=copy.deepcopy(program.module.head))
    wrong.head.weight.data.mul_(2)
    x = held_out(data)
    assert found.file.program["output"] == pytest.approx(relative(wrong(x), program.module(x)), rel=1e-4)
    assert "the step to blame is torch.onnx.export" in " ".join(found.verdict())


def test_calibration_objects_of_every_kind_are_taken(program: Program, data: Tensor) -> None:
    held = Calibration(program.inputs, {"image": data})
    errors = [
        fxc.bisect(program, [Dropped()], calibration=given, emit=False, again=0, verify="off").errors
        for given in (data, {"image": data.numpy()}, data.split(7), held)
    ]
    assert errors == [errors[0]] * 4
