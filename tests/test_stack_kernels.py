"""stack-kernels as a pass: what stands in a layer's place, what it costs, how near it comes, and what stays."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fxcompile.passes import StackKernels
from fxcompile.passes._stacking import stack, stage_kernels
from helpers import KINDS, MODES, Net, conv, images, only_site, printed, randn, relative
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_stacking import brute_force, naive_compose, output_error, random_stages, smooth
from torch import Tensor, nn

from fxcompile import layer_stats
from fxcompile.calibration import as_calibration
from fxcompile.contracts import Approximate, Trained
from fxcompile.errors import PipelineError, UsageError
from fxcompile.manager import PassManager, Result
from fxcompile.pipeline import parse_pipeline
from fxcompile.rewriting import Site, Skip
from fxcompile.tracing import trace

KERNELS = [(5,), (7,), (9,), (5, 5), (7, 7), (5, 1), (1, 7), (5, 3), (9, 5), (3, 7), (5, 5, 5), (1, 5, 3)]


def compiled(model: nn.Module, pass_: StackKernels, x: Tensor, calibration: Tensor | None = None) -> Result:
    return PassManager([pass_], calibration=calibration, verify_examples=2).run(trace(model.eval(), x[:2]))


def convolutions(result: Result) -> list[Any]:
    return [module for module in result.module.modules() if isinstance(module, tuple(KINDS.values()))]


# ---- where it stands -------------------------------------------------------------------------------------------------


@st.composite
def layers(draw: st.DrawFn) -> tuple[Any, Tensor]:
    """A convolution of any geometry with a side of 5 or more, and an input."""
    kernel = draw(st.sampled_from(KERNELS))
    dims, groups = len(kernel), draw(st.sampled_from([1, 1, 2, 3]))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding: Any = draw(st.sampled_from(["numbers", "numbers", "same", "valid"]))
    if padding == "numbers":
        padding = tuple(draw(st.integers(0, dilation * (k - 1))) for k in kernel)
    if padding == "same":
        stride = 1
    reach = [dilation * (k - 1) for k in kernel]
    size = [max(n, draw(st.integers(1, 4))) + 1 for n in reach]
    mode = draw(st.sampled_from(MODES))
    channels = [groups * draw(st.integers(1, 3)) for _ in range(2)]
    layer = conv(
        *channels, *kernel, seed=draw(st.integers(0, 99)), stride=stride, padding=padding, dilation=dilation,
        groups=groups, bias=draw(st.booleans()), padding_mode=mode if dims < 3 or mode != "reflect" else "zeros",
    )  # fmt: skip
    return layer, randn(2, channels[0], *size, seed=5)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layers(), st.integers(1, 8))
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_the_stack_is_one_convolution_at_every_pixel(case: tuple[Any, Tensor], rank: int) -> None:
    """Whatever kernel its layers compose to: with padding, stride, dilation, groups and bias in the right places."""
    layer, x = case
    program = trace(layer, x)
    (site,) = StackKernels(rank=rank, min_saving=None).sites(program)
    assert isinstance(site, Site)
    inside = site.layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxcompile.passes.stack_kernels.stack", any_stack)  # whatever it is: this is about what is around
        stack = StackKernels(rank=rank, min_saving=None).rewrite(site)
        between = StackKernels(rank=rank, min_saving=None, activation="relu").rewrite(site)
    kernels = [inner.weight.detach() for inner in stack]
    assert {size for kernel in kernels for size in kernel.shape[2:]} <= {1, 3}
    dense = copy.deepcopy(inside)
    dense.weight = nn.Parameter(naive_compose(kernels, inside.groups))
    with torch.no_grad():
        given = randn(*site.input_shape, seed=9)
        wanted, found = dense(given), nn.Sequential(*stack)(given)
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())
    assert [inner.bias is None for inner in stack] == [True] * (len(stack) - 1) + [layer.bias is None]
    assert [type(module) for module in between[1::2]] == [nn.ReLU] * (len(stack) - 1)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(stack, between[::2], strict=True))


def any_stack(weight: Tensor, widths: Sequence[int], groups: int, **options: Any) -> list[Tensor]:
    channels = [weight.shape[1], *[width // groups for width in widths], len(weight) // groups]
    return random_stages(stage_kernels(weight.shape[2:]), channels, groups)


@pytest.mark.parametrize("kernel", [(5,), (7,), (5, 5), (5, 1), (1, 7), (5, 3), (7, 7)])
@pytest.mark.parametrize("data", [False, True])
def test_enough_channels_between_are_exact(kernel: tuple[int, ...], data: bool) -> None:
    """Above 1.52 times as many as go in (1.66 times for 7 x 7), for a weight with no structure at all."""
    layer = conv(2, 2, *kernel, padding=tuple(k // 2 for k in kernel))
    x = images(60, 2, *[9] * len(kernel))
    result = compiled(layer, StackKernels(rank=5, min_saving=None), x, x if data else None)
    assert only_site(result).outcome == "kept"
    with torch.no_grad():
        assert float((result.module(x) - layer(x)).abs().max()) < 1e-4 * float(layer(x).abs().max())


def test_golden_stack() -> None:
    model = Net(lambda net, x: net.conv(x).relu(), conv=conv(16, 24, 7, 7, stride=2, padding=3, dtype=torch.float32))
    x = randn(2, 16, 20, 20, dtype=torch.float32)
    result = compiled(model, StackKernels(rank=0.9), x)
    assert printed(result.program) == "\n".join([
        "conv.0 = Conv2d 16->8 3x3(x)",
        "conv.1 = Conv2d 8->8 3x3(conv.0)",
        "conv.2 = Conv2d 8->24 3x3 /2(conv.1)",
        "relu = ReLU(conv.2)",
        "return relu",
    ])  # fmt: skip
    assert [layer.padding for layer in convolutions(result)] == [(3, 3), (0, 0), (0, 0)]
    relu = compiled(model, StackKernels(rank=0.9, activation="relu"), x)
    assert [type(layer).__name__ for layer in relu.module.conv.children()] == [
        "Conv2d",
        "ReLU",
        "Conv2d",
        "ReLU",
        "Conv2d",
    ]


# ---- what it costs ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layers(), st.floats(0.1, 1.5), st.sampled_from([None, 1, 2, 3, 8]), st.integers(1, 6))
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_a_share_of_the_macs_is_not_exceeded(
    case: tuple[Any, Tensor], rank: float, round_to: int | None, factor: int
) -> None:
    """Counted by the cost of the program, which runs the layers; and where nothing fits, the site says so."""
    layer, x = case
    wide = conv(
        layer.in_channels * factor, layer.out_channels * factor, *layer.kernel_size, stride=layer.stride,
        padding=layer.padding, dilation=layer.dilation, groups=layer.groups, padding_mode=layer.padding_mode,
    )  # fmt: skip
    program = trace(wide, x.repeat(1, factor, *[1] * (x.dim() - 2)))
    pass_ = StackKernels(rank=rank, round_to=round_to, min_saving=None)
    (found,) = pass_.sites(program)
    node, before = next(iter(program.layers(*KINDS.values())))
    site = found if isinstance(found, Site) else Site.of(program, node)

    def macs(widths: Sequence[int]) -> int:
        sizes, count = randn(*site.input_shape), 0
        for inner in stack_of(before, widths):
            sizes = inner(sizes)
            count += sizes[0].numel() * inner.weight[0].numel()
        return count

    dense = math.prod(site.output_shape[1:]) * before.weight[0].numel()
    widths, groups = pass_.widths(site), before.groups
    assert all(width % groups == 0 for width in widths)
    assert pass_.macs_share(site) == pytest.approx(macs(widths) / dense)
    unit = math.lcm(groups, round_to or 8)
    if isinstance(found, Skip):
        assert widths[0] == groups
        assert macs(widths) > rank * dense * (1 - 1e-9)
        assert "above rank=" in found.reason
    else:
        assert macs(widths) <= rank * dense * (1 + 1e-9)
        step = unit if widths[0] % unit == 0 else groups
        assert macs([width + step for width in widths]) > rank * dense * (1 - 1e-9) or widths[0] + groups == unit
        assert widths[0] % unit == 0 or widths[0] < unit


def stack_of(layer: Any, widths: Sequence[int]) -> list[Any]:
    """Layers of the same geometry whose weights do not matter."""
    pieces = max(layer.kernel_size) // 2
    kernels = [tuple(3 if size // 2 > at else 1 for size in layer.kernel_size) for at in range(pieces)]
    channels = [layer.in_channels, *widths, layer.out_channels]
    return [
        KINDS[len(kernel)](
            channels[at], channels[at + 1], kernel, layer.stride if at == pieces - 1 else 1,
            layer.padding if at == 0 else 0, layer.dilation, layer.groups, dtype=torch.float64,
        ).requires_grad_(False)
        for at, kernel in enumerate(kernels)
    ]  # fmt: skip


def test_the_dilation_counts() -> None:
    """Padding of 8 makes the first of two layers work on 32 x 32 pixels less 8, in place of 20 x 20 less 2."""
    x, widths = randn(2, 16, 16, 16), []
    for layer in (conv(16, 16, 5, 5, padding=2), conv(16, 16, 5, 5, padding=8, dilation=4)):
        result = compiled(layer, StackKernels(rank=0.7, round_to=1), x)
        widths.append(convolutions(result)[0].out_channels)
        share = result.record.after.macs / result.record.before.macs
        assert share <= 0.7 < share * (widths[-1] + 1) / widths[-1]
    assert widths == [13, 9]


@pytest.mark.parametrize(
    ("options", "groups", "width"),
    [
        ({"rank": 0.6}, 1, 16),  # a share: to 8 by default
        ({"rank": 0.6, "round_to": 1}, 1, 23),
        ({"rank": 0.6, "round_to": 4}, 1, 20),
        ({"rank": 0.6, "round_to": 16}, 1, 16),
        ({"rank": 0.6, "round_to": 64}, 1, 23),  # it leaves none, so it does not count
        ({"rank": 20}, 1, 20),  # channels: as they are given
        ({"rank": 20, "round_to": 8}, 1, 16),
        ({"rank": 0.6, "round_to": 3}, 2, 18),
        ({"rank": 0.6, "round_to": 8}, 16, 16),
        ({"rank": 1}, 1, 1),
        ({"rank": 3}, 2, 2),
    ],
)
def test_channels_are_rounded_down(options: dict[str, Any], groups: int, width: int) -> None:
    program = trace(conv(32, 32, 5, 5, padding=2, groups=groups), randn(2, 32, 14, 14))
    (site,) = StackKernels(**options).sites(program)
    assert isinstance(site, Site)
    assert StackKernels(**options).widths(site) == [width]
    assert StackKernels(**options).rewrite(site)[0].out_channels == width


@pytest.mark.parametrize("kernel", [(5, 5), (7, 7), (7, 5)])
@pytest.mark.parametrize("groups", [1, 2])
def test_energy_gives_the_fewest_channels_that_keep_it(kernel: tuple[int, ...], groups: int) -> None:
    """In every group, by alternating least squares as it is done here: with one channel less they do not."""
    layer = conv(3 * groups, 3 * groups, *kernel, padding=2, groups=groups)
    weight, x = layer.weight.detach(), randn(2, 3 * groups, 12, 12)
    made = convolutions(compiled(layer, StackKernels(energy=0.7, min_saving=None), x))
    widths = [stage.out_channels for stage in made[:-1]]
    assert len(made) == max(kernel) // 2
    assert len(set(widths)) == 1

    def kept(less: int) -> float:
        composed = naive_compose(stack(weight, [width - less for width in widths], groups, sweeps=12), groups)
        lost = (composed - weight).square().unflatten(0, (groups, -1)).flatten(1).sum(1)
        return 1 - float((lost / weight.square().unflatten(0, (groups, -1)).flatten(1).sum(1)).max())

    assert kept(0) >= 0.7 > kept(groups)
    rounded = StackKernels(energy=0.7, round_to=8, min_saving=None)
    (site,) = rounded.sites(trace(layer, x))
    assert isinstance(site, Site)
    assert rounded.widths(site)[0] == -(-widths[0] // 8) * 8


def test_seven_by_seven_is_three_layers_and_data_make_them_better() -> None:
    layer, x, unseen = conv(8, 8, 7, 7, padding=3), images(60, 8, 12, 12), images(40, 8, 12, 12, seed=50)
    results = [compiled(layer, StackKernels(rank=0.5), x, data) for data in (None, x)]
    errors = [relative(result.module(unseen), layer(unseen)) for result in results]
    assert [[inner.kernel_size for inner in convolutions(result)] for result in results] == [[(3, 3)] * 3] * 2
    assert all(only_site(result).after.macs <= 0.5 * only_site(result).before.macs for result in results)
    assert errors[1] < 0.8 * errors[0]


LEFT: dict[str, tuple[Any, dict[str, Any], str]] = {
    "even": (conv(4, 4, 6, 6), {}, "3x3 kernels compose to odd sizes, and 6 is even"),
    "even on one axis": (conv(4, 4, 5, 4), {}, "and 4 is even"),
    "depthwise": (conv(8, 8, 5, 5, groups=8), {}, "one channel a group between costs"),
    "no budget": (conv(2, 2, 5, 5), {"rank": 0.1}, "one channel between costs"),
    "nothing saved": (conv(4, 4, 5, 5), {"rank": 8}, "against min_saving=0"),
    "too little saved": (conv(32, 32, 5, 5), {"rank": 0.9, "min_saving": 0.5}, "below min_saving=0.5"),
}


@pytest.mark.parametrize("case", LEFT)
def test_it_leaves_and_says_why_before_anything_is_fitted(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, options, reason = LEFT[case]
    monkeypatch.setattr(StackKernels, "candidates", None)
    x = randn(8, layer.in_channels, 12, 12)
    result = compiled(layer, StackKernels(**options), x, x)
    assert only_site(result).outcome == "left"
    assert reason in only_site(result).reason
    assert torch.equal(result.module(x), layer(x))


def test_small_kernels_and_other_layers_are_no_sites() -> None:
    model = nn.Sequential(conv(4, 4, 3, 3), nn.ConvTranspose2d(4, 4, 5).double(), conv(4, 4, 1, 1)).eval()
    (left,) = StackKernels().sites(trace(model, randn(2, 4, 12, 12)))
    assert left == Skip("1", "it is a transposed convolution, and only plain ones have such a form")


def test_the_option_kernel_picks_by_the_largest_side() -> None:
    model = nn.Sequential(*[conv(8, 8, *kernel) for kernel in [(5, 5), (7, 3), (7, 7)]]).eval()
    program = trace(model, randn(2, 8, 24, 24))
    found = [item.name for item in StackKernels(kernel=7).sites(program) if isinstance(item, Site)]
    assert found == ["1", "2"]
    assert StackKernels(kernel=9).kernel == 9
    for even in (6, 8):
        with pytest.raises(UsageError, match="odd sizes"):
            StackKernels(kernel=even)
    with pytest.raises(UsageError, match="cannot be 3; give a whole number of at least 5"):
        StackKernels(kernel=3)
    with pytest.raises(PipelineError, match=r"'kernel' of pass 'stack-kernels' cannot be 6 \(3x3 kernels compose"):
        parse_pipeline("stack-kernels(kernel=6)")


def test_a_site_that_saves_just_as_much_as_it_must_is_one() -> None:
    program = trace(conv(8, 8, 5, 5).eval(), randn(2, 8, 12, 12))
    (site,) = StackKernels(rank=6, min_saving=None).sites(program)
    saving = 1 - StackKernels(rank=6).macs_share(site)
    (kept,), (left,) = (StackKernels(rank=6, min_saving=saving + more).sites(program) for more in (0.0, 1e-6))
    assert isinstance(kept, Site)
    assert not isinstance(left, Site)


def test_every_option_says_what_it_is() -> None:
    assert all(field.description for field in StackKernels.model_fields.values())


def test_only_and_skip_and_the_largest_error_hold() -> None:
    model = nn.Sequential(*[conv(8, 8, 5, 5, padding=2, seed=seed) for seed in range(3)]).eval()
    x = images(40, 8, 10, 10)

    def outcomes(**options: Any) -> list[str]:
        result = compiled(model, StackKernels(rank=0.5, **options), x, x)
        return [f"{site.name} {site.outcome}" for site in result.record.passes[0].sites]

    assert outcomes(only=["[01]"]) == ["0 kept", "1 kept"]
    assert outcomes(skip=["1"]) == ["0 kept", "2 kept"]
    result = compiled(model, StackKernels(rank=0.5, max_error=1e-6), x, x)
    assert [site.outcome for site in result.record.passes[0].sites] == ["left"] * 3
    assert all("is above max_error=1e-06" in site.reason for site in result.record.passes[0].sites)
    assert torch.equal(result.module(x), model(x))


def test_layers_that_share_a_weight_are_left() -> None:
    """One of them rewritten, the other would keep the weight, and the network grow."""
    net = Net(lambda m, x: m.second(m.first(x)), first=conv(8, 8, 5, 5), second=conv(8, 8, 5, 5))
    net.second.weight = net.first.weight  # type: ignore[union-attr,assignment]
    found = list(StackKernels().sites(trace(net.eval(), randn(2, 8, 11, 11))))
    assert [item.reason for item in found if isinstance(item, Skip)] == [
        "it shares its weight with 'second', which would keep it",
        "it shares its weight with 'first', which would keep it",
    ]
    assert len(found) == 2


def test_weights_that_are_not_finite_are_left() -> None:
    model = nn.Sequential(conv(8, 8, 5, 5), nn.ReLU(), conv(8, 8, 5, 5, padding=2)).eval()
    x = images(20, 8, 10, 10)
    program = trace(model, x[:2])
    program.layer(next(iter(program.layers(nn.Conv2d)))[0]).weight.data[0, 0, 0, 0] = math.nan
    for data in (None, x):
        result = PassManager([StackKernels(min_saving=None)], calibration=data, verify="off").run(program)
        first, *_ = result.record.passes[0].sites
        assert first.outcome == "left"
        assert first.reason == "it could not be fitted: 1 of 1600 weights are NaN or infinite"


# ---- how near it comes -----------------------------------------------------------------------------------------------


def smooth_conv(inputs: int, outputs: int, seed: int = 0, **options: Any) -> Any:
    layer = conv(inputs, outputs, 5, 5, padding=2, **options)
    layer.weight.data.copy_(smooth(outputs, inputs, 5, seed=seed) / math.sqrt(25 * inputs))
    return layer


def test_data_make_outputs_nearer_and_weights_farther() -> None:
    """Held-out error of the outputs falls by a third and more; that of the weights grows (methods.md, section 9)."""
    layer, seen, unseen = smooth_conv(16, 16), images(64, 16, 12, 12), images(32, 16, 12, 12, seed=50)
    outputs, weights = [], []
    for data in (None, seen):
        result = compiled(layer, StackKernels(rank=10), seen, data)
        outputs.append(relative(result.module(unseen), layer(unseen)))
        dense = naive_compose([inner.weight.detach() for inner in convolutions(result)])
        weights.append(relative(dense, layer.weight))
    assert outputs[1] < 0.67 * outputs[0]
    assert weights[1] > weights[0]


@pytest.mark.parametrize(("kernel", "seed"), [(5, 1), (5, 2), (7, 1)])
def test_few_data_never_lose_to_the_weights(kernel: int, seed: int) -> None:
    """Two samples, of which one is held out: a fit to the other is far off there, and does not stand."""
    layer, x = conv(8, 8, kernel, kernel, padding=kernel // 2, seed=seed), images(2, 8, 8, 8, seed=seed)
    _, held = as_calibration(x, trace(layer, x).inputs).split(seed=0)
    ((unseen,),) = held.batches(len(x))
    blind, fitted = (compiled(layer, StackKernels(rank=0.5), x, data).module(unseen) for data in (None, x))
    assert relative(fitted, layer(unseen)) <= relative(blind, layer(unseen)) * (1 + 1e-9)


def test_the_stated_error_holds_on_other_data() -> None:
    layer, seen, unseen = smooth_conv(16, 16), images(64, 16, 12, 12), images(64, 16, 12, 12, seed=50)
    result = compiled(layer, StackKernels(rank=0.5), seen, seen)
    assert only_site(result).error == pytest.approx(relative(result.module(unseen), layer(unseen)), rel=0.15)


def test_no_search_on_the_outputs_finds_a_much_better_stack() -> None:
    """Tiny layers, and L-BFGS on all weights from many starts: it sees all the data and is not regularised."""
    for seed in range(2):
        layer = conv(3, 3, 5, 5, padding=2, seed=seed, bias=False)
        layer.weight.data.copy_(smooth(3, 3, 5, seed=seed))
        x = images(60, 3, 8, 8, seed=seed)
        result = compiled(layer, StackKernels(rank=2), x, x)
        found = output_error(layer.weight.detach(), [inner.weight.detach() for inner in convolutions(result)], x)
        best = min(searched(layer.weight.detach(), x, 10 * seed + start) for start in range(3))
        assert found <= 1.05 * best


def searched(weight: Tensor, x: Tensor, seed: int) -> float:
    """The error of the outputs that L-BFGS reaches from a random start, over all patches of the data."""
    rows = nn.functional.unfold(x, (5, 5), padding=2).transpose(1, 2).flatten(0, 1)
    gram = rows.T @ rows
    gram = gram / (weight.flatten(1) @ gram @ weight.flatten(1).T).trace()
    return brute_force(weight, 2, seed, gram)


def test_upstream_errors_are_made_up_for() -> None:
    """The second layer is fitted to the original's outputs from what the first stack gives."""
    model = nn.Sequential(smooth_conv(8, 12), nn.ReLU(), smooth_conv(12, 8, seed=3)).eval()
    seen, unseen = images(96, 8, 12, 12), images(32, 8, 12, 12, seed=50)
    together = compiled(model, StackKernels(rank=2), seen, seen)
    alone = [compiled(model, StackKernels(rank=2, only=[name]), seen, seen).module for name in "02"]
    apart = nn.Sequential(*alone[0].get_submodule("0").children(), nn.ReLU(), *alone[1].get_submodule("2").children())
    assert relative(together.module(unseen), model(unseen)) < 0.95 * relative(apart(unseen), model(unseen))


def test_the_data_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The joint step and the least-squares fit of the last layer share one collection of statistics."""
    rows: list[int] = []
    absorb = layer_stats.LayerStats._absorb

    def counted(stats: Any, chunk: Tensor, wanted: Tensor | None, leading: int) -> None:
        rows.append(chunk.shape[:leading].numel())
        absorb(stats, chunk, wanted, leading)

    monkeypatch.setattr(layer_stats.LayerStats, "_absorb", counted)
    layer, x = smooth_conv(8, 8), images(40, 8, 10, 10)
    result = compiled(layer, StackKernels(rank=0.5), x, x)
    assert only_site(result).outcome == "kept"
    assert sum(rows) == 30 * 100


def test_equal_calls_give_equal_bits() -> None:
    layer, x = smooth_conv(8, 8), images(40, 8, 10, 10)
    first, again = (compiled(layer, StackKernels(rank=0.5), x, x).module.state_dict() for _ in range(2))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


# ---- unusual layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_every_floating_dtype_stays(dtype: torch.dtype, activation: Any) -> None:
    layer, x = smooth_conv(8, 8, dtype=dtype), images(40, 8, 10, 10, dtype=dtype)
    result = compiled(layer, StackKernels(rank=0.5, activation=activation), x, x)
    assert only_site(result).outcome == "kept"
    assert {parameter.dtype for parameter in result.module.parameters()} == {dtype}
    assert result.module(x).dtype == dtype
    wide = compiled(smooth_conv(8, 8), StackKernels(rank=0.5, activation=activation), x.double(), x.double())
    assert only_site(result).error == pytest.approx(only_site(wide).error, abs=0.02)


@pytest.mark.parametrize("trains", [True, False])
def test_what_is_frozen_stays_frozen(trains: bool) -> None:
    layer, x = smooth_conv(8, 8), images(20, 8, 10, 10)
    layer.requires_grad_(trains)
    for activation in ("none", "relu"):
        result = compiled(layer, StackKernels(rank=0.5, activation=activation), x, x)
        assert {parameter.requires_grad for parameter in result.module.parameters()} == {trains}


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("kernel", [5, 7])
@pytest.mark.parametrize(("groups", "dead"), [(1, 8), (2, 4), (8, 1)])
def test_a_weight_of_zeros_stays_zero(data: bool, kernel: int, groups: int, dead: int) -> None:
    """All of it, one group of it, or a filter of a depthwise layer; and the others are fitted as ever."""
    layer, x = conv(8, 8, kernel, kernel, padding=kernel // 2, groups=groups), images(40, 8, 10, 10)
    layer.weight.data[:dead].zero_()
    pass_ = StackKernels(rank=2 * groups, min_saving=None)
    result = compiled(layer, pass_, x, x if data else None)
    assert only_site(result).outcome == "kept"
    with torch.no_grad():
        lacks = (result.module(x) - layer(x)).abs()
        assert float(lacks[:, :dead].max()) < 1e-12
        assert dead == 8 or relative(result.module(x)[:, dead:], layer(x)[:, dead:]) < 0.9


@pytest.mark.parametrize("data", [False, True])
def test_single_channels_and_a_single_channel_between(data: bool) -> None:
    for inputs, outputs in [(1, 1), (1, 6), (6, 1)]:
        layer, x = conv(inputs, outputs, 5, 5, padding=2), images(40, inputs, 10, 10)
        result = compiled(layer, StackKernels(rank=1), x, x if data else None)
        assert [tuple(inner.weight.shape) for inner in convolutions(result)] == [
            (1, inputs, 3, 3),
            (outputs, 1, 3, 3),
        ]
        assert only_site(result).error < 1


def test_a_separable_kernel_is_found_with_one_channel() -> None:
    layer, x = conv(1, 1, 5, 5, padding=2, bias=False), images(40, 1, 10, 10)
    layer.weight.data.copy_(naive_compose([randn(1, 1, 3, 3, seed=3), randn(1, 1, 3, 3, seed=4)]))
    for data in (None, x):
        result = compiled(layer, StackKernels(rank=1), x, data)
        assert relative(result.module(x), layer(x)) < 1e-4


def test_a_layer_called_twice_is_replaced_once_for_both() -> None:
    model = Net(lambda net, x: net.conv(x) + net.conv(x.flip(2)).relu(), conv=smooth_conv(8, 8))
    x = images(40, 8, 10, 10)
    result = compiled(model, StackKernels(rank=0.5), x, x)
    assert len(convolutions(result)) == 2
    assert sum(node.op == "call_module" for node in result.module.graph.nodes) == 5
    assert relative(result.module(x), model(x)) < 0.3


def test_one_image_without_a_batch_works() -> None:
    layer, x = smooth_conv(8, 8), images(1, 8, 10, 10)[0]
    result = PassManager([StackKernels(rank=0.5, activation="relu")], verify_examples=2).run(trace(layer, x))
    assert only_site(result).outcome == "kept"
    assert result.module(x).shape == layer(x).shape


def test_a_layer_of_more_features_than_a_gram_matrix_takes_is_fitted_behind_the_first_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fxcompile.passes._chain_fitting.MOST_FEATURES", 100)
    layer, x, unseen = smooth_conv(16, 16), images(64, 16, 12, 12), images(32, 16, 12, 12, seed=50)
    errors = [
        relative(compiled(layer, StackKernels(rank=10), x, data).module(unseen), layer(unseen)) for data in (None, x)
    ]
    assert errors[1] < 0.8 * errors[0]


# ---- ReLU between ----------------------------------------------------------------------------------------------------


def test_the_contract_follows_the_activation() -> None:
    assert isinstance(StackKernels().promise, Approximate)
    assert isinstance(StackKernels(activation="relu").promise, Trained)


@pytest.mark.parametrize("kernel", [(5, 5), (7, 5), (5,)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_a_relu_changes_nothing_on_the_calibrated_range(
    kernel: tuple[int, ...], groups: int, dtype: torch.dtype, rounding: float
) -> None:
    layer = conv(8, 8, *kernel, padding=2, groups=groups, dtype=dtype)
    size = [11] * len(kernel) if len(kernel) > 1 else [100]
    x, unseen = (images(40, 8, *size, seed=seed, dtype=dtype) for seed in (0, 50))
    site = Site.of(program := trace(layer, x[:2]), next(iter(program.layers(*KINDS.values())))[0])
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxcompile.passes.stack_kernels.stack", any_stack)
        patch.setattr("fxcompile.passes._chain_fitting.refine", lambda stages, *others, **options: stages)
        site = site.with_pairs(tuple((part, layer(part)) for part in x.split(8)))
        linear, between = (
            nn.Sequential(*StackKernels(rank=8, activation=activation).rewrite(site)) for activation in ("none", "relu")
        )
        assert sum(isinstance(module, nn.ReLU) for module in between) == max(kernel) // 2 - 1
        first = between[0](x)
        assert float(first.min()) >= 0, "the ReLU would cut what it was calibrated on"
        for inputs in (x, x / 3, torch.zeros_like(x)):  # zero and all between it and the data lie in the range as well
            wanted = linear(inputs)
            scale = max(float(wanted.abs().max()), float(linear(x).abs().max()))
            assert float((between(inputs) - wanted).abs().max()) <= rounding * scale
        assert relative(between(unseen), linear(unseen)) < max(0.01, rounding)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_gradients_reach_every_parameter_in_training(activation: Any) -> None:
    model = nn.Sequential(smooth_conv(8, 12), nn.ReLU(), conv(12, 8, 7, 7, padding=3)).eval()
    x = images(40, 8, 12, 12)
    module = compiled(model, StackKernels(rank=6, activation=activation), x, x).module.train()
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        touched = parameter.grad.flatten(1).abs().amax(1) if parameter.dim() > 1 else parameter.grad.abs()
        assert bool((touched > 0).all()), name
