"""Rules for interpolation, padding and other functions of torch.nn.functional that work on maps."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompile import spellings
from fxcompile.lowering import Canonicaliser, NoSpelling, rule
from fxcompile.program import shape_of
from fxcompile.raw_nodes import Call

_MODES = {"nearest": "nearest", "linear": "linear", "bilinear": "bilinear", "trilinear": "trilinear",
          "bicubic": "bicubic", "nearest_exact": "nearest-exact"}  # fmt: skip


def lower_interpolate(self: Canonicaliser, call: Call) -> Any:
    if call.name in ("interpolate", "upsample"):
        bound = call.bind("size scale_factor mode align_corners recompute_scale_factor antialias")
    elif call.name in ("upsample_nearest", "upsample_bilinear"):
        bound = call.bind("size scale_factor")
        bound["mode"] = call.name.removeprefix("upsample_")
        if call.name == "upsample_bilinear":
            bound["align_corners"] = True
    else:
        smooth = "linear" in call.name or "cubic" in call.name
        if str(call.node.target).endswith(".vec"):
            bound = call.bind("size align_corners scale_factor" if smooth else "size scale_factor")
        elif smooth:
            bound = call.bind("size align_corners")
        else:
            bound = call.bind("size")
        if any(key not in ("size", "align_corners", "scale_factor", "scale_factors") for key in bound):
            return NotImplemented
        if "scale_factors" in bound:
            bound["scale_factor"] = bound.pop("scale_factors")
        mode = call.name.strip("_").removesuffix("_aa").removeprefix("upsample_").rstrip("123d").rstrip("_")
        bound["mode"] = _MODES[mode]
        bound["antialias"] = call.name.endswith("_aa")
    return interpolate(self, call.node, call.source, bound)


def interpolate(self: Canonicaliser, node: fx.Node, source: Any, bound: dict[str, Any]) -> Any:
    """`F.interpolate(x, mode=..., size=... or scale_factor=...)`, sizes and factors one for each axis."""
    dims = len(shape_of(source) or ()) - 2
    options: dict[str, Any] = {"mode": bound.get("mode", "nearest")}
    for key in ("size", "scale_factor"):
        value = self.value(bound.get(key))
        if value is not None:
            value = tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims
            options[key] = tuple(
                float(item) if key == "scale_factor" and isinstance(item, int) else item for item in value
            )
    if options["mode"] == "area" and "size" in options and all(isinstance(item, int) for item in options["size"]):
        kind = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1]
        sizes = options["size"]
        return self.call_layer(None, kind(sizes[0] if len(set(sizes)) == 1 else sizes), (source,), node)
    if options["mode"] in ("linear", "bilinear", "trilinear", "bicubic") and bound.get("align_corners"):
        options["align_corners"] = True
    for key in ("recompute_scale_factor", "antialias"):
        if bound.get(key):
            options[key] = True
    return self.call(F.interpolate, (source,), dict(sorted(options.items())), node)


def lower_pad(self: Canonicaliser, call: Call) -> Any:
    mode, value = "constant", None
    if call.name.startswith(("reflection_pad", "replication_pad")):
        mode = "reflect" if call.name.startswith("reflection") else "replicate"
        amounts = call.bind("padding")["padding"]
    else:
        bound = call.bind("pad value" if call.name == "constant_pad_nd" else "pad mode value")
        amounts, mode, value = bound["pad"], bound.get("mode", "constant"), bound.get("value")
    return make_pad(self, call.node, call.source, amounts, mode, value)


def make_pad(self: Canonicaliser, node: fx.Node, source: Any, amounts: Any, mode: str, value: Any) -> fx.Node:
    """`F.pad(x, amounts, mode, value)`, constant padding with its value."""
    tail = (float(value) if isinstance(value, int) else value,) if value is not None else (0.0,)
    return self.call(F.pad, (source, list(amounts), mode, *(tail if mode == "constant" else ())), {}, node)


def lower_grid_sample(self: Canonicaliser, call: Call) -> Any:
    bound = call.bind("grid mode padding_mode align_corners")
    mode, padding = bound.get("mode", "bilinear"), bound.get("padding_mode", "zeros")
    if isinstance(mode, int):
        mode = ("bilinear", "nearest", "bicubic")[mode]
    if isinstance(padding, int):
        padding = ("zeros", "border", "reflection")[padding]
    return self.call(
        F.grid_sample, (call.source, bound["grid"], mode, padding, bool(bound.get("align_corners"))), {}, call.node
    )


def lower_affine_grid(self: Canonicaliser, call: Call) -> Any:
    bound = call.bind("size align_corners")
    sizes = self.value(bound["size"])
    sizes = tuple(sizes) if isinstance(sizes, (tuple, list)) else sizes
    args = (self.value(call.source), sizes, bool(bound.get("align_corners")))
    return self.make(F.affine_grid, args, call.node)


def lower_unfold(self: Canonicaliser, call: Call) -> Any:
    """`F.unfold`, `F.fold`, and `aten`'s names for them; `Tensor.unfold` is another thing."""
    if call.name == "unfold" and not call.is_functional:
        bound = call.bind("dimension size step")
        args = (call.source, bound["dimension"] % call.rank, bound["size"], bound["step"])
        return self.call(torch.Tensor.unfold, args, {}, call.node)
    folds = call.name in ("fold", "col2im")
    order = "kernel_size dilation padding stride"
    if call.name in ("im2col", "col2im"):
        order = "kernel_size dilation padding stride" if call.name == "im2col" else order
    bound = call.bind(f"output_size {order}" if folds else order)
    pairs = [_pair(bound.get(key, default)) for key, default in (("dilation", 1), ("padding", 0), ("stride", 1))]
    head = (_pair(self.value(bound["output_size"])),) if folds else ()
    args = (self.value(call.source), *head, _pair(bound["kernel_size"]), *pairs)
    return self.make(F.fold if folds else F.unfold, args, call.node)


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def lower_attention(self: Canonicaliser, call: Call) -> Any:
    names = "key value attn_mask dropout_p is_causal scale enable_gqa"
    bound = call.bind(names)
    defaults = {"dropout_p": 0.0, "is_causal": False, "enable_gqa": False}
    options = {key: value for key, value in bound.items() if defaults.get(key) != value}
    key, value = options.pop("key"), options.pop("value")
    return self.call(
        F.scaled_dot_product_attention, (call.source, key, value), dict(sorted(options.items())), call.node
    )


def lower_local_response_norm(self: Canonicaliser, call: Call) -> Any:
    """`F.local_response_norm` as `torch` computes it: an average pool over the channels of the squares."""
    bound = call.bind("size alpha beta k")
    if call.rank < 3 or not isinstance(call.source, fx.Node):
        return NotImplemented
    size, x = bound["size"], self.value(call.source)
    around = [size // 2, (size - 1) // 2]
    part = self.make_part(operator.mul, (x, x), call.node)
    if call.rank == 3:
        part = self.make_part(torch.unsqueeze, (part, 1), call.node)
        pool: nn.Module = nn.AvgPool2d((size, 1), stride=1)
    else:
        sizes = tuple(self.size(call.source, axis) for axis in range(call.rank))
        part = self.make_part(torch.reshape, (part, (sizes[0], 1, *sizes[1:3], -1)), call.node)
        pool = nn.AvgPool3d((size, 1, 1), stride=1)
    part = self.make_part(F.pad, (part, [0, 0] * (1 if call.rank == 3 else 2) + around, "constant", 0.0), call.node)
    part = self.place_layer(None, pool, (part,), call.node, f"avg_pool{2 if call.rank == 3 else 3}d")
    part.meta.pop("tensor_meta", None)
    part = self.make_part(torch.squeeze, (part, (1,)), call.node)
    if call.rank > 3:
        part = self.make_part(torch.reshape, (part, sizes), call.node)
    part = self.make_part(operator.mul, (part, bound.get("alpha", 1e-4)), call.node)
    part = self.make_part(operator.add, (part, bound.get("k", 1.0)), call.node)
    part = self.make_part(torch.pow, (part, bound.get("beta", 0.75)), call.node)
    return self.make(operator.truediv, (x, part), call.node)


def module_local_response_norm(self: Canonicaliser, node: fx.Node, module: nn.LocalResponseNorm) -> Any:
    args = (node.args[0], module.size, module.alpha, module.beta, module.k)
    return lower_local_response_norm(self, Call(node, "local_response_norm", args, {}))


def lower_stft(self: Canonicaliser, call: Call) -> Any:
    """`torch.stft` by keywords: `aten` has it without `center`, the arguments after that in other places."""
    centred = call.schema is None or any(argument.name == "center" for argument in call.schema.arguments)
    head, tail = "n_fft hop_length win_length window", "normalized onesided return_complex align_to_window"
    bound = call.bind(f"{head} center pad_mode {tail}" if centred else f"{head} {tail}")
    options = bound if centred else {**bound, "center": False}
    return self.call(torch.stft, (call.source,), dict(sorted(options.items())), call.node)


def lower_random(self: Canonicaliser, call: Call) -> Any:
    raise NoSpelling(call.node, "forward draws random numbers")


def lower_value_dependent(self: Canonicaliser, call: Call) -> Any:
    if call.name in spellings.TAKES_NUMBERS:
        raise NoSpelling(call.node, "forward takes a number out of a tensor")
    raise NoSpelling(call.node, f"the shape of what '{call.name}' gives as its result depends on values")


def lower_one_hot(self: Canonicaliser, call: Call) -> Any:
    return self.call(F.one_hot, (call.source, call.bind("num_classes").get("num_classes", -1)), {}, call.node)


def upsample_names() -> list[str]:
    """`aten`'s names for interpolation."""
    kinds = [f"upsample_{mode}{d}d" for mode in ("nearest", "linear", "bilinear", "trilinear") for d in (1, 2, 3)]
    kinds += [f"_upsample_nearest_exact{d}d" for d in (1, 2, 3)]
    return [*kinds, "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]


def register() -> None:
    """Enter these rules."""
    rule("interpolate", "upsample", "upsample_nearest", "upsample_bilinear", *upsample_names())(lower_interpolate)
    rule("pad", "constant_pad_nd", *(f"{kind}_pad{d}d" for kind in ("reflection", "replication") for d in (1, 2, 3)))(
        lower_pad
    )
    rule("grid_sample")(lower_grid_sample)
    rule("affine_grid")(lower_affine_grid)
    rule("unfold", "fold", "im2col", "col2im")(lower_unfold)
    rule("scaled_dot_product_attention")(lower_attention)
    rule("one_hot")(lower_one_hot)
    rule("local_response_norm")(lower_local_response_norm)
    rule("stft")(lower_stft)
    rule(*spellings.RANDOM)(lower_random)
    rule(*spellings.TAKES_NUMBERS, *spellings.UNKNOWN_SHAPE)(lower_value_dependent)
