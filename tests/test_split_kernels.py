"""split-kernels: what stands in a layer's place, what it costs, how near it comes, and what stays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fxcompile.passes import Bottleneck, GroupShuffle, SplitKernels, StackKernels
from fxcompile.passes import _cross as cross
from fxcompile.passes import _separable as separable
from fxcompile.passes._ranks import energy_rank, rank_for
from fxcompile.passes._stack_refining import best_last
from helpers import (
    MODES,
    Net,
    assert_text_means_the_same,
    conv,
    geometry,
    images,
    only_site,
    outputs,
    printed,
    randn,
    relative,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompile.calibration import as_calibration
from fxcompile.errors import PipelineError
from fxcompile.manager import PassManager, Result
from fxcompile.patches import patches
from fxcompile.pipeline import parse_pipeline
from fxcompile.rewriting import Pass, Site, Skip
from fxcompile.testing import check_pass
from fxcompile.tracing import trace

KERNELS = [(3, 3), (5, 5), (2, 2), (3, 5), (7, 1), (4, 3), (2, 3, 3), (1, 3, 5), (3, 3, 3)]


def split(model: nn.Module, x: Tensor, calibration: Tensor | None = None, **options: Any) -> Result:
    options = {"min_saving": None, **options}
    passes = [SplitKernels(**options)]
    return PassManager(passes, calibration=calibration, verify_examples=2).run(trace(model.eval(), x[:2]))


# ---- in sequence -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_at_full_rank_the_pair_computes_what_the_layer_did(data: st.DataObject) -> None:
    """Any stride, padding, its mode, dilation, groups and bias; borders included; with data and without."""
    kernel = data.draw(st.sampled_from([item for item in KERNELS if sum(size > 1 for size in item) > 1]))
    groups = data.draw(st.sampled_from([1, 1, 2]))
    options = geometry(data.draw, kernel, groups, MODES)
    layer = conv(2 * groups, 3 * groups, *kernel, seed=data.draw(st.integers(0, 99)), **options)
    size = [
        data.draw(st.integers(max(3, (k - 1) * d + 1), 9)) for k, d in zip(kernel, options["dilation"], strict=True)
    ]
    x = randn(8, 2 * groups, *size, seed=1)
    result = split(layer, x, x if data.draw(st.booleans()) else None, rank=10**6)
    site = only_site(result)
    assert site.outcome == "kept"
    assert site.error < 1e-12
    wanted = outputs(layer, x)
    assert float((outputs(result.module, x) - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


def test_same_padding_of_even_kernels_stays_uneven() -> None:
    layer = conv(3, 4, 4, 2, padding="same")
    x = randn(8, 3, 9, 8)
    result = split(layer, x, x, rank=10**6)
    assert relative(outputs(result.module, x), outputs(layer, x)) < 1e-12


@pytest.mark.parametrize("kernel", [(3, 3), (5, 3), (3, 3, 3)])
def test_the_error_of_the_weight_is_that_of_the_singular_values_left_out(kernel: tuple[int, ...]) -> None:
    """Eckart and Young: so no other pair of so many channels is nearer."""
    weight = randn(2, 5, 4, *kernel)
    for axes in separable.first_axes(kernel):
        values = separable.singular_values(weight, axes)
        for rank in (1, 3, 6):
            pair = separable.nearest_pair(weight, axes, rank)
            left = (separable.compose(*pair) - weight).square().sum()
            assert float(left) == pytest.approx(float(values[:, rank:].square().sum()), rel=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("data", [False, True])
def test_a_kernel_that_is_separable_is_found_out(groups: int, data: bool) -> None:
    layer = conv(4 * groups, 6 * groups, 5, 3, padding=(2, 1), groups=groups)
    first, second = randn(3 * groups, 4, 5, 1, seed=1), randn(6 * groups, 3, 1, 3, seed=2)
    layer.weight.data = separable.compose(first.unflatten(0, (groups, -1)), second.unflatten(0, (groups, -1))).flatten(
        0, 1
    )
    x = images(24, 4 * groups, 9, 9)
    result = split(layer, x, x if data else None, rank=3 * groups)
    assert only_site(result).error < 1e-9
    assert [inner.out_channels for inner in result.module.modules() if isinstance(inner, nn.Conv2d)] == [
        3 * groups, 6 * groups
    ]  # fmt: skip


OPTIONS: list[dict[str, Any]] = [
    {"rank": 0.4},
    {"rank": 6},
    {"energy": 0.6},
    {"rank": 8, "activation": "relu"},
    {"arrangement": "parallel"},
    {"arrangement": "parallel", "merge": "concat"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_data_make_it_much_better_on_inputs_not_seen(options: dict[str, Any]) -> None:
    if "activation" in options:
        return  # without data it is another function
    layer = conv(8, 12, 5, 5, padding=2)
    x, unseen = images(120, 8, 10, 10), images(60, 8, 10, 10, seed=50)
    wanted = outputs(layer, unseen)
    errors = [relative(outputs(split(layer, x, data, **options).module, unseen), wanted) for data in (None, x)]
    assert errors[1] < 0.8 * errors[0]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_data_never_lose_to_the_weights(data: st.DataObject) -> None:
    """On correlated inputs that were held out, however few there are to fit to."""
    groups = data.draw(st.sampled_from([1, 2]))
    kernel = data.draw(st.sampled_from([(3, 3), (5, 3), (4, 5)]))
    layer = conv(4 * groups, 4 * groups, *kernel, seed=data.draw(st.integers(0, 99)), groups=groups,
                 padding=1, stride=data.draw(st.integers(1, 2)), bias=data.draw(st.booleans()))  # fmt: skip
    x = images(data.draw(st.sampled_from([4, 8, 40])), 4 * groups, 8, 8, seed=data.draw(st.integers(0, 99)))
    options = data.draw(st.sampled_from(OPTIONS))
    _, held = as_calibration(x, trace(layer, x[:2]).inputs).split(seed=0)
    ((unseen,),) = held.batches(len(x))
    found = [relative(outputs(split(layer, x, part, **options).module, unseen), outputs(layer, unseen))
             for part in (None, x)]  # fmt: skip
    assert found[1] <= found[0] * (1 + 1e-9)


@pytest.mark.parametrize(("shape", "groups", "rank"), [((6, 8, 3, 3), 1, 5), ((4, 3, 2, 5), 2, 4)])
def test_no_search_on_the_outputs_finds_a_better_pair(shape: tuple[int, ...], groups: int, rank: int) -> None:
    """L-BFGS from random pairs, on what is minimised: the error of the outputs, held near the weight."""
    layer = conv(shape[0], shape[1] * groups, *shape[2:], padding=1, groups=groups, bias=False)
    x = images(24, shape[0], 8, 8)
    site = next(iter(SplitKernels(rank=rank, min_saving=None).sites(trace(layer, x[:2]))))
    assert isinstance(site, Site)
    made = SplitKernels(rank=rank, min_saving=None).rewrite(site.with_pairs(((x, outputs(layer, x)),)))
    rows = patches(layer, x)
    gram = torch.einsum("rgf,rge->gfe", rows, rows) / len(rows)
    gram += 1e-2 * torch.diag_embed(gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(gram.shape[:2]))
    weight = layer.weight.detach().unflatten(0, (groups, -1))

    def lost(pair: Sequence[Tensor]) -> Tensor:
        lacks = (weight - torch.einsum("grcij,gorkl->gocijkl", *pair).flatten(3).reshape(weight.shape)).flatten(2)
        return (lacks @ gram * lacks).sum()

    found = float(lost([inner.weight.detach().unflatten(0, (groups, -1)) for inner in made]))
    best = math.inf
    for start, axes in itertools.product(range(2), separable.first_axes(shape[2:])):
        free = [
            randn(*kernel.shape, seed=start + 7).requires_grad_()
            for kernel in separable.nearest_pair(weight, axes, rank // groups)
        ]
        search = torch.optim.LBFGS(free, max_iter=300, line_search_fn="strong_wolfe")

        def closure(free: Any = free, search: Any = search) -> float:
            search.zero_grad()
            loss = lost(free)
            loss.backward()
            return loss.item()

        search.step(closure)
        best = min(best, closure())
    assert found <= 1.02 * best


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("rank", [0.3, 0.6, 1.0])
def test_the_share_of_the_cost_is_kept(rank: float, stride: int) -> None:
    layer = conv(32, 48, 5, 3, padding=(2, 1), stride=(stride, 1))
    for rounding in (1, 8):
        site = only_site(split(layer, randn(2, 32, 12, 12), rank=rank, round_to=rounding))
        assert site.after.macs <= rank * site.before.macs
        one_more = site.before.macs / 60
        assert rounding > 1 or site.after.macs >= rank * site.before.macs - one_more


def test_ranks_by_share_number_and_energy() -> None:
    assert rank_for(0.5, 10.0, 200.0, 1, 1) == 10
    assert rank_for(0.5, 10.0, 200.0, 1, 8) == 8
    assert rank_for(0.01, 10.0, 200.0, 1, 8) == 1
    assert rank_for(7, 10.0, 200.0, 2, 1) == 3
    assert rank_for(0.5, 20.0, 400.0, 2, 8) == 8
    values = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    assert [energy_rank(values, share) for share in (0.3, 0.34, 0.67, 1.0)] == [1, 2, 3, 3]


@pytest.mark.parametrize(("rounding", "wanted"), [({}, 0), ({"round_to": 4}, 4)])
def test_energy_is_rounded_up(rounding: dict[str, int], wanted: int) -> None:
    layer = conv(8, 8, 3, 3, padding=1)
    channels = [
        next(inner for inner in split(layer, randn(2, 8, 8, 8), energy=0.8, **more).module.modules()
             if isinstance(inner, nn.Conv2d)).out_channels for more in ({}, rounding)
    ]  # fmt: skip
    assert channels[1] == (-(-channels[0] // wanted) * wanted if wanted else channels[0])


def test_energy_gives_the_smallest_pair_that_keeps_it() -> None:
    layer = conv(8, 8, 3, 3, padding=1)
    result = split(layer, randn(2, 8, 8, 8), energy=0.8)
    made = next(inner for inner in result.module.modules() if isinstance(inner, nn.Conv2d))
    axes = (0,) if made.kernel_size == (3, 1) else (1,)
    squares = separable.singular_values(layer.weight.detach()[None], axes).square()[0]
    kept = squares.cumsum(0) / squares.sum()
    assert float(kept[made.out_channels - 1]) >= 0.8 > float(kept[made.out_channels - 2])


@pytest.mark.parametrize("bias", [True, False])
def test_a_relu_changes_nothing_on_the_calibrated_range_and_trains(bias: bool) -> None:
    layer = conv(8, 8, 5, 5, padding=2, stride=2, bias=bias)
    x = images(60, 8, 11, 11)
    linear, curved = (split(layer, x, x, rank=16, activation=kind) for kind in ("none", "relu"))
    assert any(isinstance(inner, nn.ReLU) for inner in curved.module.modules())
    errors = [relative(outputs(item.module, x), outputs(layer, x)) for item in (linear, curved)]
    assert errors[1] < errors[0] + 0.02
    module = curved.module.train()
    module(x).square().mean().backward()
    assert all(float(item.grad.abs().max()) > 0 for item in module.parameters())


# ---- side by side ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_kernel_that_is_a_cross_is_kept_exactly(data: st.DataObject) -> None:
    kernel = data.draw(st.sampled_from([(3, 3), (5, 5), (3, 5), (4, 3), (3, 3, 3)]))
    groups = data.draw(st.sampled_from([1, 2]))
    options = geometry(data.draw, kernel, groups, pad=3)
    layer = conv(2 * groups, 3 * groups, *kernel, **options)
    lines = torch.stack([cross.line(kernel, axis) for axis in range(len(kernel))])
    layer.weight.data *= lines.any(0)
    size = [data.draw(st.integers((k - 1) * d + 1, 11)) for k, d in zip(kernel, options["dilation"], strict=True)]
    x = randn(6, 2 * groups, *size)
    result = split(layer, x, x if data.draw(st.booleans()) else None, arrangement="parallel")
    assert relative(outputs(result.module, x), outputs(layer, x)) < 1e-12


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 3), (2, 3)])
def test_outputs_that_are_lines_are_joined_in_their_order(kernel: tuple[int, int], groups: int) -> None:
    layer = conv(3 * groups, 6 * groups, *kernel, padding=(1, 1), groups=groups)
    owners = torch.tensor([0, 1, 1, 0, 0, 1] * groups)
    for output, axis in enumerate(owners.tolist()):
        layer.weight.data[output] *= cross.line(kernel, axis)
    x = images(20, 3 * groups, 8, 8)
    for data in (None, x):
        result = split(layer, x, data, arrangement="parallel", merge="concat")
        assert relative(outputs(result.module, x), outputs(layer, x)) < 1e-10


def test_a_single_sample_without_a_batch_is_joined_along_its_channels() -> None:
    layer = conv(4, 6, 3, 3, padding=1)
    x = randn(4, 6, 5)
    passes = [SplitKernels(arrangement="parallel", merge="concat", min_saving=None)]
    result = PassManager(passes, verify_examples=2).run(trace(layer, x))
    assert outputs(result.module, x).shape == outputs(layer, x).shape


def test_the_cross_is_the_least_squares_one() -> None:
    """Against the normal equations of the patches, bias included."""
    layer = conv(4, 5, 3, 3, padding=1)
    x = images(80, 4, 9, 9)
    result = split(layer, x, x, arrangement="parallel")
    rows = patches(layer, x).squeeze(1)
    taps = torch.stack([cross.line((3, 3), axis) for axis in (0, 1)]).any(0).expand(4, 3, 3).flatten()
    design = torch.cat([rows[:, taps], torch.ones(len(rows), 1, dtype=torch.float64)], 1)
    wanted = outputs(layer, x).movedim(1, -1).flatten(0, -2)
    best = design @ torch.linalg.lstsq(design, wanted).solution
    found = outputs(result.module, x).movedim(1, -1).flatten(0, -2)
    assert float((found - wanted).norm()) <= 1.03 * float((best - wanted).norm())


@pytest.mark.parametrize("groups", [1, 2])
def test_outputs_are_shared_out_as_well_as_they_can_be(groups: int) -> None:
    errors = randn(2, 6 * groups).abs()
    owners = cross.share_out(errors, groups)
    total = float(errors.gather(0, owners[None]).sum())
    best = 0.0
    for group in range(groups):
        own = errors[:, 6 * group : 6 * group + 6]
        best += min(
            float(sum(own[int(output in chosen), output] for output in range(6)))
            for chosen in itertools.combinations(range(6), 3)
        )
    assert total == pytest.approx(best)


def test_outputs_that_lose_alike_are_served_in_their_order() -> None:
    assert cross.share_out(torch.zeros(2, 40), 1).tolist() == [0] * 20 + [1] * 20
    assert cross.share_out(torch.zeros(2, 40), 2).tolist() == ([0] * 10 + [1] * 10) * 2


# ---- what stays ------------------------------------------------------------------------------------------------------


def skips(model: nn.Module, x: Tensor, **options: Any) -> list[str]:
    found = SplitKernels(**options).sites(trace(model.eval(), x))
    return [item.reason for item in found if isinstance(item, Skip)]


def test_layers_that_have_no_such_form_are_left_with_a_reason() -> None:
    x = randn(2, 4, 9, 9)
    assert skips(conv(4, 4, 5, 1), x) == ["its kernel has one axis only"]
    assert skips(conv(4, 4, 1, 1), x) == []
    assert skips(conv(4, 4, 2, 2), x, arrangement="parallel") == ["branches would cost what it costs"]
    assert skips(conv(4, 4, 2, 2), x, arrangement="parallel", merge="concat") == []
    assert skips(conv(4, 4, 2, 2, padding="same"), x, activation="relu")[0].startswith("it pads unevenly")
    assert skips(conv(4, 4, 3, 3, groups=4), x) == [
        "one channel a group between costs 76% of its MACs already, above rank=0.5"
    ]
    assert skips(conv(4, 4, 3, 3, groups=4), x, arrangement="parallel", merge="concat") == [
        "1 outputs a group are too few for 2 branches"
    ]


def test_a_pair_that_saves_nothing_is_left_before_anything_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SplitKernels, "candidates", None)
    x = randn(8, 4, 9, 9)
    site = only_site(split(conv(4, 4, 3, 3), x, x, rank=12, min_saving=0.0))
    assert site.outcome == "left"
    assert site.reason.endswith(", against min_saving=0")


def test_with_energy_what_it_saves_is_seen_later() -> None:
    site = only_site(split(conv(4, 4, 3, 3), randn(2, 4, 9, 9), energy=1.0, min_saving=0.0))
    assert site.outcome == "left"
    assert site.reason.endswith(", against min_saving=0")


def test_layers_that_share_a_weight_are_left() -> None:
    net = Net(lambda m, x: m.first(x) + m.second(x.flip(2)), first=conv(4, 4, 3, 3), second=conv(4, 4, 3, 3))
    net.second.weight = net.first.weight
    assert skips(net, randn(2, 4, 9, 9)) == [
        "it shares its weight with 'second', which would keep it",
        "it shares its weight with 'first', which would keep it",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("split-kernels(arrangement=parallel, rank=0.4)", "rank has no meaning with arrangement=parallel"),
        ("split-kernels(arrangement=parallel, energy=0.4)", "energy has no meaning with arrangement=parallel"),
        ("split-kernels(arrangement=parallel, round_to=4)", "round_to has no meaning with arrangement=parallel"),
        ("split-kernels(arrangement=parallel, activation=relu)", "activation has no meaning with arrangement=parallel"),
        ("split-kernels(merge=concat)", "merge has no meaning with arrangement=sequential"),
        ("split-kernels(rank=4, energy=0.9)", "give rank or energy, not both"),
        ("split-kernels(kernel=1)", "option 'kernel' of pass 'split-kernels' cannot be 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        parse_pipeline(text)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_text_with_every_option_means_the_same_pass(options: dict[str, Any]) -> None:
    assert_text_means_the_same(SplitKernels(**options))


@pytest.mark.parametrize(
    ("options", "exact"),
    [({"rank": 10**6}, True), *((options, False) for options in OPTIONS)],
    ids=str,
)
def test_the_kit_breaks_none_of_its_promises(options: dict[str, Any], exact: bool) -> None:
    summary = check_pass(SplitKernels(min_saving=None, **options), examples=30, seed=3, onnx_examples=1, exact=exact)
    assert summary.with_sites >= 5


# ---- in a network ----------------------------------------------------------------------------------------------------


def normed() -> Net:
    """A convolution of 5 x 3 in a chain that people write: a batch norm and a ReLU, and a layer behind."""
    net = Net(lambda m, x: m.last(m.norm(m.conv(x)).relu()), conv=conv(3, 6, 5, 3, padding=(2, 1), stride=(1, 2)),
              norm=nn.BatchNorm2d(6).double(), last=conv(6, 4, 1, 1)).eval()  # fmt: skip
    with torch.no_grad():
        for index, tensor in enumerate([net.norm.weight, net.norm.bias, net.norm.running_mean, net.norm.running_var]):
            tensor.copy_(randn(6, seed=index).abs() + 0.1)
    return net


def test_golden_pair() -> None:
    """The stride of an axis goes to the layer that has it, and so does the padding."""
    result = split(normed(), randn(2, 3, 12, 12), rank=5)
    first, second = (inner for inner in result.module.conv.children())
    assert printed(result.program) == "\n".join([
        "conv.0 = Conv2d 3->5 1x3 /1x2(x)",
        "conv.1 = Conv2d 5->6 5x1(conv.0)",
        "norm = BatchNorm2d(conv.1)",
        "relu = ReLU(norm)",
        "last = Conv2d 6->4 1x1(relu)",
        "return last",
    ])  # fmt: skip
    assert (first.padding, second.padding) == ((0, 1), (2, 0))
    assert (first.bias, second.bias is None) == (None, False)


def test_golden_branches() -> None:
    result = split(normed(), randn(2, 3, 12, 12), arrangement="parallel", merge="concat")
    assert printed(result.program) == "\n".join([
        "conv.branches.0 = Conv2d 3->3 5x1 /1x2(x)",
        "conv.branches.1 = Conv2d 3->3 1x3 /1x2(x)",
        "cat = cat([conv.branches.0, conv.branches.1], 1)",
        "order = conv.order()",
        "index_select = index_select(cat, 1, order)",
        "norm = BatchNorm2d(index_select)",
        "relu = ReLU(norm)",
        "last = Conv2d 6->4 1x1(relu)",
        "return last",
    ])  # fmt: skip


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("passes", ["", "fold-batchnorm, "])
def test_norms_and_activations_behind_branches_stay_with_their_outputs(passes: str, calibrated: bool) -> None:
    """Outputs that are lines come back each in its own place, whatever the norm does to it."""
    net, x = normed(), images(24, 3, 12, 12)
    for output, axis in enumerate([0, 1, 1, 0, 1, 0]):
        net.conv.weight.data[output] *= cross.line((5, 3), axis)
    text = f"{passes}split-kernels(arrangement=parallel, merge=concat)"
    result = PassManager(text, calibration=x if calibrated else None).run(trace(net, x[:2]))
    assert [site.outcome for site in result.record.passes[-1].sites] == ["kept"]
    assert relative(outputs(result.module, x), outputs(net, x)) < 1e-9


def names(items: Sequence[nn.Module]) -> list[str]:
    return [type(item).__name__ for item in items]


def test_the_network_around_stays_as_it_is() -> None:
    net = Net(lambda m, x: m.fc(m.second(m.first(x).relu()).mean((2, 3))), first=nn.Conv2d(3, 8, 5, padding=2),
              second=nn.Conv2d(8, 8, 3), fc=nn.Linear(8, 4))  # fmt: skip
    result = split(net, torch.randn(2, 3, 12, 12), rank=0.5, only=("second",))
    assert names([item for item in result.module.modules() if not list(item.children())]) == [
        "Conv2d", "ReLU", "Conv2d", "Conv2d", "Linear"
    ]  # fmt: skip


def test_a_layer_of_more_features_than_a_gram_matrix_takes_is_fitted_behind_the_first_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fxcompile.passes._chain_fitting.MOST_FEATURES", 100)
    layer, x, unseen = conv(8, 12, 5, 5, padding=2), images(60, 8, 10, 10), images(40, 8, 10, 10, seed=50)
    wanted = outputs(layer, unseen)
    errors = [relative(outputs(split(layer, x, data, rank=16).module, unseen), wanted) for data in (None, x)]
    assert errors[1] < 0.8 * errors[0]


def test_side_by_side_an_axis_of_one_tap_has_no_branch() -> None:
    for merge in ("sum", "concat"):
        result = split(conv(4, 6, 1, 3, 5), randn(2, 4, 3, 6, 7), arrangement="parallel", merge=merge)
        made = [layer for layer in result.program.module.modules() if isinstance(layer, nn.Conv3d)]
        assert sorted(tuple(layer.kernel_size) for layer in made) == [(1, 1, 5), (1, 3, 1)]


def test_the_metric_of_the_inputs_brings_the_pair_nearer_in_their_norm() -> None:
    """Nearer than the singular value decomposition of the weight alone, with the same exact last layer on top."""
    gains = []
    for seed in range(6):
        layer, x = conv(4, 8, 3, 3, seed=seed), randn(8, 4, 9, 9, seed=seed)
        mixed = torch.einsum("dc,nchw->ndhw", torch.diag(torch.tensor([3.0, 1, 0.3, 0.1])).double(), x)
        rows = patches(layer, mixed).double()[:, 0]
        gram = (rows.mT @ rows / len(rows))[None]
        target = layer.weight.detach()[None]
        errors = []
        for metric in (separable.input_metric(gram, 4, (3, 3), (0,)), None):
            first, _ = separable.nearest_pair(target, (0,), 3, metric)
            second = best_last([first, torch.zeros(1, 8, 3, 1, 3).double()], target, gram)
            lacks = (separable.compose(first, second) - target).flatten(2)
            errors.append(float((lacks @ gram * lacks).sum()))
        site = next(
            item for item in SplitKernels(rank=3, min_saving=None).sites(trace(layer, x)) if isinstance(item, Site)
        )
        kernels = SplitKernels(rank=3, min_saving=None).nearest_pair(site, target[0], gram)
        lacks = (separable.compose(*[kernel[None] for kernel in kernels]) - target).flatten(2)
        assert float((lacks @ gram * lacks).sum()) <= errors[0] * (1 + 1e-9)
        gains.append(errors[0] / errors[1])
    assert max(gains) < 1


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_inputs_that_are_always_zero_do_not_hinder_the_others(activation: str) -> None:
    """A dead ReLU ahead of a depthwise layer, and of one whose first group it feeds alone."""
    for groups in (2, 8):
        model = nn.Sequential(conv(3, 8, 1, 1), nn.ReLU(), conv(8, 8, 5, 5, groups=groups, padding=2)).eval()
        with torch.no_grad():
            model[0].bias[: 8 // groups] = -100.0
        pass_ = SplitKernels(rank=1.0, activation=activation, min_saving=None, round_to=1)
        result = PassManager([pass_], calibration=images(64, 3, 12, 12)).run(trace(model, images(2, 3, 12, 12)))
        site = next(site for site in result.record.passes[0].sites if site.name == "2")
        assert (site.outcome, site.reason) == ("kept", "")
        assert site.error < 0.5


def test_the_metric_is_the_nearest_kronecker_product_however_large_the_kernel() -> None:
    """7 x 7 x 7 of two channels: what is iterated on would hold 343**4 numbers if it were formed."""
    for inputs, kernel in ((2, (7, 7, 7)), (2, (2, 2)), (5, (2, 2))):
        near, far = randn(inputs, 9, seed=1), randn(math.prod(kernel), 400, seed=2)
        metric, other = (part @ part.mT for part in (near, far))
        gram = torch.einsum("cd,ij->cidj", metric, other).reshape(1, inputs * len(other), -1)
        found = separable.input_metric(gram, inputs, kernel, ())
        torch.testing.assert_close(found[0], metric * other.square().sum() / other.trace(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pass_", [Bottleneck(), GroupShuffle(), SplitKernels(), StackKernels()], ids=str)
def test_a_transposed_convolution_is_named_as_one_where_its_kernel_would_be_replaced(pass_: Pass) -> None:
    net = nn.Sequential(nn.ConvTranspose2d(16, 16, 5, stride=2), nn.ReLU(), nn.ConvTranspose2d(16, 16, 1)).double()
    found = list(pass_.sites(trace(net.eval(), randn(2, 16, 5, 5))))
    assert all(isinstance(item, Skip) for item in found)
    reason = "it is a transposed convolution, and only plain ones have such a form"
    over_one_pixel = [("2", reason)] if pass_.name == "bottleneck" else []
    assert [(item.name, item.reason) for item in found if isinstance(item, Skip)] == [("0", reason), *over_one_pixel]


def test_drafts_of_other_widths_take_the_weight_apart_once() -> None:
    layer, x = conv(6, 8, 3, 3, padding=1), images(16, 6, 9, 9)
    program = trace(layer, x[:2])
    rows = patches(layer, x).double()[:, 0]
    gram, weight = (rows.mT @ rows / len(rows))[None], layer.weight.detach().double()

    def site() -> Site:
        return next(item for item in SplitKernels(min_saving=None).sites(program) if isinstance(item, Site))

    shared = site()
    for rank in (2, 5, 8):
        pass_ = SplitKernels(rank=rank, min_saving=None)
        drafts = [pass_.draft(item, weight, gram) for item in (shared, site())]
        assert torch.equal(drafts[0].weight, drafts[1].weight)
        assert len(shared.memo) == 2
    pass_.draft(shared, 2 * weight, gram)
    assert len(shared.memo) == 4
