"""The one currency of the compiler: a network as a canonical graph, with its example inputs and origins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata, _extract_tensor_metadata

Layer = TypeVar("Layer", bound=nn.Module)

ORIGIN = "fxcompile.origin"
"""Key of `node.meta`: names of the layers of the original model which the node computes, a tuple of strings."""

FEATURE = "fxcompile.feature"
"""Key of `node.meta`: the node of the original program whose value this node computes or approximates."""

PART = "fxcompile.part"
"""Key of `node.meta`: which entries of that value are left, a dictionary of indices by axis; none where all are."""


@dataclass(frozen=True)
class InputSpec:
    """One input of a program.

    Attributes:
        name: as the model's forward has it.
        shape: of the example, with the batch axis.
        batch_axis: the axis over which any number of samples may lie; None where the batch is fixed.
        dynamic_axes: further axes whose size may differ from the example's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    batch_axis: int | None = 0
    dynamic_axes: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Program:
    """A network in canonical form.

    Every layer with weights is a `call_module` of a plain `torch.nn` layer, activations and pools likewise; all other
    operations are `call_function`; there is no `call_method` and nothing works in place. Each node's
    `meta["tensor_meta"]` has the shape and dtype for the example inputs.

    Attributes:
        module: the graph. Its placeholders are flat: one tensor each, named like the model's own parameters.
        examples: one tensor for each placeholder.
        inputs: name, shape and dtype of each placeholder; `batch_axis` is None where the batch is fixed.
        output_names: one name for each tensor of the (possibly nested) output.
        notes: what tracing had to give up, a sentence each.
        seconds: what it took to make the program, by stage.
    """

    module: fx.GraphModule = field(repr=False)
    examples: tuple[Tensor, ...] = field(repr=False)
    inputs: tuple[InputSpec, ...]
    output_names: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def batch_is_free(self) -> bool:
        """Whether the network takes any number of samples at once."""
        return any(spec.batch_axis is not None for spec in self.inputs)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype the network computes in: that of its parameters, else of its inputs."""
        for tensor in (*self.module.parameters(), *self.examples):
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.float32

    def layers(self, *kinds: type[Layer]) -> Iterator[tuple[fx.Node, Layer]]:
        """Each layer of the given kinds with the first node that calls it, in the order of the data.

        A layer called several times comes once; `calls(layer)` has all its nodes.
        """
        seen: set[int] = set()
        for node in self.graph.nodes:
            layer = self.layer(node)
            if type(layer) in kinds and id(layer) not in seen:
                seen.add(id(layer))
                yield node, cast(Layer, layer)

    def layer(self, node: object) -> nn.Module | None:
        """The layer that a node calls, or None where it calls none."""
        if isinstance(node, fx.Node) and node.op == "call_module":
            return self.module.get_submodule(str(node.target))
        return None

    def calls(self) -> dict[int, list[fx.Node]]:
        """For each layer, by `id`, the nodes that call it: more than one where the model calls it again."""
        nodes: dict[int, list[fx.Node]] = {}
        for node in self.graph.nodes:
            layer = self.layer(node)
            if layer is not None:
                nodes.setdefault(id(layer), []).append(node)
        return nodes

    def tied(self) -> dict[int, set[str]]:
        """For each parameter or buffer, by `id`, the names of the layers that hold it: more than one where tied."""
        names: dict[int, set[str]] = {}
        for node in self.graph.nodes:
            layer = self.layer(node)
            if layer is not None:
                for tensor in (*layer.parameters(), *layer.buffers()):
                    names.setdefault(id(tensor), set()).add(str(node.target))
            elif node.op == "get_attr":
                tensor = fetch(self.module, str(node.target))
                names.setdefault(id(tensor), set()).add(str(node.target))
        return names

    def tied_to(self, node: fx.Node, tied: Mapping[int, set[str]]) -> list[str]:
        """The other layers that hold a parameter of a node's layer, by name, from what `tied` gives."""
        layer = self.layer(node)
        names = {name for item in (layer.parameters() if layer is not None else ()) for name in tied.get(id(item), ())}
        return sorted(names - {str(node.target)})

    def snapshot(self) -> Program:
        """A copy that later rewrites of this program do not touch. The graph is copied, tensors are shared."""
        return replace(self, module=copy_graph_module(self.module))

    def __call__(self, *inputs: Tensor) -> Any:
        """Run on flat inputs, without gradients."""
        with torch.no_grad():
            return run_flat(self.module, inputs)

    def outputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run on flat inputs and flatten what comes out, in the order of `output_names`."""
        return flatten_tensors(self(*inputs))


def run_flat(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    """Call a graph module on one tensor for each placeholder, whatever its calling convention is."""
    graph = module.graph
    if graph._codegen.__class__ is fx.graph.CodeGen:
        return module(*inputs)
    return fx.Interpreter(module).run(*inputs, enable_io_processing=False)


def copy_graph_module(module: fx.GraphModule) -> fx.GraphModule:
    """A graph module with its own graph and module tree, over the same layers and tensors."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, mapping)
    old_output = output_node(module.graph)
    graph.output(output).meta.update(old_output.meta)
    graph._codegen = module.graph._codegen
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    copied = fx.GraphModule(module, graph, class_name=type(module).__name__)
    copied.train(module.training)
    return copied


def output_node(graph: fx.Graph) -> fx.Node:
    """The graph's single output node."""
    found: fx.Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return found


def fetch(module: nn.Module, target: str) -> Any:
    """The attribute at a dotted path."""
    value: Any = module
    for atom in target.split("."):
        value = getattr(value, atom)
    return value


def flatten_tensors(value: Any) -> tuple[Tensor, ...]:
    """All tensors of a nested output, in order; mappings in the order of their keys' insertion."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(tensor for item in value for tensor in flatten_tensors(item))
    return ()


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of the tensor that a node computes for the example inputs, or None where it is no single tensor."""
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if isinstance(meta, TensorMetadata) else None


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of the tensor that a node computes, or None where it is no single tensor."""
    meta = node.meta.get("tensor_meta")
    return meta.dtype if isinstance(meta, TensorMetadata) else None


def part_of(value: Tensor, node: fx.Node) -> Tensor:
    """What is left of the value of the original program's node that a node stands for."""
    for axis, entries in node.meta.get(PART, {}).items():
        value = value.index_select(axis, entries)
    return value


def record_shape(node: fx.Node, value: Any) -> None:
    """Write the shapes and dtypes of a computed value on its node."""
    if isinstance(value, Tensor):
        node.meta["tensor_meta"] = _extract_tensor_metadata(value)
    elif isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value):
        node.meta["tensor_meta"] = tuple(
            _extract_tensor_metadata(item) if isinstance(item, Tensor) else None for item in value
        )
    else:
        node.meta.pop("tensor_meta", None)


class ShapeRecorder(fx.Interpreter):
    """Runs a graph once and records each node's shape."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        record_shape(n, value)
        return value


def propagate_shapes(module: fx.GraphModule, examples: Sequence[Tensor]) -> Any:
    """Run the graph on the examples, recording the shape on every node; returns the output."""
    with torch.no_grad():
        return ShapeRecorder(module).run(*examples, enable_io_processing=False)
