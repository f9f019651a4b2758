"""Rules for operations without weights that stay functions: those of no family, and layers that become functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompile import arithmetic_rules, image_rules, index_rules, schemas, shape_rules, size_rules, spellings
from fxcompile.image_rules import interpolate, lower_unfold, make_pad, module_local_response_norm
from fxcompile.lowering import MODULE_RULES, Canonicaliser, rule
from fxcompile.program import shape_of
from fxcompile.raw_nodes import Call
from fxcompile.shape_rules import lower_flatten, lower_unflatten


def lower_identity(self: Canonicaliser, call: Call) -> Any:
    return self.value(call.source)


def lower_nothing(self: Canonicaliser, call: Call) -> Any:
    return None


def lower_by_schema(self: Canonicaliser, call: Call) -> Any:
    """A function that is `torch.NAME` with the arguments of `aten.NAME`."""
    space, _, rest = call.name.partition("_")
    function = getattr(torch, call.name, None) or getattr(Tensor, call.name, None)
    if function is None and space in ("fft", "linalg", "special"):
        function = getattr(getattr(torch, space), rest, None)
    if function is None or not callable(function) or (call.is_functional and not hasattr(torch, call.name)):
        return NotImplemented
    read = schemas.read(call.name, call.schema, call.args, call.kwargs, call.rank)
    if read is None:
        return NotImplemented
    return self.call(function, *read, call.node)


def lower_python_number(self: Canonicaliser, call: Call) -> Any:
    """`int`, `max`, `math.ceil` and the like, on sizes."""
    if not callable(call.node.target) or isinstance(call.node.target, torch._ops.OpOverload):
        return NotImplemented
    if any(schemas.is_tensor(item) for item in call.node.all_input_nodes):
        return NotImplemented
    args = self.value(call.node.args)
    if any(isinstance(item, fx.Node) for item in args):
        return NotImplemented
    return call.node.target(*args, **self.value(call.node.kwargs))


# modules whose functional form is the canonical one


def module_pad(mode: str) -> Callable[[Canonicaliser, fx.Node, Any], Any]:
    """The rule for one family of padding layers."""

    def lower(self: Canonicaliser, node: fx.Node, module: Any) -> Any:
        dims = len(shape_of(node.args[0]) or ()) - 2  # type: ignore[arg-type]
        amounts = module.padding if isinstance(module.padding, tuple) else (module.padding,) * (2 * dims)
        return make_pad(self, node, node.args[0], amounts, mode, getattr(module, "value", None))

    return lower


def module_flatten(self: Canonicaliser, node: fx.Node, module: nn.Flatten) -> Any:
    return lower_flatten(self, Call(node, "flatten", (node.args[0], module.start_dim, module.end_dim), {}))


def module_unflatten(self: Canonicaliser, node: fx.Node, module: nn.Unflatten) -> Any:
    return lower_unflatten(self, Call(node, "unflatten", (node.args[0], module.dim, module.unflattened_size), {}))


def module_upsample(self: Canonicaliser, node: fx.Node, module: nn.Upsample) -> Any:
    names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
    return interpolate(self, node, node.args[0], {key: getattr(module, key) for key in names})


def module_softmax2d(self: Canonicaliser, node: fx.Node, module: nn.Module) -> Any:
    rank = len(shape_of(node.args[0]) or ())  # type: ignore[arg-type]
    return self.call_layer(str(node.target), nn.Softmax(rank - 3), node.args, node)


def module_unfold(self: Canonicaliser, node: fx.Node, module: Any) -> Any:
    head = (module.output_size,) if isinstance(module, nn.Fold) else ()
    args = (node.args[0], *head, module.kernel_size, module.dilation, module.padding, module.stride)
    return lower_unfold(self, Call(node, "col2im" if head else "im2col", args, {}))


def register() -> None:
    """Enter these rules."""
    arithmetic_rules.register()
    size_rules.register()
    shape_rules.register()
    index_rules.register()
    image_rules.register()
    rule(*spellings.IDENTITIES)(lower_identity)
    rule(*spellings.DROPPED)(lower_nothing)
    rule("*")(lower_python_number)
    rule("*")(lower_by_schema)
    MODULE_RULES.update(
        {
            nn.Flatten: module_flatten,
            nn.Unflatten: module_unflatten,
            nn.Upsample: module_upsample,
            nn.UpsamplingNearest2d: module_upsample,
            nn.UpsamplingBilinear2d: module_upsample,
            nn.LocalResponseNorm: module_local_response_norm,
            nn.Softmax2d: module_softmax2d,
            nn.Unfold: module_unfold,
            nn.Fold: module_unfold,
            **{getattr(nn, f"ReflectionPad{d}d"): module_pad("reflect") for d in (1, 2, 3)},
            **{getattr(nn, f"ReplicationPad{d}d"): module_pad("replicate") for d in (1, 2, 3)},
            **{getattr(nn, f"ZeroPad{d}d"): module_pad("constant") for d in (1, 2, 3)},
            **{getattr(nn, f"ConstantPad{d}d"): module_pad("constant") for d in (1, 2, 3)},
            **{getattr(nn, f"CircularPad{d}d"): module_pad("circular") for d in (1, 2, 3)},
        }
    )
