"""Sums in the order in which ONNX Runtime's kernels add explain what those kernels give, and no more than that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

import fxcompile as fxc
from fxcompile.comparing import Broken, relative_maximum
from fxcompile.rounding import compare_noisy, rounding_reach, run_double
from fxcompile.summing import LANES, function_in_order, layer_in_order, sum_in_order


def in_runtime(operation: str, x: Tensor, **attributes: object) -> Tensor:
    """One operator of ONNX on one input, in float64."""
    import onnxruntime

    names, channels = ["x"], x.shape[1]
    weights: list[onnx.TensorProto] = []
    if operation == "InstanceNormalization":
        names += ["scale", "bias"]
        for name, value in (("scale", 1.0), ("bias", 0.0)):
            weights.append(helper.make_tensor(name, onnx.TensorProto.FLOAT, [channels], [value] * channels))
    given = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(x.shape))
    result = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(
        [helper.make_node(operation, names, ["y"], **attributes)], "g", [given], [result], weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run(None, {"x": x.numpy()})[0])).double()


def test_each_lane_adds_one_number_after_another() -> None:
    """2^24 + 1 is 2^24 in float32: after the large number in a lane, ones are lost; those in other lanes are not."""
    row = torch.ones(2, 40, dtype=torch.float64)
    row[:, 0] = 2.0**24
    lost = {lanes: len(range(lanes, 40, lanes)) for lanes in LANES}
    assert sum_in_order(row).tolist() == [2.0**24 + 39 - max(lost.values())] * 2
    whole = torch.arange(30, dtype=torch.float64).view(5, 6)
    assert torch.equal(sum_in_order(whole), whole.sum(1))
    third = torch.full((4, 1), 1 / 3, dtype=torch.float64)
    assert torch.equal(sum_in_order(third), third.sum(1))  # a single number is not added to anything


MAPS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "one value": lambda drawn: torch.full((1, 3, 32, 32, 32), float(torch.rand(1, generator=drawn) * 2 - 1)),
    "one value but at a border": lambda drawn: torch.cat(
        [torch.full((1, 3, 100, 129), 0.7), torch.rand(1, 3, 100, 1, generator=drawn)], 3
    ),
    "after a ReLU": lambda drawn: torch.randn(1, 3, 200, 300, generator=drawn).relu(),
    "about zero": lambda drawn: torch.randn(1, 3, 64, 64, generator=drawn),
}


@pytest.mark.parametrize("kind", MAPS)
def test_runtime_is_no_further_off_than_that(kind: str) -> None:
    """And, over some maps, not much nearer either: the reach of rounding is measured, not bounded."""
    norms, pools = (nn.InstanceNorm2d, nn.InstanceNorm3d), (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    nearest = 0.0
    for seed in range(6):
        x = MAPS[kind](torch.Generator().manual_seed(seed))
        dims = x.dim() - 2
        for layer, given in (
            (norms[dims - 2](3), in_runtime("InstanceNormalization", x)),
            (pools[dims - 2](1), in_runtime("GlobalAveragePool", x)),
            (pools[dims - 2](1), in_runtime("ReduceMean", x, axes=[*range(2, 2 + dims)], keepdims=1)),
        ):
            exact = layer(x.double())
            in_order = layer_in_order(layer, x.double())
            assert in_order is not None
            off, reach = float((given - exact).abs().max()), float((in_order - exact).abs().max())
            one_rounding = torch.finfo(torch.float32).eps * float(exact.abs().max())
            assert off <= 1.6 * reach + 2 * one_rounding
            nearest = max(nearest, off / (reach + one_rounding))
    assert nearest > 0.3


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.InstanceNorm1d(4, affine=True), (2, 4, 9)),
        (nn.InstanceNorm2d(4, eps=0.1), (2, 4, 5, 3)),
        (nn.InstanceNorm2d(4, affine=True), (4, 5, 3)),
        (nn.GroupNorm(2, 4), (2, 4, 5, 3)),
        (nn.GroupNorm(2, 4, affine=False), (2, 4)),
        (nn.LayerNorm([4, 5]), (2, 3, 4, 5)),
        (nn.LayerNorm(5, bias=False), (2, 5)),
        (nn.AdaptiveAvgPool2d(1), (2, 4, 5, 3)),
        (nn.AdaptiveAvgPool1d(1), (4, 5)),
        (nn.AdaptiveAvgPool3d((1, 1, 1)), (2, 4, 5, 3, 2)),
    ],
)
def test_layers_are_what_torch_computes_up_to_rounding(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        given = layer_in_order(layer.double(), x)
        assert given is not None
        assert given.shape == layer(x).shape
        assert relative_maximum(given, layer(x)) < 1e-6


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (torch.mean, ()),
        (torch.sum, ()),
        (torch.mean, ((1, 3),)),
        (torch.sum, ((0,), True)),
        (torch.mean, ((2, 3), True)),
    ],
)
def test_functions_are_what_torch_computes_up_to_rounding(function: Callable[..., Tensor], options: tuple[()]) -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given, wanted = function_in_order(function, x, *options), function(x, *options)
    assert given is not None
    assert given.shape == wanted.shape
    assert relative_maximum(given, wanted) < 1e-6


def test_what_sums_nothing_or_has_its_statistics_is_left() -> None:
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    for layer in (nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.InstanceNorm2d(3, track_running_stats=True), nn.MaxPool2d(4)):
        assert layer_in_order(layer, x) is None
    assert function_in_order(torch.amax, x, (2, 3)) is None


def test_norms_of_maps_of_one_value_write_a_file(tmp_path: Path) -> None:
    """32,768 equal pixels: ONNX Runtime's instance norm is off by 1e-2, and yet the file is right."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 4, 1), nn.InstanceNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, 1)).eval()
    program = fxc.trace(model, torch.randn(1, 1, 32, 32, 32))
    for seed in range(3):
        result = fxc.PassManager([], seed=seed, verify_examples=8).run(program)
        result.save_onnx(tmp_path / f"{seed}.onnx")
        assert result.record.file is not None
        assert result.record.file.examples == 8


def test_a_wrong_eps_is_still_seen() -> None:
    """On a map that varies, rounding explains a hundred-thousandth, and not what an eps of 1e-4 for 1e-5 makes."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 64, 64)
    program = fxc.trace(nn.Sequential(nn.Conv2d(2, 2, 1), nn.InstanceNorm2d(2)).eval(), x)
    own, exact = program.outputs(x), run_double(program, (x,))
    (reach,) = rounding_reach(program, (x,), exact)
    assert reach < 4e-6
    wrong = nn.InstanceNorm2d(2, eps=1e-4)(program.module.get_submodule("0")(x)).detach()
    with pytest.raises(Broken, match="rounding reaches"):
        compare_noisy([wrong], own, program, (x,))
