"""Blocks of several layers, as networks have them."""

from __future__ import annotations

from fxcompile.testing.blocks import LARGEST, Kernel, block, is_map, place_convolution, place_linear
from fxcompile.testing.drafting import Draft, Value


@block("residual", 4)
def residual(d: Draft) -> Value | None:
    """A convolution that keeps the map, added to what it took."""
    x = d.source(is_map)
    if x is None:
        return None
    dims = x.dims
    side = d.pick("kernel", [1, 3, 5])
    dilation = d.pick("dilation", [1, 1, 2])
    options = Kernel((side,) * dims, (1,) * dims, (dilation * (side // 2),) * dims, (dilation,) * dims, "zeros")
    inner = place_convolution(d, x, options, x.channels, 1, d.pick("bias", [False, True]))
    if inner is None:
        return None
    form = d.pick("form", ["{x} + {y}", "{y} + {x}", "F.relu({x} + {y})", "+=", "torch.add({y}, {x})"])
    if form == "+=":
        return d.overwrite(inner, f"{inner.name} += {x.name}")
    return d.compute(form.format(x=x.name, y=inner.name), x.shape)


@block("squeeze and excitation", 2)
def squeeze_excitation(d: Draft) -> Value | None:
    """A gate for each channel from the mean of its map (Hu et al. 2018)."""
    x = d.source(lambda value: value.dims == 2)
    if x is None:
        return None
    c, inner = x.channels, max(x.channels // 2, 1)
    gate = d.pick("gate", ["torch.sigmoid({s})", "F.hardsigmoid({s})", "{s}.sigmoid()"])
    if d.pick("spelling", ["convolutions", "linear"]) == "linear":
        first, second = d.layer("fc", f"nn.Linear({c}, {inner})"), d.layer("fc", f"nn.Linear({inner}, {c})")
        s = d.compute(f"{x.name}.mean((2, 3))", (c,))
        s = d.compute(f"F.relu(self.{first}({s.name}))", (inner,))
        s = d.call(second, s, (c,))
        return d.compute(f"{x.name} * {gate.format(s=s.name)}[:, :, None, None]", x.shape)
    pool = d.layer("pool", "nn.AdaptiveAvgPool2d(1)")
    first, second = d.layer("conv", f"nn.Conv2d({c}, {inner}, 1)"), d.layer("conv", f"nn.Conv2d({inner}, {c}, 1)")
    s = d.call(pool, x, (c, 1, 1))
    s = d.compute(f"F.relu(self.{first}({s.name}))", (inner, 1, 1))
    s = d.call(second, s, (c, 1, 1))
    return d.compute(f"{x.name} * {gate.format(s=s.name)}", x.shape)


@block("separable", 3)
def separable(d: Draft) -> Value | None:
    """A depthwise convolution, and one of 1x1 after it (Howard et al. 2017)."""
    x = d.source(lambda value: is_map(value) and value.channels > 1)
    if x is None:
        return None
    dims = x.dims
    stride = d.pick("stride", [1, 2])
    wide = Kernel((3,) * dims, (stride,) * dims, (1,) * dims, (1,) * dims, "zeros")
    y = place_convolution(d, x, wide, x.channels, x.channels, d.pick("bias", [False, True]))
    narrow = Kernel((1,) * dims, (1,) * dims, (0,) * dims, (1,) * dims, "zeros")
    return None if y is None else place_convolution(d, y, narrow, d.pick("filters", [2, 1, 3]), 1, False)


@block("head", 3)
def head(d: Draft) -> Value | None:
    """A map as a vector, by flattening or its means, and a linear layer on it."""
    x = d.source(lambda value: is_map(value) and value.numel <= 200)
    if x is None:
        return None
    forms = {"{x}.flatten(1)": x.numel, "{x}.mean({axes})": x.channels, "torch.flatten({x}, 1)": x.numel,
             "F.adaptive_avg_pool{dims}d({x}, 1).flatten(1)": x.channels}  # fmt: skip
    form = d.pick("form", list(forms))
    named = form.format(x=x.name, axes=tuple(range(2, x.dims + 2)), dims=x.dims)
    vector = d.compute(named, (forms[form],), x)
    return place_linear(d, vector, d.pick("features", [1, 2, 3]), d.pick("bias", [False, True]))


@block("attention", 1)
def attention(d: Draft) -> Value | None:
    """Every pixel as a mean of all, by their products (Wang et al. 2018)."""
    x = d.source(lambda value: value.dims in (1, 2) and (value.numel // value.channels) ** 2 <= LARGEST)
    if x is None:
        return None
    flat = x if x.dims == 1 else d.compute(f"{x.name}.flatten(2)", (x.channels, x.numel // x.channels), x)
    pixels = flat.sizes[0]
    spelling = d.pick("spelling", ["torch.softmax(torch.matmul({x}.transpose(1, 2), {x}), -1)",
                                   "({x}.transpose(1, 2) @ {x}).softmax(-1)"])  # fmt: skip
    weights = d.compute(spelling.format(x=flat.name), (pixels, pixels))
    return d.compute(f"torch.bmm({flat.name}, {weights.name})", flat.shape)
