"""Keeps compact weights compact in an ONNX file: an initializer becomes a sub-graph of standard ops that decodes it.

The runtime computes the weight once, when it loads the file: what the sub-graph takes is constant. So it comes after
onnxsim, which would compute it, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from fxcompile.onnxfile import OnnxFile

SMALLEST = 1024
"""Bytes of a weight below which packing it gains nothing."""

WORTH = 0.9
"""The share of its bytes that a packed weight may take, nodes that decode it included."""

DTYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


class Encoding(Protocol):
    """A compact form of a weight. `decode` and what `to_onnx` computes agree with the weight bit for bit."""

    name: ClassVar[str]

    @classmethod
    def encode(cls, values: NDArray[Any]) -> Self | None:
        """The form of a weight; None where it has none."""

    @property
    def bytes(self) -> int:
        """What the file holds of it, without the nodes that decode it."""

    def decode(self) -> Tensor:
        """The weight."""

    def to_onnx(self, output: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """The nodes that give the weight under this name, and the initializers that they take."""


@dataclass(frozen=True)
class BitMask:
    """A bit for each number, and those that are not zero, in order.

    Attributes:
        bits: [ceil(n / 8)] uint8, the first number in the lowest bit.
        values: those that are not zero.
        shape: of the weight.
    """

    name: ClassVar[str] = "bit mask"

    bits: NDArray[np.uint8]
    values: NDArray[Any]
    shape: tuple[int, ...]

    @classmethod
    def encode(cls, values: NDArray[Any]) -> Self | None:
        """The form of any weight. A zero with a sign counts as a number: it is not the zero that decoding gives."""
        flat = values.ravel()
        stays = (flat != 0) | np.signbit(flat)
        return cls(np.packbits(stays, bitorder="little"), flat[stays], values.shape)

    @property
    def bytes(self) -> int:
        """Of the bits and the numbers."""
        return int(self.bits.nbytes + self.values.nbytes)

    def decode(self) -> Tensor:
        """The weight."""
        count = math.prod(self.shape)
        flat = np.zeros(count, self.values.dtype)
        flat[np.unpackbits(self.bits, count=count, bitorder="little").astype(bool)] = self.values
        return torch.from_numpy(flat.reshape(self.shape))

    def to_onnx(self, output: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """The bits of each byte, the number of ones up to each (CumSum), and the value of that number, or zero."""
        count = math.prod(self.shape)

        def name(part: str) -> str:
            return f"{output}/{part}"

        held = {
            "bytes": self.bits.reshape(-1, 1),
            "values": np.concatenate([np.zeros(1, self.values.dtype), self.values]),
            "shape": np.array(self.shape, np.int64),
            "count": np.array([count], np.int64),
            "shifts": np.arange(8, dtype=np.uint8).reshape(1, 8),
            "one": np.array([1], np.uint8),
            "start": np.array([0], np.int64),
            "axis": np.array(0, np.int64),
            "flat": np.array([-1], np.int64),
        }
        steps = [
            helper.make_node("BitShift", [name("bytes"), name("shifts")], [name("shifted")], direction="RIGHT"),
            helper.make_node("BitwiseAnd", [name("shifted"), name("one")], [name("bits")]),
            helper.make_node("Cast", [name("bits")], [name("ones")], to=TensorProto.INT32),
            helper.make_node("Reshape", [name("ones"), name("flat")], [name("whole")]),
            helper.make_node("Slice", [name("whole"), name("start"), name("count")], [name("stays")]),
            helper.make_node("CumSum", [name("stays"), name("axis")], [name("numbers")]),
            helper.make_node("Mul", [name("numbers"), name("stays")], [name("places")]),
            helper.make_node("Gather", [name("values"), name("places")], [name("taken")]),
            helper.make_node("Reshape", [name("taken"), name("shape")], [output]),
        ]
        return steps, [numpy_helper.from_array(np.ascontiguousarray(array), name(part)) for part, array in held.items()]


ENCODINGS: tuple[type[Encoding], ...] = (BitMask,)


@dataclass(frozen=True)
class Packed:
    """A weight that was packed: how, and its bytes before and after, the nodes that decode it included."""

    name: str
    encoding: str
    before: int
    after: int


def pack(file: OnnxFile) -> list[Packed]:
    """Put each weight of a file into its smallest form, where that is worth it."""
    found: list[Packed] = []
    graph = file.proto.graph
    taken = {value.name for value in graph.output}
    for name, values in list(weights_of(file)):
        if name in taken or values.nbytes < SMALLEST:
            continue
        choices = [form for kind in ENCODINGS if (form := kind.encode(values)) is not None]
        best = min(choices, key=lambda form: form.bytes, default=None)
        if best is None or best.bytes > WORTH * values.nbytes:
            continue
        nodes, tensors = best.to_onnx(name)
        after = sum(node.ByteSize() for node in nodes) + sum(tensor.ByteSize() for tensor in tensors)
        if after > WORTH * values.nbytes:
            continue
        drop(file, name)
        graph.initializer.extend(tensors)
        rest = list(graph.node)
        del graph.node[:]
        graph.node.extend([*nodes, *rest])
        found.append(Packed(name, best.name, int(values.nbytes), after))
    return found


def weights_of(file: OnnxFile) -> Iterator[tuple[str, NDArray[Any]]]:
    """The floating weights of a file by name, one at a time."""
    for name, tensor in file.weights.items():
        if int(tensor.dtype) in DTYPES:
            yield name, tensor.numpy()
    for proto in file.proto.graph.initializer:
        if proto.data_type in DTYPES:
            yield proto.name, numpy_helper.to_array(proto)


def drop(file: OnnxFile, name: str) -> None:
    """Take a weight out of a file."""
    if file.weights.pop(name, None) is None:
        initializers = file.proto.graph.initializer
        kept = [proto for proto in initializers if proto.name != name]
        del initializers[:]
        initializers.extend(kept)
