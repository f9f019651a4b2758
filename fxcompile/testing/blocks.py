"""The table of blocks that networks are grown from, and the layers with weights among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fxcompile.testing.drafting import Draft, Layer, Shape, Text, Value, arguments, size

Grow = Callable[[Draft], object]


@dataclass(frozen=True)
class Block:
    """A kind of step.

    Attributes:
        kind: its name, as in `Step.kind`.
        weight: how often it is drawn, against the others.
        grow: writes it, or nothing where no value is fit for it.
    """

    kind: str
    weight: int
    grow: Grow


BLOCKS: dict[str, Block] = {}
"""By kind, in the order in which the modules that enter them are imported: it decides what a seed draws."""

LARGEST = 1500
"""Most numbers in one sample of a value."""


def block(kind: str, weight: int) -> Callable[[Grow], Grow]:
    """Enter a function into the table."""

    def enter(grow: Grow) -> Grow:
        BLOCKS[kind] = Block(kind, weight, grow)
        return grow

    return enter


def count(shape: Shape) -> int:
    """The numbers in a tensor of this shape."""
    return math.prod(shape)


def is_map(x: Value) -> bool:
    """Whether a value has axes over which a kernel can move."""
    return 1 <= x.dims <= 3


def per_axis(d: Draft, name: str, dims: int, options: Sequence[int]) -> tuple[int, ...]:
    """A number for each axis: the same, or another one along the first."""
    first = d.pick(name, options)
    if dims == 1:
        return (first,)
    rest = d.pick(f"{name} elsewhere", [None, *options])
    return (first, *[first if rest is None else rest] * (dims - 1))


def reach(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """How many pixels a kernel spans along each axis."""
    return tuple(step * (taps - 1) + 1 for taps, step in zip(kernel, dilation, strict=True))


def convolved(sizes: Shape, span: Shape, padding: Shape, stride: Shape) -> Shape | None:
    """The map that a convolution gives, or None where the kernel does not fit."""
    made = [(n + 2 * p - k) // s + 1 for n, k, p, s in zip(sizes, span, padding, stride, strict=True)]
    fits = all(n + 2 * p >= k for n, k, p in zip(sizes, span, padding, strict=True))
    return tuple(made) if fits else None


@dataclass(frozen=True)
class Kernel:
    """The options of a convolution, apart from channels."""

    kernel: Shape
    stride: Shape
    padding: str | Shape
    dilation: Shape
    mode: str

    def gives(self, sizes: Shape) -> Shape | None:
        """The map that it gives for a map, or None where it does not fit."""
        span = reach(self.kernel, self.dilation)
        if len(sizes) != len(span):
            return None
        if self.padding == "same":
            around: Shape = tuple(k // 2 for k in span)
            made: Shape | None = sizes
        else:
            around = (0,) * len(span) if isinstance(self.padding, str) else self.padding
            made = convolved(sizes, span, around, self.stride)
        most = {"reflect": 1, "circular": 0}.get(self.mode)
        if most is not None and any(n - most < p for n, p in zip(sizes, around, strict=True)):
            return None
        return made


def draw_kernel(d: Draft, x: Value, modes: Sequence[str]) -> Kernel:
    """Options that fit a map."""
    kernel = per_axis(d, "kernel", x.dims, [1, 3, 2, 5, 4, 7])
    dilation = per_axis(d, "dilation", x.dims, [1, 1, 2, 3])
    stride = per_axis(d, "stride", x.dims, [1, 1, 2, 3])
    span = reach(kernel, dilation)
    half = tuple(k // 2 for k in span)
    paddings: dict[str, str | Shape] = {
        "none": (0,) * x.dims, "same": "same", "half": half, "valid": "valid", "one": (1,) * x.dims,
        "two": (2,) * x.dims, "first axis": (1,) + (0,) * (x.dims - 1), "other axes": (0,) + (1,) * (x.dims - 1),
    }  # fmt: skip
    if max(stride) > 1:
        del paddings["same"]
    mode = d.pick("padding mode", modes)
    fitting = [
        name for name, amount in paddings.items() if Kernel(kernel, stride, amount, dilation, mode).gives(x.sizes)
    ]
    if not fitting:
        mode, fitting = "zeros", ["half"]
    fitting += ["same"] * ("same" in fitting)
    return Kernel(kernel, stride, paddings[d.pick("padding", fitting)], dilation, mode)


def draw_groups(d: Draft, channels: int) -> int:
    """A number of groups that divides the channels."""
    named = {"one": 1, "depthwise": channels, "two": 2, "three": 3}
    return named[d.pick("groups", ["one", *[name for name, g in named.items() if g > 1 and channels % g == 0]])]


USUAL_WEIGHTS = 21
"""How many times likelier usual weights are than each kind of unusual ones."""


def draw_weights(d: Draft, name: str, filters: int, inputs: int) -> None:
    """Whether a layer has weights as they are usual; or every other filter is zero, or every other input unused, or all
    filters are the same: what divides by a norm or a singular value, or counts on full rank, is wrong there.
    """
    unusual = ["dead filters", "equal filters"] * (filters > 1) + ["dead inputs"] * (inputs > 1)
    what = d.pick("weights", ["usual"] * USUAL_WEIGHTS + unusual)
    if what != "usual":
        d.odd[name] = what


@block("convolution", 14)
def convolution(d: Draft) -> Value | None:
    """A convolution with any options, as a layer or as a function."""
    x = d.source(is_map)
    if x is None:
        return None
    spelling = d.pick("spelling", ["layer", "layer", "layer", "function"])
    modes = ["zeros", "zeros", "zeros", "reflect", "replicate", "circular"] if spelling == "layer" else ["zeros"]
    options = draw_kernel(d, x, modes)
    groups = draw_groups(d, x.channels)
    out = groups * d.pick("filters", [1, 2, 3, 4])
    return place_convolution(d, x, options, out, groups, d.pick("bias", [False, True]), spelling)


def place_convolution(
    d: Draft, x: Value, options: Kernel, out: int, groups: int = 1, bias: bool = True, spelling: str = "layer"
) -> Value | None:
    """A convolution with these options, on a value that they fit."""
    dims = len(options.kernel)
    sizes = options.gives(x.sizes)
    if sizes is None or out * count(sizes) > LARGEST:
        return None
    named: dict[str, Any] = {
        "stride": Text(size(options.stride)) if max(options.stride) > 1 else None,
        "padding": _padding(options.padding),
        "dilation": Text(size(options.dilation)) if max(options.dilation) > 1 else None,
        "groups": groups if groups > 1 else None,
    }
    shape = (out, x.channels // groups, *options.kernel)
    if spelling == "function":
        weight = d.parameter("weight", shape)
        head = [x.name, weight, d.parameter("bias", (out,))] if bias else [x.name, weight]
        return d.compute(f"F.conv{dims}d({arguments(*head, **named)})", (out, *sizes))
    named |= {"bias": None if bias else False, "padding_mode": None if options.mode == "zeros" else options.mode}
    inputs = x.channels

    def gives(shape: Shape) -> Shape | None:
        made = options.gives(shape[1:]) if shape[0] == inputs and len(shape) > 1 else None
        return None if made is None else (out, *made)

    def twin(draft: Draft, y: Value) -> Value | None:
        """Another convolution with the same weight, with options of its own."""
        if draft.pick("twin", ["layer", "function"]) == "function":
            made = Kernel(options.kernel, (1,) * dims, tuple(k // 2 for k in options.kernel), (1,) * dims, "zeros")
            found = made.gives(y.sizes)
            extra = arguments(y.name, f"self.{name}.weight", padding=_padding(made.padding), groups=named["groups"])
            return None if found is None else draft.compute(f"F.conv{dims}d({extra})", (out, *found))
        stride = draft.pick("stride", [1, 2])
        padding = draft.pick("padding", [k // 2 for k in options.kernel[:1]] + [0])
        made = Kernel(options.kernel, (stride,) * dims, (padding,) * dims, (1,) * dims, "zeros")
        before = len(draft.layers)
        y2 = place_convolution(draft, y, made, out, groups, draft.pick("bias", [False, True]))
        if y2 is not None:
            draft.extras.append(f"self.{draft.layers[before][0]}.weight = self.{name}.weight")
        return y2

    name = d.layer("conv", f"nn.Conv{dims}d({arguments(x.channels, out, size(options.kernel), **named)})")
    d.callable.append(Layer(name, gives, lambda shape: len(shape) == dims + 1 and shape[0] == inputs, twin))
    draw_weights(d, name, out, shape[1])
    if d.pick("frozen", [False] * 15 + [True]):
        d.extras.append(f"self.{name}.weight.requires_grad_(False)")
    return d.call(name, x, (out, *sizes))


def _padding(padding: str | Shape) -> object:
    if isinstance(padding, str):
        return padding
    return Text(size(padding)) if max(padding) > 0 else None


@block("transposed convolution", 4)
def transposed(d: Draft) -> Value | None:
    """A transposed convolution, with an output padding or a wanted output size."""
    x = d.source(is_map)
    if x is None:
        return None
    dims = x.dims
    kernel = per_axis(d, "kernel", dims, [1, 3, 2, 4])
    stride = per_axis(d, "stride", dims, [1, 2, 3])
    dilation = per_axis(d, "dilation", dims, [1, 1, 2])
    more = d.pick(
        "output padding", [0, 1] if min(max(s, k) for s, k in zip(stride, dilation, strict=True)) > 1 else [0]
    )

    def made(sizes: Shape, padding: int) -> Shape:
        span = reach(kernel, dilation)
        return tuple((n - 1) * s - 2 * padding + k + more for n, s, k in zip(sizes, stride, span, strict=True))

    padding = d.pick("padding", [0, *[p for p in (1, 2) if min(made(x.sizes, p)) > 0]])
    groups = draw_groups(d, x.channels)
    out = groups * d.pick("filters", [1, 2, 3])
    bias = d.pick("bias", [False, True])
    spelling = d.pick("spelling", ["layer", "function", *(["output size"] if more < min(stride) else [])])
    sizes = made(x.sizes, padding)
    if out * count(sizes) > LARGEST:
        return None
    named: dict[str, Any] = {
        "stride": Text(size(stride)) if max(stride) > 1 else None,
        "padding": padding or None,
        "output_padding": more or None,
        "groups": groups if groups > 1 else None,
        "dilation": Text(size(dilation)) if max(dilation) > 1 else None,
    }
    if spelling == "function":
        head = [x.name, d.parameter("weight", (x.channels, out // groups, *kernel))]
        head += [d.parameter("bias", (out,))] if bias else []
        return d.compute(f"F.conv_transpose{dims}d({arguments(*head, **named)})", (out, *sizes))
    if spelling == "output size":
        named["output_padding"] = None
    named["bias"] = None if bias else False
    name = d.layer("up", f"nn.ConvTranspose{dims}d({arguments(x.channels, out, size(kernel), **named)})")
    if spelling == "output size":
        return d.compute(f"self.{name}({x.name}, output_size={list(sizes)})", (out, *sizes))
    inputs = x.channels

    def gives(shape: Shape) -> Shape | None:
        fits = shape[0] == inputs and len(shape) == dims + 1 and min(made(shape[1:], padding)) > 0
        return (out, *made(shape[1:], padding)) if fits else None

    d.callable.append(Layer(name, gives))
    return d.call(name, x, (out, *sizes))


@block("linear", 4)
def linear(d: Draft) -> Value | None:
    """A linear layer over the last axis; of a vector at best."""
    x = d.source(lambda value: value.dims == 0) if d.pick("vectors only", [True, True, True, False]) else None
    x = x or d.source(lambda value: value.dims < 3)
    if x is None:
        return None
    inputs, out = x.shape[-1], d.pick("features", [1, 2, 3, 5])
    bias = d.pick("bias", [False, True])
    spelling = d.pick("spelling", ["layer", "layer", "function", "matmul"])
    if spelling == "layer":
        return place_linear(d, x, out, bias)
    shape = (*x.shape[:-1], out)
    if spelling == "function":
        head = [x.name, d.parameter("weight", (out, inputs))] + ([d.parameter("bias", (out,))] if bias else [])
        return d.compute(f"F.linear({', '.join(head)})", shape)
    product = f"torch.matmul({x.name}, {d.parameter('weight', (inputs, out))})"
    return d.compute(f"{product} + {d.parameter('bias', (out,))}" if bias else product, shape)


def place_linear(d: Draft, x: Value, out: int, bias: bool) -> Value:
    """A linear layer over the last axis of a value."""
    inputs = x.shape[-1]
    name = d.layer("fc", f"nn.Linear({arguments(inputs, out, bias=None if bias else False)})")
    draw_weights(d, name, out, inputs)

    def twin(draft: Draft, y: Value) -> Value | None:
        other = draft.layer("fc", f"nn.Linear({inputs}, {out})")
        draft.extras.append(f"self.{other}.weight = self.{name}.weight")
        return draft.call(other, y, (*y.shape[:-1], out))

    d.callable.append(
        Layer(
            name,
            lambda shape: (*shape[:-1], out) if shape[-1] == inputs else None,
            lambda shape: shape[-1] == inputs and len(shape) < 4,
            twin,
        )
    )
    return d.call(name, x, (*x.shape[:-1], out))


@block("again", 4)
def again(d: Draft) -> Value | None:
    """A layer that was called before, on another value or on its own output."""
    if not d.callable:
        return None
    layer = d.earlier(d.callable)
    x = d.source(lambda value: layer.gives(value.shape) is not None)
    shape = layer.gives(x.shape) if x is not None else None
    if x is None or shape is None or count(shape) > LARGEST:
        return None
    return d.call(layer.name, x, shape)


@block("tied", 3)
def tied(d: Draft) -> Value | None:
    """A layer that shares its weight with an earlier one."""
    found = [layer for layer in d.callable if layer.twin is not None]
    if not found:
        return None
    layer = d.earlier(found)
    x = d.source(lambda value: layer.twin_takes(value.shape))
    return layer.twin(d, x) if x is not None and layer.twin is not None else None
