"""Blocks that move numbers and compute none: views, permutations, parts, shuffles, and what changes nothing."""

from __future__ import annotations

from fxcompile.testing.blocks import block, is_map
from fxcompile.testing.drafting import Draft, Value


@block("flatten", 4)
def flatten(d: Draft) -> Value | None:
    """A map as one vector."""
    x = d.source(lambda value: value.dims > 0 and value.numel <= 200)
    if x is None:
        return None
    form = d.pick("form", ["{x}.flatten(1)", "torch.flatten({x}, 1)", "layer", "{x}.reshape({x}.shape[0], -1)",
                           "{x}.view({x}.size(0), -1)", "{x}.view(-1, {numel})"])  # fmt: skip
    if form == "layer":
        return d.call(d.layer("flat", "nn.Flatten()"), x, (x.numel,), view=True)
    if ".view(" in form and not is_contiguous(d, x):
        form = "{x}.reshape(-1, {numel})"
    return d.compute(form.format(x=x.name, numel=x.numel), (x.numel,), x)


def is_contiguous(d: Draft, x: Value) -> bool:
    """Whether a value is known to lie in memory in order, so that it can be viewed."""
    return d.alone(x) and not any(step.kind in ("permute", "attention") for step in d.steps)


@block("identity", 4)
def identity(d: Draft) -> Value | None:
    """What gives its input when the network is used: dropout, identities, reshapes to the same shape."""
    x = d.source(lambda value: True)
    if x is None:
        return None
    every = ", ".join(map(str, range(len(x.shape) + 1)))
    full = ", ".join([":"] * (len(x.shape) + 1))
    layers = ["nn.Dropout(0.5)", "nn.Identity()", "nn.Dropout(0.2, inplace=True)", "nn.AlphaDropout(0.1)",
              *([f"nn.Dropout{x.dims}d(0.3)"] if x.dims else [])]  # fmt: skip
    forms = ["F.dropout({x}, 0.5, self.training)", "{x}.contiguous()", "{x}.clone()", "{x}.reshape({x}.shape)",
             f"{{x}}.permute({every})", f"{{x}}[{full}]", "torch.cat([{x}], 1)", "{x}.to({x}.dtype)",
             "{x}.unsqueeze(1).squeeze(1)"]  # fmt: skip
    form = d.pick("form", layers + forms)
    if "inplace" in form and not d.alone(x):
        form = layers[0]
    if form in layers:
        return d.call(d.layer("drop" if "Drop" in form else "same", form), x, x.shape, view=True)
    return d.compute(form.format(x=x.name), x.shape, x)


@block("parts", 4)
def parts(d: Draft) -> list[Value] | Value | None:
    """Some channels of a value, or all of them in two parts."""
    x = d.source(lambda value: value.channels > 1)
    if x is None:
        return None
    c = x.channels
    forms = [*(["halves", "gate"] if c % 2 == 0 else []), "split", "first", "last", "every other", "one"]
    form = d.pick("form", forms)
    rest = x.shape[1:]
    if form == "split":
        left = d.pick("left", [1, c - 1])
        expression = d.pick(
            "spelling", ["torch.split({x}, [{left}, {right}], 1)", "{x}.split(({left}, {right}), dim=1)"]
        )
        named = expression.format(x=x.name, left=left, right=c - left)
        return d.several(named, [(left, *rest), (c - left, *rest)], x)
    if form == "halves":
        expression = d.pick("spelling", ["{x}.chunk(2, dim=1)", "torch.chunk({x}, 2, 1)", "{x}.split({half}, 1)"])
        return d.several(expression.format(x=x.name, half=c // 2), [(c // 2, *rest)] * 2, x)
    if form == "gate":
        spelled = d.pick("spelling", ["F.glu({x}, 1)", "layer"])
        if spelled == "layer":
            return d.call(d.layer("glu", "nn.GLU(1)"), x, (c // 2, *rest))
        return d.compute(spelled.format(x=x.name), (c // 2, *rest))
    if form == "one":
        return d.compute(f"{x.name}[:, {c - 1}:]", (1, *rest), x)
    if form == "every other":
        return d.compute(f"{x.name}[:, ::2]", ((c + 1) // 2, *rest), x)
    at = (c + 1) // 2
    if form == "first":
        expression = d.pick("spelling", [f"{x.name}[:, :{at}]", f"{x.name}.narrow(1, 0, {at})"])
        return d.compute(expression, (at, *rest), x)
    return d.compute(f"{x.name}[:, {at}:]", (c - at, *rest), x)


@block("swap", 1)
def swap(d: Draft) -> Value | None:
    """Two parts of the channels exchanged."""
    x = d.source(lambda value: value.channels > 1)
    if x is None:
        return None
    left = d.pick("left", [1, x.channels - 1])
    rest = x.shape[1:]
    a, b = d.several(f"{x.name}[:, :{left}], {x.name}[:, {left}:]", [(left, *rest), (x.channels - left, *rest)], x)
    return d.compute(f"torch.cat([{b.name}, {a.name}], 1)", x.shape)


@block("permute", 1)
def permute(d: Draft) -> Value | None:
    """Axes in another order; a transposed map is one of another shape."""
    x = d.source(lambda value: value.dims > 0)
    if x is None:
        return None
    order = list(range(1, len(x.shape) + 1))
    form = d.pick("form", ["swap last", "rotate", "back and forth"])
    if form == "swap last":
        order[-1], order[-2:-1] = order[-2] if len(order) > 1 else order[-1], [order[-1]]
        expression = d.pick("spelling", ["{x}.transpose(-1, -2)", "{x}.permute(0, {order})"])
    elif form == "rotate":
        order = [*order[1:], order[0]]
        expression = d.pick(
            "spelling", ["{x}.permute(0, {order})", "torch.permute({x}, (0, {order}))", "{x}.movedim(1, -1)"]
        )
    else:
        expression = "{x}.transpose(1, -1).contiguous().transpose(1, -1)"
    named = expression.format(x=x.name, order=", ".join(map(str, order)))
    return d.compute(named, tuple(x.shape[axis - 1] for axis in order), x)


@block("reshape", 2)
def reshape(d: Draft) -> Value | None:
    """The axes of a map as one, an axis more or one less."""
    x = d.source(is_map)
    if x is None:
        return None
    forms = ["pixels"] if x.dims > 1 else []
    forms += ["unsqueeze"] if x.dims < 3 else []
    forms += ["squeeze"] if 1 in x.sizes and x.dims > 1 else []
    form = d.pick("form", forms or ["pixels"])
    if form == "unsqueeze":
        return d.compute(f"{x.name}.unsqueeze(-1)", (*x.shape, 1), x)
    if form == "squeeze":
        axis = x.sizes.index(1) + 2
        return d.compute(f"{x.name}.squeeze({axis})", (*x.shape[: axis - 1], *x.shape[axis:]), x)
    pixels = x.numel // x.channels
    expression = d.pick("spelling", ["{x}.flatten(2)", "{x}.reshape({x}.size(0), {channels}, -1)"])
    return d.compute(expression.format(x=x.name, channels=x.channels), (x.channels, pixels), x)


@block("channel shuffle", 2)
def channel_shuffle(d: Draft) -> Value | None:
    """Channels of groups interleaved (ShuffleNet)."""
    x = d.source(lambda value: value.dims == 2 and value.channels in (4, 6, 8, 9))
    if x is None:
        return None
    groups = d.pick("groups", [g for g in (2, 3, 4) if x.channels % g == 0])
    spelling = d.pick("spelling", ["view", "layer", "flatten"])
    if spelling == "layer":
        return d.call(d.layer("shuffle", f"nn.ChannelShuffle({groups})"), x, x.shape)
    b, c, h, w = (d.name(prefix) for prefix in "bchw")
    d.statement(
        f"{b}, {c}, {h}, {w} = {x.name}.shape" if spelling == "view" else f"{b}, {c}, {h}, {w} = {x.name}.size()"
    )
    apart = d.compute(f"{x.name}.reshape({b}, {groups}, {c} // {groups}, {h}, {w}).transpose(1, 2)", x.shape, x)
    d.values.remove(apart)  # it has another shape, and is read by the next line alone
    end = f".contiguous().view({b}, -1, {h}, {w})" if spelling == "view" else ".flatten(1, 2)"
    return d.compute(f"{apart.name}{end}", x.shape)


@block("pixel shuffle", 2)
def pixel_shuffle(d: Draft) -> Value | None:
    """Channels as pixels of a larger map, or pixels as channels of a smaller one."""

    def up(value: Value) -> bool:
        return value.dims == 2 and value.channels % 4 == 0

    def down(value: Value) -> bool:
        return value.dims == 2 and all(n % 2 == 0 for n in value.sizes)

    x = d.source(lambda value: up(value) or down(value))
    if x is None:
        return None
    way = d.pick("way", [name for name, fits in (("up", up(x)), ("down", down(x))) if fits])
    layer, function = (
        ("nn.PixelShuffle(2)", "F.pixel_shuffle") if way == "up" else ("nn.PixelUnshuffle(2)", "F.pixel_unshuffle")
    )
    c, h, w = x.shape
    shape = (c // 4, 2 * h, 2 * w) if way == "up" else (4 * c, h // 2, w // 2)
    if d.pick("spelling", ["layer", "function"]) == "function":
        return d.compute(f"{function}({x.name}, 2)", shape)
    return d.call(d.layer("shuffle", layer), x, shape)
