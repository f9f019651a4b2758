"""Reads a raw graph, node by node, and writes the canonical one: the walk, what rules are, and what they call.

What is read of a node is in `raw_nodes`, the rules are in `layer_rules` and `function_rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompile import layers
from fxcompile.functional import VALUE, is_plain
from fxcompile.program import ORIGIN, fetch, shape_of
from fxcompile.raw_nodes import (
    PLACE,
    Call,
    ancestors,
    innermost_class,
    is_traced_constant,
    method_function,
    only_weight,
    operation_name,
    own_path,
    path_of_weight,
    scope_of,
)
from fxcompile.trees import drop_dead_code, is_free, outside_of_layers, place


class NoSpelling(Exception):
    """A raw node that canonical form has no spelling for."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


Rule = Callable[["Canonicaliser", Call], Any]
"""Takes a raw call and returns what stands for it in the new graph, or NotImplemented where it does not apply."""

RULES: dict[str, list[Rule]] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations of these names, after those registered before."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES.setdefault(name, []).append(function)
        return function

    return register


class Canonicaliser:
    """One walk over a raw graph, writing the canonical one.

    Attributes:
        graph: the new graph.
        layers: the new module tree.
        new: for each raw node what stands for it: a new node, a number, or a tuple of such.
        constants: tensors and numbers of raw nodes that depend on no input.
        tensors: for each new `get_attr` node its tensor, and the name that the model has for it, if it has one.
    """

    def __init__(self, raw: fx.GraphModule, root: nn.Module) -> None:
        self.raw = raw
        self.root = root
        self.graph = fx.Graph()
        self.layers = nn.Module()
        self.new: dict[fx.Node, Any] = {}
        self.constants: dict[fx.Node, Any] = {}
        self.tensors: dict[fx.Node, tuple[str | None, Tensor]] = {}
        self._computed: dict[int, tuple[Tensor, nn.Parameter]] = {}
        self._attributes: dict[int, fx.Node] = {}
        self._layer_names: dict[object, str] = {}
        self._counts: dict[str, int] = {}
        self._taken = {str(node.target) for node in raw.graph.nodes if node.op == "get_attr" and not only_weight(node)}
        self._owners = {path for path in map(own_path, raw.graph.nodes) if path is not None}
        self._sizes: dict[tuple[fx.Node, int], fx.Node] = {}
        self.transposes: dict[int, tuple[Tensor, nn.Parameter]] = {}

    def run(self) -> tuple[fx.Graph, nn.Module]:
        """The canonical graph, as far as no sizes are concerned, and the layers and tensors that it uses."""
        for node in self.raw.graph.nodes:
            self.new[node] = self.lower(node)
        drop_dead_code(self.graph)
        for node in self.graph.nodes:
            if node.op == "get_attr":
                name, tensor = self.tensors[node]
                node.target = name if name in self._taken else self.free_name(name or "constant")
                place(self.layers, node.target, tensor)
        return self.graph, self.layers

    # one raw node

    def lower(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.annotate(self.graph.placeholder(str(node.target)), node)
        if node.op == "output":
            return self.annotate(self.graph.output(self.value(node.args[0])), node)
        if node.op == "get_attr":
            held = fetch(self.root, str(node.target))
            return self._attribute(node, held) if isinstance(held, Tensor) else held
        if node.op == "call_module":
            return self._lower_module(node)
        name = operation_name(node)
        if name is None:
            return self.call(node.target, node.args, node.kwargs, node)  # type: ignore[arg-type]
        self._fold_constant(node)
        call = Call.read(node, name)
        for each in RULES.get(name, ()):
            new = each(self, call)
            if new is not NotImplemented:
                return new
        return self._general(call)

    def _general(self, call: Call) -> Any:
        if call.name.endswith("_backward"):
            raise NoSpelling(call.node, "forward computes gradients")
        for each in RULES["*"]:
            new = each(self, call)
            if new is not NotImplemented:
                return new
        target: Any = call.node.target
        if call.node.op == "call_method":
            target = method_function(str(target))
        if call.node.op == "call_method" and target is None:
            raise NoSpelling(call.node, f"'{call.node.target}' is no method of a tensor")
        return self.call(target, call.node.args, call.node.kwargs, call.node)

    def _attribute(self, node: fx.Node, tensor: Tensor) -> fx.Node:
        self.constants[node] = tensor
        if id(tensor) not in self._attributes:
            name = None if is_traced_constant(str(node.target)) else str(node.target)
            new = self._attributes[id(tensor)] = self.annotate(self.graph.get_attr(name or "constant"), node)
            self.tensors[new] = name, tensor if isinstance(tensor, nn.Parameter) else tensor.detach()
        return self._attributes[id(tensor)]

    def _lower_module(self, node: fx.Node) -> Any:
        module = self.raw.get_submodule(str(node.target))
        node.args, node.kwargs = (*node.args, *node.kwargs.values()), {}
        if type(module) in MODULE_RULES:
            return MODULE_RULES[type(module)](self, node, module)
        return self.call_module_layer(node, module, node.args)

    def call_module_layer(self, node: fx.Node, module: nn.Module, inputs: Sequence[Any]) -> fx.Node:
        """A call of the model's own layer, as canonical form has it."""
        shape = (shape_of(inputs[0]) or ()) if inputs and isinstance(inputs[0], fx.Node) else ()
        return self.call_layer(str(node.target), layers.plain_layer(module, str(node.target), shape), inputs, node)

    # what rules call

    def value(self, raw: Any) -> Any:
        """A raw argument in terms of the new graph."""
        return fx.node.map_aggregate(raw, lambda item: self.new[item] if isinstance(item, fx.Node) else item)

    def plain(self, raw: Any) -> Any:
        """A raw argument as plain numbers, those that the node gave for the example inputs; NotImplemented if none."""
        if isinstance(raw, fx.Node):
            return self.plain(raw.meta[VALUE]) if VALUE in raw.meta else NotImplemented
        if isinstance(raw, (tuple, list)):
            items = [self.plain(item) for item in raw]
            return NotImplemented if any(item is NotImplemented for item in items) else tuple(items)
        return raw

    def call(self, target: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], node: fx.Node) -> fx.Node:
        """A new function node for a raw node; raw arguments are mapped."""
        return self.make(target, self.value(tuple(args)), node, self.value(dict(kwargs)))

    def make(
        self, target: Callable[..., Any], args: tuple[Any, ...], node: fx.Node, kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """A new function node for a raw node; the arguments are of the new graph already."""
        return self.annotate(self.graph.call_function(target, args, kwargs), node)

    def make_part(self, target: Callable[..., Any], args: tuple[Any, ...], node: fx.Node) -> fx.Node:
        """The same for a step on the way to what the raw node gives."""
        new = self.make(target, args, node)
        new.meta.pop("tensor_meta", None)
        return new

    def size(self, raw: fx.Node, axis: int) -> fx.Node:
        """The node for the size of a raw node's tensor along one axis: one node, however often it is asked for."""
        source = self.new[raw]
        key = (source, axis)
        if key not in self._sizes:
            self._sizes[key] = self.graph.call_function(torch.Tensor.size, (source, axis))
            self._sizes[key].meta[ORIGIN] = source.meta.get(ORIGIN, ())
        return self._sizes[key]

    def call_layer(
        self, name: str | None, layer: nn.Module, raw_inputs: Sequence[Any], node: fx.Node, kind: str = ""
    ) -> fx.Node:
        """A new layer node.

        Args:
            name: that of the model's own layer; the same name, weights and options make it the same layer. None for
                a layer which the model wrote as a function: it is named after the module it is in and its `kind`.
            layer: the layer.
            raw_inputs: its inputs, in terms of the raw graph.
            node: the raw node.
            kind: the operation's name.
        """
        return self.place_layer(name, layer, self.value(tuple(raw_inputs)), node, kind)

    def place_layer(
        self, name: str | None, layer: nn.Module, inputs: tuple[Any, ...], node: fx.Node, kind: str
    ) -> fx.Node:
        """The same, its inputs of the new graph already."""
        key = (name, layers.identity(layer)) if name is not None else (node, kind)
        if key not in self._layer_names:
            unique = self.free_name(name or self.scoped_name(node, kind or type(layer).__name__.lower()))
            self._layer_names[key] = unique
            place(self.layers, unique, layer.eval())
        return self.annotate(self.graph.call_module(self._layer_names[key], inputs), node)

    def free_name(self, wanted: str) -> str:
        """The wanted path, or the first free one of `wanted_1`, `wanted_2`, ...; never inside of a layer."""
        wanted = outside_of_layers(self.layers, wanted, self._owners)
        name, count = wanted, self._counts.get(wanted, 0)
        while name in self._taken or not is_free(self.layers, name):
            count += 1
            name = f"{wanted}_{count}"
        self._counts[wanted] = count
        return name

    def annotate(self, new: fx.Node, raw: fx.Node) -> fx.Node:
        """Copy to a new node what is known about the raw one, and note which layer of the model it comes from."""
        for key in ("tensor_meta", PLACE):
            if key in raw.meta:
                new.meta[key] = raw.meta[key]
        if raw.stack_trace:
            new.stack_trace = raw.stack_trace
        scope = scope_of(raw)
        name = str(new.target) if new.op == "call_module" else new.name
        origin = f"{scope}.{name}" if scope and new.op != "call_module" else name
        new.meta[ORIGIN] = (origin,)
        return new

    def constant(self, raw: Any) -> Tensor | None:
        """The tensor at a raw argument, if it depends on no input."""
        held = self.constants.get(raw) if isinstance(raw, fx.Node) else None
        return held if isinstance(held, Tensor) else None

    def weight(self, raw: Any) -> nn.Parameter | Tensor | None:
        """The same, as a layer holds it: one that was computed from parameters becomes a parameter."""
        tensor = self.constant(raw)
        if tensor is None or isinstance(tensor, nn.Parameter) or (isinstance(raw, fx.Node) and raw.op == "get_attr"):
            return tensor
        if id(tensor) not in self._computed:
            trains = any(
                isinstance(fetch(self.root, str(node.target)), nn.Parameter)
                for node in ancestors(raw)
                if node.op == "get_attr"
            )
            self._computed[id(tensor)] = (tensor, nn.Parameter(tensor.detach().clone(), requires_grad=trains))
        return self._computed[id(tensor)][1]

    def _fold_constant(self, node: fx.Node) -> None:
        """Compute a tensor that depends on the model's weights alone, so that a layer can hold it."""
        function: Any = method_function(str(node.target)) if node.op == "call_method" else node.target
        if not callable(function) or not node.all_input_nodes:
            return
        if any(item not in self.constants for item in node.all_input_nodes):
            return
        args, kwargs = fx.node.map_aggregate(
            (node.args, dict(node.kwargs)), lambda item: self.constants[item] if isinstance(item, fx.Node) else item
        )
        with torch.no_grad():
            value = function(*args, **kwargs)
        if isinstance(value, Tensor) or is_plain(value):
            self.constants[node] = value

    def scoped_name(self, node: fx.Node, operation: str) -> str:
        """The name of an operation by the module in whose forward the model wrote it."""
        scope = scope_of(node)
        return f"{scope}.{operation}" if scope else operation

    def layer_name(self, node: fx.Node, weight: Any, kind: str) -> str | None:
        """The name of a layer that the raw graph has as a function, or None where it has none of its own.

        It is the path of the model's own layer, or else of the module that owns the weight.
        """
        scope, module = scope_of(node), innermost_class(node)
        if module.startswith("torch.nn.") and module.endswith(kind):
            return scope
        while isinstance(weight, fx.Node) and weight.op != "get_attr" and weight.all_input_nodes:
            weight = weight.all_input_nodes[0]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or is_traced_constant(str(weight.target)):
            return None
        return path_of_weight(str(weight.target))


ModuleRule = Callable[[Canonicaliser, fx.Node, Any], Any]

MODULE_RULES: dict[type[nn.Module], ModuleRule] = {}
"""How the model's own layers are written, where it is not as they are: by class."""
