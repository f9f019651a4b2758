"""Blocks that normalise: by statistics as they should be, and as they should not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxcompile.testing.blocks import block, is_map
from fxcompile.testing.drafting import Draft, Layer, Text, Value, arguments

STATISTICS = (
    "usual", "usual", "negative gamma", "zero gamma", "tiny variance", "no variance", "large variance", "large mean",
)  # fmt: skip


def same_shape(d: Draft, name: str, x: Value, fits: Callable[[tuple[int, ...]], bool]) -> Value:
    """Call a layer that keeps the shape, and remember that it can be called again."""
    d.callable.append(Layer(name, lambda shape: shape if fits(shape) else None))
    return d.call(name, x, x.shape)


@block("batch norm", 12)
def batch_norm(d: Draft) -> Value | None:
    """A batch norm of a map or of a vector."""
    x = d.source(lambda value: value.dims <= 3)
    if x is None:
        return None
    eps = d.pick("eps", [1e-5, 1e-5, 1e-3, 0.5])
    spelling = d.pick("spelling", ["layer", "layer", "layer", "function"])
    features = x.channels
    if spelling == "function":
        kept = [d.buffer("mean", (features,)), d.buffer("var", (features,))]
        scale = (
            [d.parameter("gamma", (features,)), d.parameter("bias", (features,))] if d.pick("affine", [1, 0]) else []
        )
        return d.compute(f"F.batch_norm({arguments(x.name, *kept, *scale, eps=eps)})", x.shape)
    affine, dims = d.pick("affine", [True, True, True, False]), max(x.dims, 1)
    tracked = d.pick("tracked", [True] * 9 + [False]) or x.numel == x.channels
    named = {"eps": eps if eps != 1e-5 else None, "affine": None if affine else False}
    named |= {"track_running_stats": None if tracked else False}
    name = d.layer("bn", f"nn.BatchNorm{dims}d({arguments(features, **named)})")
    what = d.pick("statistics", STATISTICS)
    if what != "usual" and tracked and (affine or "gamma" not in what):
        d.odd[name] = what
    large = x.numel > x.channels

    def fits(shape: tuple[int, ...]) -> bool:
        right = len(shape) in (1, 2) if dims == 1 else len(shape) == dims + 1
        return right and shape[0] == features and (tracked or (large and len(shape) > 1 and max(shape[1:]) > 1))

    return same_shape(d, name, x, fits)


@block("instance norm", 2)
def instance_norm(d: Draft) -> Value | None:
    """An instance norm, at times one that keeps statistics."""
    x = d.source(lambda value: is_map(value) and value.numel > value.channels)
    if x is None:
        return None
    if d.pick("spelling", ["layer", "function"]) == "function":
        return d.compute(f"F.instance_norm({x.name})", x.shape)
    named = {"affine": d.pick("affine", [None, True]), "track_running_stats": d.pick("tracked", [None, None, True])}
    name = d.layer("norm", f"nn.InstanceNorm{x.dims}d({arguments(x.channels, **named)})")
    dims, channels = x.dims, x.channels
    return same_shape(d, name, x, lambda shape: len(shape) == dims + 1 and shape[0] == channels and max(shape[1:]) > 1)


@block("group norm", 2)
def group_norm(d: Draft) -> Value | None:
    """A group norm, over one group, all or some."""
    x = d.source(lambda value: is_map(value) and value.numel > value.channels)
    if x is None:
        return None
    named = {"one": 1, "two": 2, "three": 3, "each": x.channels}
    groups = named[d.pick("groups", [name for name, g in named.items() if x.channels % g == 0])]
    if d.pick("spelling", ["layer", "function"]) == "function":
        scale = [d.parameter("gamma", (x.channels,)), d.parameter("bias", (x.channels,))]
        return d.compute(f"F.group_norm({', '.join([x.name, str(groups), *scale])})", x.shape)
    name = d.layer("norm", f"nn.GroupNorm({arguments(groups, x.channels, affine=d.pick('affine', [None, False]))})")
    channels = x.channels
    return same_shape(d, name, x, lambda shape: len(shape) > 1 and shape[0] == channels and max(shape[1:]) > 1)


@block("layer norm", 2)
def layer_norm(d: Draft) -> Value | None:
    """A layer norm over the last axis, or over all."""
    x = d.source(lambda value: value.shape[-1] > 1)
    if x is None:
        return None
    over = x.shape if d.pick("over", ["last axis", "all"]) == "all" else x.shape[-1:]
    spelled: Any = Text(over[0] if len(over) == 1 else list(over))
    spelling = d.pick("spelling", ["layer", "function", "root mean square"])
    if spelling == "function":
        return d.compute(f"F.layer_norm({x.name}, {list(over)})", x.shape)
    kind = "LayerNorm" if spelling == "layer" else "RMSNorm"
    affine, eps = d.pick("affine", [None, False]), 1e-5 if kind == "RMSNorm" else None
    name = d.layer("norm", f"nn.{kind}({arguments(spelled, eps=eps, elementwise_affine=affine)})")
    return same_shape(d, name, x, lambda shape: shape[-len(over) :] == over)


@block("local response norm", 1)
def local_response_norm(d: Draft) -> Value | None:
    """A local response norm over the channels."""
    x = d.source(lambda value: value.dims in (1, 2))
    if x is None:
        return None
    if d.pick("spelling", ["layer", "function"]) == "function":
        return d.compute(f"F.local_response_norm({x.name}, 2)", x.shape)
    return same_shape(d, d.layer("lrn", "nn.LocalResponseNorm(3)"), x, lambda shape: len(shape) == x.dims + 1)
