"""Writes an ONNX file tensor by tensor, so that no second copy of all the weights is ever in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx

LIMIT = 2_000_000_000
"""Bytes above which weights go to a file beside the graph: a protobuf holds at most 2 GiB."""


@dataclass
class OnnxFile:
    """A model and the weights that are not yet in it.

    Attributes:
        proto: the model; initializers named in `weights` are missing from it.
        weights: tensors of `onnx_ir`, by initializer name.
    """

    proto: onnx.ModelProto
    weights: dict[str, Any]

    def with_weights_as_inputs(self) -> onnx.ModelProto:
        """The model whose `weights` are inputs of the graph."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        for name, tensor in sorted(self.weights.items()):
            shape = tensor.shape.numpy()
            proto.graph.input.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), shape))
        return proto


def read_weights(model: Any) -> dict[str, Any]:
    """The initializers of an `onnx_ir` model; their data stays where torch has it."""
    return {name: value.const_value for name, value in model.graph.initializers.items()}


def write_onnx(file: OnnxFile, path: Path, limit: int = LIMIT) -> None:
    """Write the model and all its weights, into one file or, above `limit` bytes, with a data file beside it.

    Appending `graph { initializer {...} }` to a serialised model adds the initializer to its graph: protobuf defines
    the concatenation of two messages as their merge.
    """
    total = sum(tensor.nbytes for tensor in file.weights.values()) + file.proto.ByteSize()
    if total > limit:
        _write_external(file, path)
        return
    with open(path, "wb") as stream:
        stream.write(file.proto.SerializeToString(deterministic=True))
        for name, tensor in sorted(file.weights.items()):
            _append_initializer(stream, _header(name, tensor), tensor.nbytes)
            _copy(tensor, stream)
        _flush(stream)


def _write_external(file: OnnxFile, path: Path) -> None:
    """Weights in `NAME.<hash>.data`; big initializers that the simplifier made go there too."""
    proto = file.proto
    made = {tensor.name: tensor for tensor in proto.graph.initializer if len(tensor.raw_data) > 1024}
    draft = path.with_suffix(".data-draft")
    places: list[tuple[onnx.TensorProto, int, int]] = []
    with open(draft, "wb") as stream:
        hashed = _Hashed(stream)
        for header, copy in _all_weights(file, made):
            hashed.write(b"\0" * (-stream.tell() % 4096))  # aligned, so that runtimes can map it
            offset = stream.tell()
            copy(hashed)
            places.append((header, offset, stream.tell() - offset))
        _flush(stream)
    location = f"{path.name}.{hashed.digest.hexdigest()[:16]}.data"
    os.replace(draft, path.parent / location)
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in made]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    with open(path, "wb") as stream:
        stream.write(proto.SerializeToString(deterministic=True))
        for header, offset, length in places:
            header.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
                entry = header.external_data.add()
                entry.key, entry.value = key, value
            _append_initializer(stream, header)
        _flush(stream)


class _Hashed:
    """A stream that takes the hash of what is written to it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write a buffer of any shape."""
        self.digest.update(np.frombuffer(data, np.uint8).data)
        return self.stream.write(data)

    def tell(self) -> int:
        return self.stream.tell()


def _all_weights(
    file: OnnxFile, made: dict[str, onnx.TensorProto]
) -> Iterator[tuple[onnx.TensorProto, Callable[[_Hashed], object]]]:
    """Each weight without its values, and what writes those."""
    for name, tensor in sorted(file.weights.items()):
        yield _header(name, tensor), partial(_copy, tensor)
    for name, proto in sorted(made.items()):
        data = proto.raw_data
        header = onnx.TensorProto(name=name, dims=proto.dims, data_type=proto.data_type)
        yield header, lambda stream, data=data: stream.write(data)  # type: ignore[misc]


def _header(name: str, tensor: Any) -> onnx.TensorProto:
    return onnx.TensorProto(name=name, dims=list(tensor.shape.numpy()), data_type=int(tensor.dtype))


def _copy(tensor: Any, stream: BinaryIO | _Hashed) -> None:
    """Write a tensor's values from where they lie."""
    before = stream.tell()
    tensor.tofile(stream)
    if stream.tell() - before != tensor.nbytes:
        raise ValueError(f"initializer {tensor.name} has no data")


_GRAPH = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number
_INITIALIZER = onnx.GraphProto.DESCRIPTOR.fields_by_name["initializer"].number
_RAW_DATA = onnx.TensorProto.DESCRIPTOR.fields_by_name["raw_data"].number


def _append_initializer(stream: BinaryIO, tensor: onnx.TensorProto, size: int | None = None) -> None:
    """Write an initializer; with a size, `raw_data` of so many bytes has to be written next."""
    data = tensor.SerializeToString(deterministic=True)
    if size is not None:
        data += _tag(_RAW_DATA) + _varint(size)
    length = len(data) + (size or 0)
    inner = _tag(_INITIALIZER) + _varint(length)
    stream.write(_tag(_GRAPH) + _varint(len(inner) + length) + inner)
    stream.write(data)


def _tag(field: int) -> bytes:
    return _varint(field << 3 | 2)  # wire type 2: length-delimited


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _flush(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
