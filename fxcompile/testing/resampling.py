"""Blocks that change the size of a map: pools, padding, interpolation."""

from __future__ import annotations

from typing import Any

from fxcompile.testing.blocks import LARGEST, block, count, is_map, per_axis, reach
from fxcompile.testing.drafting import Draft, Text, Value, arguments, size


def pooled(n: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> int:
    """The size that a pool gives, as torch computes it: with ceil mode, no window starts in the padding at the end."""
    room = n + 2 * padding - (dilation * (kernel - 1) + 1)
    made = (room + (stride - 1 if ceil else 0)) // stride + 1
    return made - 1 if ceil and (made - 1) * stride >= n + padding else made


@block("pool", 4)
def pool(d: Draft) -> Value | None:
    """A max or average pool with any options."""
    x = d.source(is_map)
    if x is None:
        return None
    kind = d.pick("kind", ["Max", "Avg"])
    kernel = per_axis(d, "kernel", x.dims, [2, 3, 1])
    step_by = d.pick("stride", [None, 1, 2])
    stride = kernel if step_by is None else (step_by,) * x.dims
    step = d.pick("dilation", [1, 1, 2] if kind == "Max" else [1])
    span = reach(kernel, (step,) * x.dims)
    paddings = [p for p in (0, 1) if all(2 * p <= k for k in kernel)]
    padding = d.pick("padding", paddings)
    ceil = d.pick("ceil mode", [False, True])
    own = 0 if step > 1 or (kind == "Avg" and x.dims == 3) else 2 * padding  # a window of padding alone has no maximum
    if any(n + own < k for n, k in zip(x.sizes, span, strict=True)):
        return None
    sizes = tuple(pooled(n, k, s, padding, step, ceil) for n, k, s in zip(x.sizes, kernel, stride, strict=True))
    if min(sizes) < 1:
        return None
    named: dict[str, Any] = {
        "stride": step_by, "padding": padding or None,
        "dilation": step if step > 1 else None, "ceil_mode": ceil or None,
    }  # fmt: skip
    if kind == "Avg":
        named["count_include_pad"] = d.pick("count padding", [None, False])
        named["divisor_override"] = d.pick("divisor", [None, None, None, 2]) if x.dims > 1 else None
    if d.pick("spelling", ["layer", "layer", "function"]) == "function":
        name = f"F.{kind.lower()}_pool{x.dims}d"
        return d.compute(f"{name}({arguments(x.name, size(kernel), **named)})", (x.channels, *sizes))
    layer = d.layer("pool", f"nn.{kind}Pool{x.dims}d({arguments(size(kernel), **named)})")
    return d.call(layer, x, (x.channels, *sizes))


@block("adaptive pool", 2)
def adaptive_pool(d: Draft) -> Value | None:
    """A pool to a given size: 1, a few, or the size that the map has."""
    x = d.source(is_map)
    if x is None:
        return None
    kind = d.pick("kind", ["Avg", "Max"])
    wanted = d.pick("size", ["1", "2", "3", "same", "last axis"])
    sizes = (int(wanted),) * x.dims if wanted.isdigit() else x.sizes
    spelled = size(sizes)
    if wanted == "last axis":
        sizes = (*x.sizes[:-1], 2)
        spelled = f"({'None, ' * (x.dims - 1)}2)" if x.dims > 1 else "2"
    if count((x.channels, *sizes)) > LARGEST:
        return None
    if d.pick("spelling", ["layer", "function"]) == "function":
        name = f"F.adaptive_{kind.lower()}_pool{x.dims}d"
        return d.compute(f"{name}({x.name}, {spelled})", (x.channels, *sizes))
    return d.call(d.layer("pool", f"nn.Adaptive{kind}Pool{x.dims}d({spelled})"), x, (x.channels, *sizes))


@block("global pool", 3)
def global_pool(d: Draft) -> Value | None:
    """One number for each channel of a map, the axes kept or not."""
    x = d.source(is_map)
    if x is None:
        return None
    axes = tuple(range(2, x.dims + 2))
    last = tuple(range(-x.dims, 0))
    forms = {
        "{x}.mean({axes})": (), "torch.mean({x}, dim={last})": (), "{x}.mean({axes}, keepdim=True)": (1,) * x.dims,
        "{x}.amax({axes})": (), "F.adaptive_avg_pool{dims}d({x}, 1).flatten(1)": (),
        "F.adaptive_max_pool{dims}d({x}, 1)": (1,) * x.dims, "{x}.flatten(2).mean(-1)": (), "{x}.sum({axes})": (),
    }  # fmt: skip
    form = d.pick("form", list(forms))
    return d.compute(form.format(x=x.name, axes=axes, last=last, dims=x.dims), (x.channels, *forms[form]))


@block("pad", 3)
def pad(d: Draft) -> Value | None:
    """Padding, the same on all sides or not: zeros, another constant, or the map itself; a negative one crops."""
    x = d.source(is_map)
    if x is None:
        return None
    forms = {"one": [1, 1], "before": [1, 0], "after": [0, 1], "uneven": [2, 1], "none": [0, 0], "crop": [-1, 0]}
    sides = forms[d.pick("sides", list(forms))]
    amounts = sides * x.dims
    if d.pick("last axis only", [False, False, True]):
        amounts = sides + [0, 0] * (x.dims - 1)
    sizes = [n + amounts[2 * (x.dims - 1 - i)] + amounts[2 * (x.dims - 1 - i) + 1] for i, n in enumerate(x.sizes)]
    modes = ["constant", "constant", "value"]
    if min(amounts) >= 0:
        modes += ["replicate"] + ["circular"] * (min(x.sizes) >= max(amounts))
        modes += ["reflect"] * (min(x.sizes) > max(amounts))
    mode = d.pick("mode", modes)
    if min(sizes) < 1 or count((x.channels, *sizes)) > LARGEST:
        return None
    shape = (x.channels, *sizes)
    if d.pick("spelling", ["function", "layer"]) == "function":
        extra = {"value": "value=0.5", "constant": ""}.get(mode, f"mode={mode!r}")
        return d.compute(f"F.pad({', '.join([x.name, str(tuple(amounts)), *([extra] if extra else [])])})", shape)
    kinds = {"constant": "Zero", "value": "Constant", "replicate": "Replication", "circular": "Circular",
             "reflect": "Reflection"}  # fmt: skip
    value = ["0.5"] if mode == "value" else []
    spelled = [str(amounts[0])] if len(set(amounts)) == 1 else [str(tuple(amounts))]
    return d.call(d.layer("pad", f"nn.{kinds[mode]}Pad{x.dims}d({', '.join(spelled + value)})"), x, shape)


@block("interpolate", 3)
def interpolate(d: Draft) -> Value | None:
    """A map at another size, by a factor or to a size."""
    x = d.source(is_map)
    if x is None:
        return None
    smooth = {1: "linear", 2: "bilinear", 3: "trilinear"}[x.dims]
    mode = d.pick("mode", ["nearest", smooth, "nearest-exact", "area", *(["bicubic"] if x.dims == 2 else [])])
    how = d.pick("how", ["double", "size", "half", "one and a half", "same"])
    factor = {"double": 2, "half": 0.5, "one and a half": 1.5, "same": 1}.get(how)
    sizes = tuple(int(n * factor) if factor else n + 1 for n in x.sizes)
    corners = d.pick("corners", [None, True]) if mode in (smooth, "bicubic") else None
    if min(sizes) < 1 or count((x.channels, *sizes)) > LARGEST:
        return None
    spelled: dict[str, Any] = {"scale_factor": factor} if factor else {"size": Text(size(sizes))}
    spelled |= {"mode": None if mode == "nearest" else mode, "align_corners": corners}
    shape = (x.channels, *sizes)
    if d.pick("spelling", ["function", "layer"]) == "function" or mode == "area":
        return d.compute(f"F.interpolate({arguments(x.name, **spelled)})", shape)
    return d.call(d.layer("resize", f"nn.Upsample({arguments(**spelled)})"), x, shape)
