"""The first road: `torch.fx.symbolic_trace`, with flat inputs, hooks kept, and the model's lines noted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompile.functional import WRITING
from fxcompile.layers import CONVOLUTIONS, computes_weights, plain_kind
from fxcompile.lowering import MODULE_RULES
from fxcompile.raw_nodes import PLACE, is_traced_constant
from fxcompile.refusals import current_line
from fxcompile.signature import Signature

Forward = Callable[..., Any]


def symbolic_graph(model: nn.Module, signature: Signature) -> fx.GraphModule:
    """The raw graph of a model; symbolic tracing runs the user's code on proxies, so it may raise anything."""
    tracer = Tracer(model, signature)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tracer.trace(model)
    return fx.GraphModule(tracer.root, graph, class_name=type(model).__name__)


def changing_line(model: nn.Module, signature: Signature, between: Callable[[], Any]) -> str | None:
    """The line of the first operation that differs between two traces; None where there is none, or no trace.

    Args:
        model: the model.
        signature: of its example call.
        between: called between the traces; runs the model as a user would.
    """
    try:
        first = symbolic_graph(model, signature)
        between()
        second = symbolic_graph(model, signature)
    except Exception:  # it runs the user's code on proxies
        return None
    for ours, theirs in zip_longest(first.graph.nodes, second.graph.nodes):
        if ours is None or theirs is None or _written(first, ours) != _written(second, theirs):
            node = theirs or ours
            return node.meta.get(PLACE) or next((user.meta[PLACE] for user in node.users if PLACE in user.meta), None)
    return None


def _written(module: fx.GraphModule, node: fx.Node) -> str:
    """A node of a raw graph as text, with the values of tensors that no name of the model leads to."""
    text = f"{node.op} {node.target} {node.args} {node.kwargs}"
    if node.op == "get_attr" and is_traced_constant(str(node.target)):
        text += str(getattr(module, str(node.target)).tolist())
    return text


class Tracer(fx.Tracer):
    """Symbolic tracing with flat placeholders; everything else of the example call is baked in."""

    def __init__(self, model: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.signature = signature
        self.parameter_names = {id(parameter): name for name, parameter in model.named_parameters()}

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """The model called as in the example, with a proxy for each tensor, hooks and all."""
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.signature.names]
        args, kwargs = self.signature.call(proxies)
        assert isinstance(self.root, nn.Module)
        has_hooks = self.root._forward_hooks or self.root._forward_pre_hooks
        if has_hooks or "forward" in self.root.__dict__:
            return lambda: self.root(*args, **kwargs), []
        return lambda: root_fn(self.root, *args, **kwargs), []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers that canonical form has; all others are traced through."""
        if m is self.root or "forward" in m.__dict__:
            return False
        if computes_weights(m):
            return plain_kind(m) is not None and not pads_by_itself(m)
        kind = type(m)
        if kind in MODULE_RULES:
            return True
        return kind.__module__.startswith("torch.nn.modules.") and plain_kind(m) is not None and not pads_by_itself(m)

    def call_module(self, m: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a layer; its hooks run around it on proxies."""
        path = self.path_of_module(m)
        if not (m._forward_hooks or m._forward_pre_hooks) or not self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        m.forward = lambda *a, **k: self.create_proxy("call_module", path, a, k)
        try:
            return forward(*args, **kwargs)
        finally:
            del m.forward

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter as a proxy, found in constant time."""
        name = self.parameter_names.get(id(attr_val)) if isinstance(attr_val, nn.Parameter) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """An argument for the graph; a parameter that was reached past its module is known by its name, too."""
        if isinstance(a, nn.Parameter) and id(a) in self.parameter_names:
            return self.create_node("get_attr", self.parameter_names[id(a)], (), {})
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> Written:
        """What stands for a node's value in forward."""
        return Written(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any, **options: Any
    ) -> Any:
        """A proxy for an operation, with the line of the model; composite functions are taken apart."""
        composite = COMPOSITES.get(target) if kind == "call_function" else None
        if composite is not None:
            return composite(*args, **kwargs)
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        line = current_line()
        if line is not None:
            proxy.node.meta[PLACE] = line
        return proxy


class Written(fx.Proxy):
    """A proxy on which `y += 1` writes to what other names of `y` see, too, as it does on tensors."""


def _augmented(function: Callable[..., Any]) -> Callable[..., Any]:
    def write(self: Written, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return write


for _function in WRITING:
    setattr(Written, f"__{_function.__name__}__", _augmented(_function))


def pads_by_itself(module: nn.Module) -> bool:
    """Whether a convolution pads with something else than zeros, which canonical form does ahead of it."""
    return isinstance(module, CONVOLUTIONS) and module.padding_mode != "zeros"


# Functions of torch.nn.functional that are written in Python of other functions, as torch.export sees them. They are
# repeated here because torch.fx would take each for one operation.


def _softsign(input: Tensor) -> Tensor:
    return input / (input.abs() + 1)


def _tanhshrink(input: Tensor) -> Tensor:
    return input - input.tanh()


def _softmin(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
    return F.softmax(-input, dim, dtype=dtype) if dtype is not None else F.softmax(-input, dim)


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Tensor:
    if out is not None:
        return torch.div(input, torch.norm(input, p, dim, True).clamp_min(eps).expand_as(input), out=out)
    length: Tensor = torch.norm(input, p, dim, True).clamp_min(eps).expand_as(input)
    return input / length


def _lp_pool(dims: int) -> Callable[..., Tensor]:
    pool, most = ((F.avg_pool1d, F.max_pool1d), (F.avg_pool2d, F.max_pool2d))[dims - 1]

    def lp_pool(
        input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
    ) -> Tensor:
        sizes = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size,) * dims
        area = 1
        for size in sizes:
            area *= size
        if norm_type in (math.inf, -math.inf):
            sign = 1 if norm_type > 0 else -1
            return sign * most(sign * input.abs(), kernel_size, stride, 0, 1, ceil_mode)
        out = pool(input.pow(norm_type), kernel_size, stride, 0, ceil_mode)
        return (torch.sign(out) * F.relu(torch.abs(out))).mul(area).pow(1.0 / norm_type)

    return lp_pool


COMPOSITES: dict[Any, Callable[..., Any]] = {
    F.softsign: _softsign,
    F.tanhshrink: _tanhshrink,
    F.softmin: _softmin,
    F.normalize: _normalize,
    F.lp_pool1d: _lp_pool(1),
    F.lp_pool2d: _lp_pool(2),
}
