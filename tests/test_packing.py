"""Packed weights: what the file holds, what decodes it, and that the runtime does so once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fxcompile.passes import Sparsify
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from fxcompile.manager import PassManager
from fxcompile.onnxfile import OnnxFile
from fxcompile.packing import BitMask, pack
from fxcompile.tracing import trace


def sparse(shape: tuple[int, ...], share: float, seed: int, dtype: Any = np.float32) -> NDArray[Any]:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(shape).astype(dtype)
    values[generator.random(shape) < share] = 0
    return values


def run_alone(form: BitMask) -> NDArray[Any]:
    """What ONNX Runtime computes of the nodes that decode a weight."""
    nodes, tensors = form.to_onnx("w")
    kind = TensorProto.FLOAT16 if form.values.dtype == np.float16 else TensorProto.FLOAT
    graph = helper.make_graph(nodes, "decode", [], [helper.make_tensor_value_info("w", kind, form.shape)], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    (found,) = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {})
    return np.asarray(found)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([np.float32, np.float16]),
)
def test_encoding_decoding_and_the_file_agree_bit_for_bit(
    shape: tuple[int, ...], share: float, seed: int, dtype: Any
) -> None:
    values = sparse(shape, share, seed, dtype)
    values.flat[0] = -0.0
    form = BitMask.encode(values)
    for found in (form.decode().numpy(), run_alone(form)):
        assert found.dtype == values.dtype
        assert found.tobytes() == values.tobytes()


def test_it_takes_a_bit_for_each_number_and_those_that_are_not_zero() -> None:
    form = BitMask.encode(np.array([[0, 1, 0, 0, 2, 0, 0, 0, 3]], np.float32))
    assert form.bits.tolist() == [0b00010010, 0b1]
    assert form.values.tolist() == [1, 2, 3]
    assert form.bytes == 2 + 3 * 4


def network(share: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(256, 10)).eval()
    for layer in (model[0], model[2]):
        layer.weight.data = torch.from_numpy(sparse(tuple(layer.weight.shape), share, 0))
    return model


def saved(path: Path, share: float, **options: Any) -> Any:
    x = torch.randn(2, 8, 6, 6)
    return PassManager([]).run(trace(network(share), (x,))).save_onnx(path, **options)


def test_a_file_of_sparse_weights_is_smaller_and_says_so(tmp_path: Path) -> None:
    packed = saved(tmp_path / "packed.onnx", 0.9).file
    dense = saved(tmp_path / "dense.onnx", 0.9, packed=False).file
    assert dense.packed.weights == 0
    assert packed.packed.weights == 2
    assert packed.packed.dense == 4 * (64 * 8 * 9 + 64 * 64 * 9)
    assert packed.packed.bytes < 0.16 * packed.packed.dense
    assert dense.bytes - packed.bytes == pytest.approx(packed.packed.dense - packed.packed.bytes, abs=600)
    assert packed.nodes == dense.nodes
    assert "2 weights take" in str(saved(tmp_path / "again.onnx", 0.9))


def test_dense_weights_stay_as_they_are(tmp_path: Path) -> None:
    saved(tmp_path / "a.onnx", 0.05)
    saved(tmp_path / "b.onnx", 0.05, packed=False)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_the_runtime_decodes_when_it_loads(tmp_path: Path) -> None:
    """No node that decodes is left in the graph that it runs, and all outputs are those of the dense file."""
    saved(tmp_path / "packed.onnx", 0.9)
    saved(tmp_path / "dense.onnx", 0.9, packed=False)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    x = {"input": np.random.default_rng(0).standard_normal((3, 8, 6, 6), dtype=np.float32)}
    outputs = []
    for name in ("dense.onnx", "packed.onnx"):
        session = onnxruntime.InferenceSession(tmp_path / name, options, providers=["CPUExecutionProvider"])
        x = {session.get_inputs()[0].name: next(iter(x.values()))}
        outputs.append(session.run(None, x)[0])
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert not kinds & {"BitShift", "BitwiseAnd", "CumSum", "Gather", "Slice"}
    assert np.array_equal(*outputs)


def test_a_weight_that_is_an_output_or_small_stays() -> None:
    large, small = sparse((64, 64), 0.9, 0), sparse((4, 4), 0.9, 0)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "large"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "given")],
        [
            numpy_helper.from_array(array, name)
            for array, name in ((large, "large"), (large, "given"), (small, "small"))
        ],
    )
    file = OnnxFile(helper.make_model(graph), {})
    assert [form.name for form in pack(file)] == ["large"]
    assert {"given", "small"} <= {tensor.name for tensor in file.proto.graph.initializer}


def test_ninety_percent_zeros_of_a_large_layer_take_a_seventh(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(256, 256, 3), nn.ReLU()).eval()
    x = torch.randn(1, 256, 5, 5)
    result = PassManager([Sparsify(ratio=0.9)]).run(trace(model, (x,)))
    result.save_onnx(tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").stat().st_size < 0.14 * 4 * 256 * 256 * 9
