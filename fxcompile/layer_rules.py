"""Rules for operations that become layers: activations and pools, and everything that takes constant weights."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx, nn

from fxcompile import spellings
from fxcompile.building import build_layer
from fxcompile.layers import TRANSPOSED, plain_layer
from fxcompile.lowering import MODULE_RULES, Canonicaliser, NoSpelling, rule
from fxcompile.program import shape_of
from fxcompile.raw_nodes import Call, operation_name

_KINDS = {kind: (name, names) for name, (kind, names) in reversed(spellings.STATELESS.items())}
"""For each layer without weights, the operation that it is."""


def lower_stateless(self: Canonicaliser, call: Call) -> Any:
    """An activation, pool, dropout or rearrangement."""
    name = spellings.WITH_INDICES.get(call.name, call.name)
    kind, names = spellings.STATELESS[name]
    if not isinstance(call.source, fx.Node) or shape_of(call.source) is None:
        return NotImplemented
    bound = call.bind(names)
    if "train" in bound:
        bound["training"] = bound.pop("train")
    if "_stacklevel" in bound or "dtype" in bound or "?" in bound:  # the tails of softmax and its kin
        wanted = [bound.pop("dtype", None), *bound.pop("?", ())]
        bound.pop("_stacklevel", None)
        if any(isinstance(item, torch.dtype) for item in wanted) or not name.endswith("softmax"):
            return NotImplemented
    options = {key: self.plain(value) for key, value in bound.items()}
    if any(value is NotImplemented for value in options.values()) or options.keys() - set(names.split()):
        return NotImplemented
    drops = "training" in names.split() and options.get("p") != 0
    if drops and options.get("training", trains_by_default(call)) is True:
        raise NoSpelling(call.node, "forward draws random numbers")
    options = {key: value for key, value in options.items() if key not in spellings.LAYER_ONLY_ARGUMENTS}
    pair = type(call.node.meta.get("tensor_meta")) is tuple
    if pair:
        options["return_indices"] = not only_first(call.node)
    layer = make_stateless(name, kind, options, call)
    if layer is None:
        return NotImplemented
    # One that the model wrote as a function is not shared: each call has its own name and site.
    path = self.layer_name(call.node, None, kind.__name__)
    new = self.call_layer(path, layer, call.args[:1], call.node, kind=name)
    return first_of(new) if pair and not options.get("return_indices") else new


def module_stateless(self: Canonicaliser, node: fx.Node, module: nn.Module) -> Any:
    """The model's own layer without weights, its options in the form they get from a function."""
    name, names = _KINDS[type(module)]
    wanted = [item for item in names.split() if item not in spellings.LAYER_ONLY_ARGUMENTS]
    options = {item: getattr(module, item) for item in wanted if getattr(module, item) is not None}
    layer = make_stateless(name, type(module), options, Call(node, name, tuple(node.args), {}))
    return self.call_layer(str(node.target), layer or copy.deepcopy(module), node.args[:1], node)


def module_identity(self: Canonicaliser, node: fx.Node, module: nn.Module) -> Any:
    return self.value(node.args[0])


def trains_by_default(call: Call) -> bool:
    """Whether a call that does not say so draws random numbers."""
    return call.is_functional and call.name in spellings.TRAINING_BY_DEFAULT


def make_stateless(name: str, kind: type[nn.Module], options: dict[str, Any], call: Call) -> nn.Module | None:
    """The layer for an operation without weights, options in one form."""
    if name.endswith("softmax"):
        if options.get("dim") is None:
            return None
        options["dim"] %= max(call.rank, 1)
    if name == "glu":
        options["dim"] = options.get("dim", -1) % call.rank
    if options.get("stride") == ():
        del options["stride"]
    if name.startswith("avg_pool") and covers_map(call.shape, options):
        kind, options = spellings.STATELESS[f"adaptive_{name}"][0], {"output_size": 1}
    if name == "hardtanh" and (options.get("min_val", -1), options.get("max_val", 1)) == (0, 6):
        kind, options = nn.ReLU6, {}
    dims = int(name[-2]) if name.endswith(("1d", "2d", "3d")) and "pool" in name else 0
    return kind(**{key: one_number(value, dims) for key, value in options.items()})


def covers_map(shape: tuple[int, ...], options: dict[str, Any]) -> bool:
    """Whether an average pool's window is the whole map, which is global average pooling."""
    dims = len(shape) - 2
    kernel, padding = options.get("kernel_size"), options.get("padding", 0)
    window = tuple(kernel) if isinstance(kernel, tuple) else (kernel,) * dims
    padded = any(padding if isinstance(padding, tuple) else (padding,))
    return dims > 0 and window == shape[2:] and not padded and options.get("divisor_override") is None


def one_number(value: Any, dims: int) -> Any:
    """A size that is the same on all axes as one number: models give either, and `aten` may give a short list."""
    if not isinstance(value, tuple) or not value or isinstance(value[0], bool):
        return value
    if len(value) == 1 or (len(value) == dims and len(set(value)) == 1):
        return value[0]
    return value


def module_transposed(self: Canonicaliser, node: fx.Node, module: Any) -> Any:
    """A transposed convolution; an output size that is given at the call becomes its output padding."""
    if len(node.args) == 1 or node.args[1] is None:
        return self.call_module_layer(node, module, node.args[:1])
    wanted, shape = self.plain(node.args[1]), shape_of(node.args[0])  # type: ignore[arg-type]
    if wanted is NotImplemented or shape is None:
        raise NoSpelling(node, "the output size of a transposed convolution depends on values")
    layer = plain_layer(module, str(node.target))
    layer.output_padding = tuple(  # type: ignore[assignment]
        module._output_padding(
            torch.empty(shape, device="meta"), list(wanted), module.stride, module.padding, module.kernel_size,
            len(module.kernel_size), module.dilation,
        )
    )  # fmt: skip
    return self.call_layer(str(node.target), layer, node.args[:1], node)


def lower_weighted(self: Canonicaliser, call: Call) -> Any:
    """A convolution, linear layer, norm or PReLU whose weights are constant."""
    order = f"functional.{call.name}" if call.is_functional else call.name
    names = spellings.WEIGHTED.get(order) or spellings.WEIGHTED[call.name]
    native = spellings.NATIVE_NORMS.get(call.name)
    if native and not only_first(call.node):
        return NotImplemented  # the statistics are used as well
    bound = call.bind(names)
    held = {key: self.weight(bound[key]) for key in spellings.TENSOR_ARGUMENTS if key in bound}
    options = {key: self.plain(value) for key, value in bound.items() if key not in held}
    if any(tensor is None for tensor in held.values()) or any(value is NotImplemented for value in options.values()):
        return NotImplemented
    if not isinstance(call.source, fx.Node):
        return NotImplemented
    if native == "batch_norm":
        options["training"] = False
    layer = build_layer(native or call.name, held, options, call.shape)
    if layer is None:
        return NotImplemented
    owner = bound.get("weight") if bound.get("weight") is not None else bound.get("running_mean")
    path = self.layer_name(call.node, owner, type(layer).__name__)
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        keep_count(self, layer, path)
    new = self.call_layer(path, layer, call.args[:1], call.node)
    return first_of(new) if native else new


def only_first(node: fx.Node) -> bool:
    """Whether only the first of the tensors that a node gives is used."""
    return all(user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in node.users)


def first_of(new: fx.Node) -> tuple[fx.Node, None, None]:
    """A layer that gives only the first of what the raw node does, which is all that is used."""
    meta = new.meta.get("tensor_meta")
    new.meta["tensor_meta"] = meta[0] if type(meta) is tuple else meta
    return (new, None, None)


def keep_count(self: Canonicaliser, layer: nn.Module, path: str | None) -> None:
    """Give a batch norm the model's own count of batches, which the graph does not use but its state has."""
    try:
        count = self.root.get_buffer(f"{path}.num_batches_tracked")
    except AttributeError:
        return
    if "num_batches_tracked" in layer._buffers:
        layer.register_buffer("num_batches_tracked", count)


def lower_addmm(self: Canonicaliser, call: Call) -> Any:
    if call.kwargs or len(call.args) != 3:
        return NotImplemented
    bias, source, weight = call.args
    return linear(self, call, source, weight, bias)


def lower_matmul(self: Canonicaliser, call: Call) -> Any:
    if call.kwargs or len(call.args) != 2 or self.constant(call.source) is not None:
        return NotImplemented
    return linear(self, call, call.source, call.args[1], None)


def linear(self: Canonicaliser, call: Call, source: Any, weight: Any, bias: Any) -> Any:
    """`source @ weight + bias` as a linear layer, where the weights are constant."""
    matrix, offset = self.constant(weight), self.weight(bias)
    if matrix is None or matrix.dim() != 2 or (bias is not None and (offset is None or offset.dim() != 1)):
        return NotImplemented
    if bias is not None and offset is not None and offset.shape[0] != matrix.shape[1]:
        return NotImplemented
    held: dict[str, torch.Tensor | None] = {"weight": transposed(self, weight), "bias": offset}
    layer = build_layer("linear", held, {}, call.shape)
    assert layer is not None
    return self.call_layer(self.layer_name(call.node, weight, "Linear"), layer, (source,), call.node)


def transposed(self: Canonicaliser, weight: fx.Node) -> nn.Parameter | torch.Tensor:
    """The transpose of a constant matrix; the matrix itself where that is a transpose already: it stays tied."""
    undone = operation_name(weight) in ("t", "numpy_T", "mT", "transpose", "adjoint")
    last: Any = weight.args[-1:]
    undone = undone or (operation_name(weight) == "permute" and 0 in last + tuple(last[0]))
    undone = undone or (weight.target is getattr and weight.args[1:] in (("T",), ("mT",)))
    if undone and isinstance(weight.args[0], fx.Node):
        source = self.weight(weight.args[0])
        if source is not None:
            return source
    tensor = self.weight(weight)
    assert tensor is not None
    key = id(tensor)
    if key not in self.transposes:
        self.transposes[key] = (
            tensor,
            nn.Parameter(tensor.detach().t().contiguous(), requires_grad=tensor.requires_grad),
        )
    return self.transposes[key][1]


def lower_embedding(self: Canonicaliser, call: Call) -> Any:
    """`F.embedding(index, table, ...)` or `aten.embedding(table, index, ...)`."""
    if len(call.args) < 2:
        return NotImplemented
    table, index = call.args[:2]
    names = "index padding_idx scale_grad_by_freq sparse"
    if call.is_functional or self.constant(table) is None:
        index, table = table, index
        names = "index padding_idx max_norm norm_type scale_grad_by_freq sparse"
    weight = self.weight(table)
    bound = call.bind(names)
    if weight is None or bound.get("max_norm") is not None or bound.get("sparse"):
        return NotImplemented
    padding = bound.get("padding_idx", -1)
    rows, width = weight.shape
    layer = nn.Embedding(rows, width, padding_idx=padding if padding != -1 else None, device="meta")
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach(), requires_grad=False)
    return self.call_layer(self.layer_name(call.node, table, "Embedding"), layer, (index,), call.node)


def register() -> None:
    """Enter these rules."""
    rule(*spellings.STATELESS, *spellings.WITH_INDICES)(lower_stateless)
    rule(*(name for name in spellings.WEIGHTED if not name.startswith("functional.")))(lower_weighted)
    rule("addmm")(lower_addmm)
    rule("matmul")(lower_matmul)
    rule("embedding")(lower_embedding)
    MODULE_RULES.update(dict.fromkeys(_KINDS, module_stateless))
    MODULE_RULES[nn.Identity] = module_identity
    MODULE_RULES.update(dict.fromkeys(TRANSPOSED, module_transposed))
