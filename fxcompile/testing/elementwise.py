"""Blocks that work number by number: activations in all their spellings, arithmetic, and adds of two branches."""

from __future__ import annotations

from fxcompile.testing.blocks import LARGEST, block
from fxcompile.testing.drafting import Draft, Value
from fxcompile.testing.norms import same_shape

ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "relu": ("nn.ReLU()", "F.relu({x})", "torch.relu({x})", "{x}.relu()", "nn.ReLU(inplace=True)", "{x}.relu_()"),
    "relu6": ("nn.ReLU6()", "F.relu6({x})", "nn.ReLU6(inplace=True)", "F.hardtanh({x}, 0, 6)"),
    "leaky relu": ("nn.LeakyReLU(0.1)", "F.leaky_relu({x}, 0.2)", "nn.LeakyReLU(0.1, inplace=True)"),
    "sigmoid": ("nn.Sigmoid()", "torch.sigmoid({x})", "{x}.sigmoid()", "{x}.sigmoid_()"),
    "tanh": ("nn.Tanh()", "torch.tanh({x})", "{x}.tanh()"),
    "silu": ("nn.SiLU()", "F.silu({x})", "{x} * torch.sigmoid({x})", "nn.SiLU(inplace=True)"),
    "gelu": ("nn.GELU()", "F.gelu({x})", "nn.GELU(approximate='tanh')"),
    "elu": ("nn.ELU()", "F.elu({x}, 0.5)", "F.elu_({x})"),
    "selu": ("nn.SELU()", "F.selu({x})"),
    "celu": ("nn.CELU(0.5)", "F.celu({x})"),
    "softplus": ("nn.Softplus()", "F.softplus({x})"),
    "softsign": ("nn.Softsign()", "F.softsign({x})"),
    "mish": ("nn.Mish()", "F.mish({x})"),
    "hardswish": ("nn.Hardswish()", "F.hardswish({x})", "nn.Hardswish(inplace=True)"),
    "hardsigmoid": ("nn.Hardsigmoid()", "F.hardsigmoid({x})"),
    "hardtanh": ("nn.Hardtanh()", "F.hardtanh({x}, -0.5, 2)", "{x}.clamp(-1, 1)", "nn.Hardtanh(inplace=True)"),
    "log sigmoid": ("nn.LogSigmoid()", "F.logsigmoid({x})"),
    "tanhshrink": ("nn.Tanhshrink()", "F.tanhshrink({x})"),
    "softshrink": ("nn.Softshrink()", "F.softshrink({x}, 0.1)"),
    "rrelu": ("nn.RReLU()", "F.rrelu({x})"),
    "softmax": ("nn.Softmax(1)", "F.softmax({x}, dim=1)", "{x}.softmax(1)", "torch.softmax({x}, -1)"),
    "log softmax": ("nn.LogSoftmax(1)", "F.log_softmax({x}, 1)"),
}
"""By name, what computes it; layers are written as their construction. In-place ones are known by their spelling."""


def works_in_place(spelling: str) -> bool:
    """Whether a spelling of an activation writes to its input."""
    return "inplace=True" in spelling or "_(" in spelling


@block("activation", 11)
def activation(d: Draft) -> Value | None:
    """An activation, as a layer, a function or a method, in place where nothing else shares the memory."""
    x = d.source(lambda value: True)
    if x is None:
        return None
    names = list(ACTIVATIONS)
    name = d.pick("function", ["relu"] * 5 + names)
    found = [item for item in ACTIVATIONS[name] if d.alone(x) or not works_in_place(item)]
    spelling = d.pick("spelling", found)
    view = x if works_in_place(spelling) else None
    if not spelling.startswith("nn."):
        return d.compute(spelling.format(x=x.name), x.shape, view)
    layer = d.layer("act", spelling)
    if view is not None:
        return d.call(layer, x, x.shape, view=True)
    return same_shape(d, layer, x, lambda shape: True)


@block("prelu", 2)
def prelu(d: Draft) -> Value | None:
    """A PReLU, with one slope or one for each channel."""
    x = d.source(lambda value: True)
    if x is None:
        return None
    slopes = d.pick("slopes", ["one", "each"])
    channels = x.channels if slopes == "each" else 1
    if d.pick("spelling", ["layer", "layer", "function"]) == "function":
        return d.compute(f"F.prelu({x.name}, {d.parameter('weight', (channels,))})", x.shape)
    layer = d.layer("act", f"nn.PReLU({channels if channels > 1 else ''})")
    return same_shape(d, layer, x, lambda shape: channels in (1, shape[0]))


SCALARS = (
    "{x} * 2", "{x} + 1", "{x} * 1", "{x} + 0", "{x} - 0.5", "1 - {x}", "-{x}", "{x} / 2", "{x}.mul(0.5)",
    "torch.abs({x})", "{x} ** 2", "{x}.square()", "torch.add({x}, {x}, alpha=0.5)", "2 * {x}", "{x} / 1", "{x}.neg()",
    "torch.where({x} > 0, {x}, 0.1 * {x})", "torch.maximum({x}, -{x})", "{x}.clamp(min=0)", "torch.exp(-{x}.abs())",
)  # fmt: skip


@block("arithmetic", 4)
def arithmetic(d: Draft) -> Value | None:
    """A value with a number, or with a tensor of the model for each channel."""
    x = d.source(lambda value: True)
    if x is None:
        return None
    form = d.pick("form", [*SCALARS, "scale", "shift", "offset", "in place"])
    if form == "in place":
        return d.overwrite(x, f"{x.name} *= 0.5") if d.alone(x) else None
    shape = (x.channels,) + (1,) * x.dims
    if form == "scale":
        return d.compute(f"{x.name} * {d.parameter('weight', shape)}", x.shape)
    if form == "shift":
        return d.compute(f"{x.name} + {d.parameter('bias', shape)}", x.shape)
    if form == "offset":
        return d.compute(f"{x.name} - {d.buffer('mean', shape)}", x.shape)
    return d.compute(form.format(x=x.name), x.shape)


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether a tensor of one shape can be added to one of the other, and gives the other's shape."""
    return len(shape) == len(to) and all(a in (1, b) for a, b in zip(shape, to, strict=True))


@block("add", 7)
def add(d: Draft) -> Value | None:
    """Two values as one: a residual add, a product, the larger of both."""
    x = d.source(lambda value: True)
    if x is None:
        return None
    y = d.source(lambda value: value is not x and broadcasts(value.shape, x.shape)) or x
    forms = ["{x} + {y}", "torch.add({x}, {y})", "{x}.add({y})", "{x} - {y}", "{x} * {y}", "torch.maximum({x}, {y})",
             "{x} + 0.5 * {y}", "torch.add({x}, {y}, alpha=2)", "{x} * torch.sigmoid({y})"]  # fmt: skip
    if d.alone(x) and x is not y:
        forms += ["+=", "add_"]
    form = d.pick("form", forms)
    if form == "+=":
        return d.overwrite(x, f"{x.name} += {y.name}")
    if form == "add_":
        return d.compute(f"{x.name}.add_({y.name})", x.shape, x)
    return d.compute(form.format(x=x.name, y=y.name), x.shape)


@block("concat", 5)
def concat(d: Draft) -> Value | None:
    """Two or three values behind each other, over the channels or along the map."""
    x = d.source(lambda value: True)
    if x is None:
        return None
    axis = d.pick("axis", ["channels", "channels", "channels", "map"])
    at = 0 if axis == "channels" or x.dims == 0 else x.dims

    def fits(value: Value) -> bool:
        same = len(value.shape) == len(x.shape)
        return same and all(a == b for i, (a, b) in enumerate(zip(value.shape, x.shape, strict=True)) if i != at)

    parts = [x] + [d.source(fits) or x for _ in range(d.pick("others", [1, 2, 0]))]
    shape = list(x.shape)
    shape[at] = sum(value.shape[at] for value in parts)
    if shape[at] * x.numel // x.shape[at] > LARGEST:
        return None
    names = ", ".join(value.name for value in parts)
    spelled = d.pick("spelling", [f"{at + 1}", f"dim={at + 1}", f"{at - len(x.shape)}"])
    return d.compute(f"torch.cat([{names}], {spelled})", tuple(shape))
