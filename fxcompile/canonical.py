"""Brings a raw functional graph to the one spelling that passes match.

The raw graph may come from `torch.fx.symbolic_trace` (functions, methods, the model's own layers) or from
`torch.export` (`aten` operators and bare weights). Each raw node is read as *operation name + named arguments* and
written again: layers with weights, activations, pools and dropouts as `call_module`; everything else as
`call_function` with one target for each operation and positional arguments in one order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompile import spellings
from fxcompile.functional import VALUE
from fxcompile.layers import build_layer, plain_layer
from fxcompile.program import ORIGIN, fetch, shape_of

Arguments = dict[str, Any]
Rule = Callable[["Canonicaliser", fx.Node, tuple[Any, ...], dict[str, Any]], Any]

NAMESPACES = ("torch", "_operator", "operator", "builtins", "math")


def canonicalise(raw: fx.GraphModule, root: nn.Module) -> fx.GraphModule:
    """A new graph module in canonical form.

    Args:
        raw: a functional graph whose nodes carry shapes and plain values (`make_functional`).
        root: the module that the raw graph's `get_attr` and `call_module` targets are paths in.
    """
    return Canonicaliser(raw, root).run()


class Canonicaliser:
    """One walk over a raw graph, writing the canonical one."""

    def __init__(self, raw: fx.GraphModule, root: nn.Module) -> None:
        self.raw = raw
        self.root = root
        self.graph = fx.Graph()
        self.layers = nn.Module()
        self.names: dict[object, str] = {}
        self.taken: set[str] = {str(node.target) for node in raw.graph.nodes if node.op == "get_attr"}
        self.new: dict[fx.Node, Any] = {}
        self.constants: dict[fx.Node, Tensor] = {}
        self.keep_alive: list[object] = []

    def run(self) -> fx.GraphModule:
        for node in self.raw.graph.nodes:
            self.new[node] = self.lower(node)
        # eliminate_dead_code keeps whatever may be impure; nothing here is, but for the placeholders.
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        tensors = {node.target: fetch(self.root, node.target) for node in self.graph.nodes if node.op == "get_attr"}
        for name, tensor in tensors.items():
            place(self.layers, str(name), as_attribute(tensor))
        self.graph.lint()
        module = fx.GraphModule(self.layers, self.graph, class_name=type(self.root).__name__)
        module.eval()
        return module

    # one raw node

    def lower(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            new = self.graph.placeholder(str(node.target), type_expr=None)
            return self.annotate(new, node)
        if node.op == "output":
            return self.annotate(self.graph.output(self.value(node.args[0])), node)
        if node.op == "get_attr":
            tensor = fetch(self.root, str(node.target))
            if not isinstance(tensor, Tensor):
                return tensor
            self.constants[node] = tensor
            return self.annotate(self.graph.get_attr(str(node.target)), node)
        if node.op == "call_module":
            return self.lower_module(node)
        name = operation_name(node)
        if name is None:
            return self.generic(node)
        self.fold_constant(node)
        arguments = list(node.args)
        keywords = dict(node.kwargs)
        if not arguments:
            for first in ("input", "self", "tensor", "tensors"):
                if first in keywords:
                    arguments.append(keywords.pop(first))
                    break
        for rule in RULES.get(name, ()):
            new = rule(self, node, tuple(arguments), keywords)
            if new is not NotImplemented:
                return new
        return self.generic(node)

    def generic(self, node: fx.Node) -> fx.Node:
        """The node as it stands; a method becomes the function of that name."""
        target: Any = node.target
        if node.op == "call_method":
            target = method_function(str(node.target))
        return self.call(target, node.args, node.kwargs, node)

    def lower_module(self, node: fx.Node) -> Any:
        module = self.raw.get_submodule(str(node.target))
        as_function = MODULE_FUNCTIONS.get(type(module))
        arguments = (*node.args, *node.kwargs.values())
        if as_function is not None and len(arguments) == 1:
            return as_function(self, node, module, arguments[0])
        if id(module) not in self.names:
            self.keep_alive.append(module)
            self.add_layer(id(module), str(node.target), plain_layer(module, str(node.target)))
        new = self.graph.call_module(self.names[id(module)], self.value(node.args), self.value(node.kwargs))
        return self.annotate(new, node)

    # what rules call

    def value(self, raw: Any) -> Any:
        """A raw argument in terms of the new graph."""
        return fx.node.map_aggregate(raw, lambda item: self.new[item] if isinstance(item, fx.Node) else item)

    def plain(self, raw: Any) -> Any:
        """A raw argument as plain numbers: what the node gave for the example inputs."""
        if isinstance(raw, fx.Node):
            return self.plain(raw.meta[VALUE]) if VALUE in raw.meta else NotImplemented
        if isinstance(raw, (tuple, list)):
            items = [self.plain(item) for item in raw]
            return NotImplemented if any(item is NotImplemented for item in items) else tuple(items)
        return raw

    def call(self, target: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], node: fx.Node) -> fx.Node:
        """A new function node for a raw node; raw arguments are mapped."""
        new = self.graph.call_function(target, self.value(tuple(args)), self.value(dict(kwargs)))
        return self.annotate(new, node)

    def call_layer(self, key: object, name: str, layer: nn.Module, raw_inputs: Sequence[Any], node: fx.Node) -> fx.Node:
        """A new layer node; the same key gives the same layer."""
        if key not in self.names:
            self.add_layer(key, name, layer)
        new = self.graph.call_module(self.names[key], self.value(tuple(raw_inputs)))
        return self.annotate(new, node)

    def add_layer(self, key: object, name: str, layer: nn.Module) -> None:
        unique, count = name, 0
        while not is_free(self.layers, unique) or unique in self.taken:
            count += 1
            unique = f"{name}_{count}"
        place(self.layers, unique, layer)
        self.names[key] = unique

    def annotate(self, new: fx.Node, raw: fx.Node) -> fx.Node:
        if "tensor_meta" in raw.meta:
            new.meta["tensor_meta"] = raw.meta["tensor_meta"]
        if raw.stack_trace:
            new.stack_trace = raw.stack_trace
        scope = scope_of(raw)
        if new.op == "call_module":
            origin = str(new.target)
        else:
            origin = f"{scope}.{new.name}" if scope else new.name
        new.meta[ORIGIN] = (origin,)
        return new

    def fold_constant(self, node: fx.Node) -> None:
        """Compute a tensor that depends on the model's weights alone, so that a layer can hold it."""
        if node.op == "call_method":
            function: Callable[..., Any] = method_function(str(node.target))
        elif node.op == "call_function" and callable(node.target):
            function = node.target
        else:
            return
        if not node.all_input_nodes or any(item not in self.constants for item in node.all_input_nodes):
            return
        fetched = fx.node.map_aggregate(
            (node.args, dict(node.kwargs)), lambda item: self.constants[item] if isinstance(item, fx.Node) else item
        )
        with torch.no_grad():
            value = function(*fetched[0], **fetched[1])
        if isinstance(value, Tensor):
            self.constants[node] = value

    def constant(self, raw: Any) -> Tensor | None:
        """The tensor at a raw argument, if it depends on no input."""
        return self.constants.get(raw) if isinstance(raw, fx.Node) else None

    def layer_name(self, node: fx.Node, weight: Any, operation: str) -> str:
        """The name of a layer the model wrote as a function: that of the module which owns the weight, or the scope."""
        while isinstance(weight, fx.Node) and weight.op != "get_attr" and weight.all_input_nodes:
            weight = weight.all_input_nodes[0]
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            owner, _, name = str(weight.target).rpartition(".")
            return owner if name == "weight" and owner else str(weight.target).replace(".parametrizations", "")
        scope = scope_of(node)
        if not scope:
            return operation
        return scope if innermost_is_layer(node) else f"{scope}.{operation}"


# reading raw nodes


def operation_name(node: fx.Node) -> str | None:
    """The bare name of the operation, without the underscore of in-place forms; None for foreign functions."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        if namespace != "aten":
            return None
        return name if name.startswith("_") else name.rstrip("_")
    if isinstance(target, str):
        return target if target.startswith("_") else target.rstrip("_")
    module = getattr(target, "__module__", None) or "torch"
    if module.partition(".")[0] not in NAMESPACES:
        return None
    name = getattr(target, "__name__", "")
    return name if name.startswith("_") else name.rstrip("_")


def method_function(name: str) -> Callable[..., Any]:
    """The function that a tensor method is, out of place."""
    bare = name if name.startswith("_") else name.rstrip("_")
    function: Callable[..., Any] = getattr(torch.Tensor, bare, None) or getattr(torch.Tensor, name)
    return function


def scope_of(node: fx.Node) -> str:
    """The path of the innermost module of the model in whose forward the node was traced."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = path.removeprefix("L['self']").removeprefix(".")
    return ".".join(atom.partition("@")[0] for atom in path.split("."))


def innermost_is_layer(node: fx.Node) -> bool:
    """Whether that innermost module is one of `torch.nn`'s own layers."""
    kind = list(node.meta["nn_module_stack"].values())[-1][1]
    name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return name.startswith("torch.nn.modules.") and ".container." not in name


def bind(names: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Arguments:
    """Named arguments from positional and keyword ones; the first positional one, the input, is not counted."""
    known = names.split()
    bound: Arguments = dict(zip(known, args[1:], strict=False))
    bound.update({name: value for name, value in kwargs.items() if value is not None})
    if len(args) - 1 > len(known):
        bound["?"] = args[len(known) + 1 :]
    return bound


# writing layers into a module tree


def place(root: nn.Module, path: str, value: nn.Module | Tensor) -> None:
    """Set a layer, parameter or buffer at a dotted path, making empty modules on the way."""
    *parents, name = path.split(".")
    owner = root
    for atom in parents:
        if atom not in owner._modules:
            owner.add_module(atom, nn.Module())
        owner = owner.get_submodule(atom)
    if isinstance(value, nn.Module):
        held = owner._modules.get(name)
        if held is not None:
            for key, child in held._modules.items():
                value.add_module(key, child)
        owner.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    else:
        owner.register_buffer(name, value)


def is_free(root: nn.Module, path: str) -> bool:
    """Whether nothing lies at a dotted path, nor a layer on the way to it."""
    owner = root
    for atom in path.split("."):
        if type(owner) is not nn.Module:
            return False
        held = owner._modules.get(atom)
        if held is None:
            return atom not in owner._parameters and atom not in owner._buffers
        owner = held
    return False


def as_attribute(tensor: Tensor) -> Tensor:
    """A tensor that a module may hold: a parameter stays one, all else becomes a buffer without gradient."""
    return tensor if isinstance(tensor, nn.Parameter) else tensor.detach()


# rules: each takes the raw node and its arguments, and returns what stands for it in the new graph, or
# NotImplemented where it does not apply


def rule_stateless(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = operation_name(node) or ""
    kind, names = spellings.STATELESS[name]
    if not args or not isinstance(args[0], fx.Node):
        return NotImplemented
    if name in ("softmax", "log_softmax", "softmin") and len(args) > 2:
        if any(item not in (None, 3) for item in args[2:]):
            return NotImplemented
        args = args[:2]
    kwargs = {key: value for key, value in kwargs.items() if key != "_stacklevel"}
    bound = {key: self.plain(value) for key, value in bind(names, args, kwargs).items()}
    if any(value is NotImplemented for value in bound.values()) or bound.keys() - set(names.split()):
        return NotImplemented
    options = {key: value for key, value in bound.items() if key not in spellings.LAYER_ONLY_ARGUMENTS}
    if name in ("softmax", "log_softmax", "softmin"):
        options["dim"] = axis(options.get("dim"), node) if options.get("dim") is not None else None
        if options["dim"] is None:
            return NotImplemented
    if name == "dropout" and bound.get("training") is False and "p" not in bound:
        options["p"] = 0.5
    if "stride" in names.split() and options.get("stride") in ((), []):
        del options["stride"]
    if name.startswith(("avg_pool", "lp_pool")) and covers_map(args[0], options):
        kind, options = spellings.STATELESS[f"adaptive_avg_pool{name[-2:]}"][0], {"output_size": 1}
    layer = kind(**{key: unwrap(value) for key, value in options.items()})
    layer.eval()
    # Layers without state are not shared, as the model's own are not: each call has its own name and site.
    return self.call_layer(("stateless", node), self.layer_name(node, None, name), layer, args[:1], node)


def covers_map(source: fx.Node, options: Arguments) -> bool:
    """Whether an average pool's window is the whole map, which is global average pooling."""
    shape = shape_of(source)
    if shape is None or options.get("norm_type") is not None or options.get("divisor_override") is not None:
        return False
    dims = len(shape) - 2
    kernel = options.get("kernel_size")
    window = tuple(kernel) if isinstance(kernel, tuple) else (kernel,) * dims
    padding = options.get("padding", 0)
    return len(window) == dims and window == shape[2:] and not any(padding if isinstance(padding, tuple) else (padding,))


def unwrap(value: Any) -> Any:
    """A one-element tuple as its element: `aten` gives sizes as lists, layers take either."""
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def rule_weighted(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = operation_name(node) or ""
    functional = getattr(node.target, "__module__", None) == "torch.nn.functional"
    names = spellings.WEIGHTED.get(f"functional.{name}" if functional else name) or spellings.WEIGHTED[name]
    bound = bind(names, args, kwargs)
    tensors: dict[str, Tensor | None] = {}
    options: Arguments = {}
    for key, raw in bound.items():
        if key in ("weight", "bias", "running_mean", "running_var"):
            tensors[key] = self.constant(raw)
            if raw is not None and tensors[key] is None:
                return NotImplemented
        else:
            options[key] = self.plain(raw)
    if any(value is NotImplemented for value in options.values()) or not isinstance(args[0], fx.Node):
        return NotImplemented
    layer = build_layer(name, tensors, options, shape_of(args[0]) or ())
    if layer is None:
        return NotImplemented
    key = (name, *(id(tensor) for tensor in tensors.values()), repr(sorted(options.items(), key=str)))
    self.keep_alive.append(tensors)
    owner = bound.get("weight") if bound.get("weight") is not None else bound.get("running_mean")
    return self.call_layer(key, self.layer_name(node, owner, name), layer, args[:1], node)


def rule_addmm(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 3 or self.constant(args[0]) is None or self.constant(args[2]) is None:
        return NotImplemented
    return _linear(self, node, args[1], args[2], args[0])


def rule_matmul(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) == 2 and not kwargs and isinstance(args[0], fx.Node) and args[0] not in self.constants:
        weight = self.constant(args[1])
        if weight is not None and weight.dim() == 2 and (shape_of(args[0]) or ()):
            return _linear(self, node, args[0], args[1], None)
    return NotImplemented


def _linear(self: Canonicaliser, node: fx.Node, source: Any, weight: fx.Node, bias: fx.Node | None) -> Any:
    tensors = {"weight": self.constants[weight].t(), "bias": self.constant(bias)}
    layer = build_layer("linear", tensors, {}, shape_of(source) or ())
    if layer is None:
        return NotImplemented
    key = ("matmul", id(self.constants[weight]), id(tensors["bias"]))
    return self.call_layer(key, self.layer_name(node, weight, "linear"), layer, (source,), node)


def rule_embedding(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    table, index = (args[0], args[1]) if self.constant(args[0]) is not None else (args[1], args[0])
    weight = self.constant(table)
    if weight is None or any(self.plain(item) not in (None, -1, False) for item in (*args[2:], *kwargs.values())):
        return NotImplemented
    layer = nn.Embedding(*weight.shape, device="meta")
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach(), requires_grad=False)
    return self.call_layer(("embedding", id(weight)), self.layer_name(node, table, "embedding"), layer, (index,), node)


def rule_recurrent(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """aten.lstm / aten.gru(input, state, weights, has_biases, layers, dropout, train, bidirectional, batch_first)."""
    if len(args) != 9 or not isinstance(args[2], (list, tuple)):
        return NotImplemented
    weights = [self.constant(item) for item in args[2]]
    if any(weight is None for weight in weights):
        return NotImplemented
    has_biases, layers, dropout, _, bidirectional, batch_first = args[3:]
    kind = nn.LSTM if operation_name(node) == "lstm" else nn.GRU
    first, recurrent = weights[0], weights[1]
    assert first is not None
    assert recurrent is not None
    layer = kind(
        first.shape[1], recurrent.shape[1], layers, bias=has_biases, batch_first=batch_first, dropout=dropout,
        bidirectional=bidirectional, device="meta",
    )  # fmt: skip
    if len(layer._flat_weights_names) != len(weights):
        return NotImplemented
    for name, weight in zip(layer._flat_weights_names, weights, strict=True):
        assert weight is not None
        setattr(layer, name, weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False))
    layer.eval()
    name = str(args[2][0].target).rpartition(".")[0] if args[2][0].op == "get_attr" else "lstm"
    state = tuple(args[1]) if isinstance(args[1], (list, tuple)) else args[1]
    new = self.call_layer(("recurrent", id(first)), name or "lstm", layer, (args[0], state), node)
    new.meta["recurrent"] = operation_name(node)
    return new


def rule_getitem(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    source = self.value(args[0])
    index = args[1]
    if isinstance(source, fx.Node):
        if source.target is torch.Tensor.size and len(source.args) == 1 and isinstance(index, int):
            rank = len(shape_of(source.args[0]) or ())  # type: ignore[arg-type]
            return self.annotate(self.graph.call_function(torch.Tensor.size, (source.args[0], index % rank)), node)
        if source.meta.get("recurrent") == "lstm":  # aten gives (output, h, c), nn.LSTM (output, (h, c))
            if index == 0:
                return self.call(operator.getitem, args, {}, node)
            states = self.graph.call_function(operator.getitem, (source, 1))
            return self.annotate(self.graph.call_function(operator.getitem, (states, index - 1)), node)
        return self.call(operator.getitem, args, {}, node)
    if isinstance(index, int) and isinstance(source, (tuple, list)):  # of an operation that became a layer
        return source[index]
    return NotImplemented


def rule_native_norm(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Functionalised norms of `aten` return (output, mean, rstd); only the output is used in eval mode."""
    name = operation_name(node)
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return NotImplemented
    if name == "_native_batch_norm_legit_no_training":
        source, weight, bias, mean, var, momentum, eps = args
        tensors = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
        kind, options = "batch_norm", {"training": False, "momentum": momentum, "eps": eps}
    elif name == "native_layer_norm":
        source, shape, weight, bias, eps = args
        tensors, kind, options = {"weight": weight, "bias": bias}, "layer_norm", {"normalized_shape": shape, "eps": eps}
    else:
        source, weight, bias, _, _, _, groups, eps = args
        tensors, kind, options = {"weight": weight, "bias": bias}, "group_norm", {"num_groups": groups, "eps": eps}
    held = {key: self.constant(raw) for key, raw in tensors.items()}
    if any(held[key] is None and raw is not None for key, raw in tensors.items()):
        return NotImplemented
    layer = build_layer(kind, held, {key: self.plain(value) for key, value in options.items()}, shape_of(source) or ())
    if layer is None:
        return NotImplemented
    key = (kind, *(id(tensor) for tensor in held.values()))
    owner = tensors["weight"] if tensors["weight"] is not None else tensors.get("running_mean")
    new = self.call_layer(key, self.layer_name(node, owner, kind), layer, (source,), node)
    meta = node.meta.get("tensor_meta")
    new.meta["tensor_meta"] = meta[0] if isinstance(meta, tuple) and not hasattr(meta, "shape") else meta
    return (new, None, None)


def rule_arithmetic(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    function = spellings.ARITHMETIC[operation_name(node) or ""]
    kwargs = dict(kwargs)
    if "other" in kwargs:
        args = (*args, kwargs.pop("other"))
    scale = kwargs.pop("alpha", 1)
    if kwargs.get("rounding_mode", 0) is None:
        kwargs.pop("rounding_mode")
    if kwargs or len(args) > 2:
        return NotImplemented
    if scale != 1:
        scaled = self.graph.call_function(operator.mul, (self.value(args[1]), scale))
        scaled = self.annotate(scaled, node)
        return self.annotate(self.graph.call_function(function, (self.value(args[0]), scaled)), node)
    return self.call(function, args, {}, node)


def rule_rsub(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return self.call(operator.sub, (args[1], args[0]), {}, node) if len(args) == 2 and not kwargs else NotImplemented


def rule_same_function(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return self.call(spellings.SAME_FUNCTION[operation_name(node) or ""], args, kwargs, node)


def rule_alike(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return self.call(getattr(torch, operation_name(node) or ""), args, kwargs, node)


def rule_method(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return self.call(getattr(torch.Tensor, operation_name(node) or ""), args, kwargs, node)


def rule_identity(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return self.value(args[0])


def rule_drop(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return None


def rule_cat(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    if not isinstance(args[0], (tuple, list)) or "out" in kwargs:
        return NotImplemented
    return self.call(torch.cat, (list(args[0]), axis(dim, node)), {}, node)


def rule_size(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    rank = len(shape_of(args[0]) or ())
    return self.call(torch.Tensor.size, (args[0],) if dim is None else (args[0], dim % rank), {}, node)


def rule_getattr(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    source, name = args[0], args[1]
    rank = len(shape_of(source) or ()) if isinstance(source, fx.Node) else 0
    if name == "shape":
        return self.call(torch.Tensor.size, (source,), {}, node)
    if name in ("T", "mT") and rank >= 2:
        return self.call(torch.transpose, (source, rank - 2, rank - 1), {}, node)
    if name == "data":
        return self.value(source)
    return rule_value(self, node, args, kwargs)


def rule_value(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What does not depend on the data, nor on the batch: ranks, dtypes, devices."""
    return node.meta[VALUE] if VALUE in node.meta else NotImplemented


def rule_reshape(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    source = args[0]
    before, after = shape_of(source), shape_of(node)
    if before is None or after is None or "dtype" in kwargs:
        return NotImplemented
    name = operation_name(node)
    sizes: Any = kwargs.get("shape", kwargs.get("size", args[1] if len(args) == 2 else args[1:]))
    if isinstance(sizes, torch.dtype):
        return NotImplemented
    if name in ("view_as", "reshape_as", "expand_as"):
        sizes = tuple(after)
    if isinstance(sizes, int):
        sizes = (sizes,)
    kept = len(after) - 1
    if before != after and len(before) > kept > 0 and before[:kept] == after[:kept]:
        return self.call(torch.flatten, (source, kept, len(before) - 1), {}, node)
    if isinstance(sizes, (tuple, list)):
        sizes = list(self.value(tuple(sizes)))
        if sizes and before and after and sizes[0] == before[0] == after[0]:
            sizes[0] = self.annotate(self.graph.call_function(torch.Tensor.size, (self.value(source), 0)), node)
            sizes[0].meta.pop("tensor_meta", None)
        new = self.graph.call_function(torch.reshape, (self.value(source), tuple(sizes)))
        return self.annotate(new, node)
    return self.call(torch.reshape, (source, sizes), {}, node)


def rule_flatten(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rank = len(shape_of(args[0]) or ())
    bound = bind("start_dim end_dim", args, kwargs)
    if not rank:
        return NotImplemented
    start, end = bound.get("start_dim", 0) % rank, bound.get("end_dim", -1) % rank
    return self.call(torch.flatten, (args[0], start, end), {}, node)


def rule_axes(function: Callable[..., Any], names: str) -> Rule:
    """A function of a tensor and some axes or sizes: axes made non-negative, all arguments positional."""

    def rule(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = names.split()
        if known == ["dims"] and len(args) > 2:  # x.permute(0, 2, 1)
            args = (args[0], args[1:])
        bound = bind(names, args, {("dim" if key == "axis" else key): value for key, value in kwargs.items()})
        if bound.keys() - set(known) or any(key not in bound for key in known[: len(bound)]):
            return NotImplemented
        rank = len(shape_of(args[0]) or ()) + (function is torch.unsqueeze)
        for key, value in bound.items():
            if key.startswith("dim") and isinstance(value, int) and not isinstance(value, bool):
                bound[key] = value % rank if rank else value
            elif key.startswith("dim") and isinstance(value, (tuple, list)):
                bound[key] = tuple(item % rank for item in value)
        return self.call(function, (args[0], *bound.values()), {}, node)

    return rule


def axis(dim: int, node: fx.Node) -> int:
    """A non-negative axis of the node's output."""
    return dim % len(shape_of(node) or (0,)) if isinstance(dim, int) else dim


def rule_slice(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """aten.slice, select and narrow as Python indexing."""
    rank = len(shape_of(args[0]) or ())
    name = operation_name(node)
    bound = bind({"slice": "dim start end step", "select": "dim index"}.get(name or "", "dim start length"), args, kwargs)
    if not rank or not isinstance(bound.get("dim", 0), int):
        return NotImplemented
    if name == "select":
        index: Any = self.value(bound["index"])
    elif name == "slice":
        end = self.value(bound.get("end"))
        index = slice(
            self.value(bound.get("start")), None if isinstance(end, int) and end >= 2**62 else end, bound.get("step")
        )
    else:
        start, length = self.value(bound["start"]), self.value(bound["length"])
        if not isinstance(start, int) or not isinstance(length, int) or start < 0:
            return NotImplemented
        index = slice(start, start + length, None)
    position = (slice(None),) * (bound.get("dim", 0) % rank)
    new = self.graph.call_function(operator.getitem, (self.value(args[0]), (*position, index)))
    return self.annotate(new, node)


def rule_interpolate(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = operation_name(node) or ""
    if name in ("interpolate", "upsample"):
        names = "size scale_factor mode align_corners recompute_scale_factor antialias"
        bound = bind(names, args, kwargs)
    else:
        if not str(node.target).endswith(".vec"):
            return NotImplemented
        linear = "linear" in name or "cubic" in name
        bound = bind("size align_corners scale_factor" if linear else "size scale_factor", args, kwargs)
        kinds = {"nearest": "nearest", "linear": "linear", "bilinear": "bilinear", "trilinear": "trilinear",
                 "bicubic": "bicubic", "nearest_exact": "nearest-exact"}  # fmt: skip
        kind = kinds.get(name.removeprefix("_").removeprefix("upsample_").rstrip("123d").rstrip("_"))
        if kind is None or name.endswith("_aa"):
            return NotImplemented
        bound["mode"] = kind
    options = {key: value for key, value in bound.items() if value is not None and value is not False}
    options.setdefault("mode", "nearest")
    if bound.get("align_corners") is not None and options["mode"] in ("linear", "bilinear", "trilinear", "bicubic"):
        options["align_corners"] = bound["align_corners"]
    return self.call(F.interpolate, (args[0],), dict(sorted(options.items())), node)


def rule_pad(self: Canonicaliser, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = operation_name(node) or ""
    if name.startswith(("reflection_pad", "replication_pad")):
        mode, value = ("reflect" if name.startswith("reflection") else "replicate"), None
        amounts = args[1]
    else:
        bound = bind("pad value" if name == "constant_pad_nd" else "pad mode value", args, kwargs)
        amounts, mode, value = bound["pad"], bound.get("mode", "constant"), bound.get("value")
    return make_pad(self, node, args[0], amounts, mode, value)


def make_pad(self: Canonicaliser, node: fx.Node, source: Any, amounts: Any, mode: str, value: Any) -> fx.Node:
    """`F.pad(x, amounts, mode, value)`, constant padding with its value."""
    tail = (value if value is not None else 0.0,) if mode == "constant" else ()
    return self.call(F.pad, (source, list(amounts) if isinstance(amounts, tuple) else amounts, mode, *tail), {}, node)


RULES: dict[str, list[Rule]] = {}


def register(rule: Rule, *names: str) -> None:
    for name in names:
        RULES.setdefault(name, []).append(rule)


register(rule_stateless, *spellings.STATELESS)
register(rule_weighted, *(name for name in spellings.WEIGHTED if not name.startswith("functional.")))
register(rule_addmm, "addmm")
register(rule_matmul, "matmul", "mm")
register(rule_embedding, "embedding")
register(rule_recurrent, "lstm", "gru")
register(rule_native_norm, "_native_batch_norm_legit_no_training", "native_layer_norm", "native_group_norm")
register(rule_getitem, "getitem")
register(rule_arithmetic, *spellings.ARITHMETIC)
register(rule_rsub, "rsub")
register(rule_cat, "cat", "concat", "concatenate")
register(rule_identity, *spellings.IDENTITIES)
register(rule_drop, *spellings.DROPPED)
register(rule_size, "size", "sym_size")
register(rule_getattr, "getattr")
register(rule_value, "dim", "ndimension", "get_device", "is_floating_point")
register(rule_reshape, "reshape", "view", "_unsafe_view", "view_as", "reshape_as")
register(rule_flatten, "flatten")
register(rule_axes(torch.transpose, "dim0 dim1"), "transpose", "swapaxes", "swapdims")
register(rule_axes(torch.permute, "dims"), "permute")
register(rule_axes(torch.unsqueeze, "dim"), "unsqueeze")
register(rule_axes(torch.squeeze, "dim"), "squeeze")
register(rule_axes(torch.chunk, "chunks dim"), "chunk")
register(rule_axes(torch.split, "split_size_or_sections dim"), "split", "split_with_sizes")
register(rule_axes(torch.unbind, "dim"), "unbind")
register(rule_axes(torch.mean, "dim keepdim"), "mean")
register(rule_axes(torch.sum, "dim keepdim"), "sum")
register(rule_axes(torch.amax, "dim keepdim"), "amax")
register(rule_axes(torch.cumsum, "dim"), "cumsum")
register(rule_slice, "slice", "select", "narrow")
register(rule_interpolate, "interpolate", "upsample", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
         "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
         "_upsample_nearest_exact2d")  # fmt: skip
register(rule_pad, "pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
         "replication_pad1d", "replication_pad2d", "replication_pad3d")  # fmt: skip
register(rule_alike, *spellings.ALIKE)
register(rule_method, "expand", "repeat")
register(rule_same_function, *spellings.SAME_FUNCTION)

ModuleRule = Callable[[Canonicaliser, fx.Node, Any, Any], Any]


def _module_pad(mode: str) -> ModuleRule:
    def rule(self: Canonicaliser, node: fx.Node, module: Any, source: Any) -> Any:
        return make_pad(self, node, source, tuple(module.padding), mode, getattr(module, "value", None))

    return rule


def _module_flatten(self: Canonicaliser, node: fx.Node, module: nn.Flatten, source: Any) -> Any:
    return rule_flatten(self, node, (source, module.start_dim, module.end_dim), {})


def _module_upsample(self: Canonicaliser, node: fx.Node, module: nn.Upsample, source: Any) -> Any:
    options = {key: getattr(module, key) for key in ("size", "scale_factor", "mode", "align_corners")}
    options["recompute_scale_factor"] = module.recompute_scale_factor
    options = {key: value for key, value in options.items() if value is not None and value is not False}
    if module.align_corners is not None:
        options["align_corners"] = module.align_corners
    return self.call(F.interpolate, (source,), dict(sorted(options.items())), node)


MODULE_FUNCTIONS: dict[type[nn.Module], ModuleRule] = {
    nn.Flatten: _module_flatten,
    nn.Upsample: _module_upsample,
    nn.UpsamplingNearest2d: _module_upsample,
    nn.UpsamplingBilinear2d: _module_upsample,
    **{getattr(nn, f"ReflectionPad{d}d"): _module_pad("reflect") for d in (1, 2, 3)},
    **{getattr(nn, f"ReplicationPad{d}d"): _module_pad("replicate") for d in (1, 2, 3)},
    **{getattr(nn, f"ZeroPad{d}d"): _module_pad("constant") for d in (1, 2, 3)},
    **{getattr(nn, f"ConstantPad{d}d"): _module_pad("constant") for d in (1, 2, 3)},
    **{getattr(nn, f"CircularPad{d}d"): _module_pad("circular") for d in (1, 2, 3)},
}
"""Layers without weights whose functional form is the canonical one, because their arguments may be computed."""
