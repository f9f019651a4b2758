"""Constructions that the exporter cannot write, or writes wrongly, by itself: the file computes what the model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from forms import Written, exported
from torch import Tensor, nn

from fxcompile.errors import EmitError
from fxcompile.manager import PassManager
from fxcompile.tracing import trace


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_emitted(model: nn.Module, x: Tensor, path: Path, road: str = "symbolic") -> None:
    """The model's file gives what the model gives, for batches of several sizes."""
    program = trace(model.eval(), x) if road == "symbolic" else trace(exported(model, (x,)))
    PassManager("").run(program).save_onnx(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        inputs = drawn(batch, *x.shape[1:], seed=batch)
        with torch.no_grad():
            wanted = model(inputs).numpy()
        (given,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        assert given.shape == wanted.shape
        assert np.abs(given - wanted).max() <= 1e-5 * np.abs(wanted).max()


def attend(heads: Callable[[Tensor], Tensor], **options: Any) -> Callable[[Tensor], Tensor]:
    """Attention over what a function makes of [batch, 3, 4, 5, 6]."""

    def forward(x: Tensor) -> Tensor:
        query, key, value = x[:, 0], x[:, 1], x[:, 2]
        given = {name: option(x) if callable(option) else option for name, option in options.items()}
        return F.scaled_dot_product_attention(heads(query), heads(key), heads(value), **given)

    return forward


ATTENTION: dict[str, Callable[[Tensor], Tensor]] = {
    "[batch, heads, positions, width]": attend(lambda x: x),
    "[batch, positions, width]": attend(lambda x: x.flatten(1, 2)),
    "causal, of three axes": attend(lambda x: x.flatten(1, 2), is_causal=True),
    "windows": attend(lambda x: x.unflatten(3, (2, 3)).movedim(4, 1)),
    "windows, scaled": attend(lambda x: x.unflatten(3, (2, 3)).movedim(4, 1), scale=0.3),
    "windows with a mask for all": attend(
        lambda x: x.unflatten(3, (2, 3)).movedim(4, 1),
        attn_mask=lambda x: (x[0, 0, 0, :, :5] > 0) | torch.eye(5, dtype=torch.bool),
    ),
    "windows with a mask for each sample": attend(
        lambda x: x.unflatten(3, (2, 3)).movedim(4, 1), attn_mask=lambda x: x[:, :1, :1, :, :5]
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_over_any_number_of_axes(name: str, tmp_path: Path) -> None:
    assert_emitted(Written(ATTENTION[name]), drawn(2, 3, 4, 5, 6), tmp_path / "m.onnx")


def spectrogram(x: Tensor) -> Tensor:
    wave = torch.stft(x.flatten(1), 16, 4, window=torch.hann_window(16), normalized=True, return_complex=True)
    return torch.view_as_real(wave).square().sum(-1)


@pytest.mark.parametrize("road", ["symbolic", "exported"])
def test_spectrograms(road: str, tmp_path: Path) -> None:
    assert_emitted(Written(spectrogram), drawn(2, 3, 40), tmp_path / "m.onnx", road)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 4, 3, bias=False),
        nn.Conv2d(3, 1, 3, bias=False),
        nn.Conv2d(3, 6, 3, bias=False, groups=3),
        nn.Conv3d(3, 4, 3, bias=False),
        nn.Conv3d(3, 1, 3, bias=False),
        nn.ConvTranspose3d(3, 1, 3, bias=False),
        nn.ConvTranspose2d(3, 4, 3, bias=False),
    ],
    ids=str,
)
def test_a_convolution_without_bias_has_none_in_the_file(layer: nn.Module, tmp_path: Path) -> None:
    dims = len(layer.kernel_size)
    assert_emitted(nn.Sequential(layer, nn.SiLU()), drawn(2, 3, *range(5, 5 + dims)), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [len(node.input) for node in graph.node if "Conv" in node.op_type] == [2]
    assert len(graph.initializer) == 1


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d((3, 2), padding=1, divisor_override=2),
        nn.AvgPool2d(2, 1, divisor_override=9),
        nn.AvgPool3d((1, 2, 2), padding=(0, 1, 1), count_include_pad=False, divisor_override=5),
    ],
    ids=str,
)
def test_a_pool_with_a_divisor_of_its_own_keeps_it(pool: nn.Module, tmp_path: Path) -> None:
    assert_emitted(pool, drawn(2, 3, *[6] * (3 if isinstance(pool, nn.AvgPool3d) else 2)), tmp_path / "pool.onnx")


@pytest.mark.parametrize(("axes", "axis"), [((0, 1), 1), ((2, 3), 3)])
def test_an_axis_that_the_network_fixes_is_named(tmp_path: Path, axes: tuple[int, ...], axis: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, (3, 1)), nn.Linear(6, 5)).eval()
    result = PassManager("").run(trace(model, drawn(1, 3, 8, 6)))
    with pytest.raises(EmitError, match=f"takes no other size along axis {axis} of input 'input'; leave that axis out"):
        result.save_onnx(tmp_path / "model.onnx", dynamic={"input": axes})


def test_a_log_sigmoid_is_right_far_from_zero(tmp_path: Path) -> None:
    x = torch.linspace(-100, 100, 801).view(1, -1)
    model = nn.LogSigmoid()
    PassManager("", calibration=x).run(trace(model, x)).save_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (given,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(given).double(), model(x.double()), rtol=1e-6, atol=1e-8)
