"""How the channels of a layer's output go together with those of its input and with the entries of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx, nn

from fxcompile.channel_labels import Axes, Labelling, Role, Value, replaced, rigid
from fxcompile.layers import BATCH_NORMS, CONVOLUTIONS, INSTANCE_NORMS, TRANSPOSED
from fxcompile.program import shape_of

LayerRule = Callable[[Labelling, fx.Node, Any, Axes], Value]
"""(labels, the node, its layer, the axes of its first input) -> what is known of the output"""


def elementwise(labels: Labelling, node: fx.Node, layer: nn.Module, x: Axes) -> Value:
    return x


def convolution(labels: Labelling, node: fx.Node, layer: Any, x: Axes) -> Value:
    """Groups of few channels go as a whole, each with what it gives; of larger ones, the same channels of all."""
    owner = str(node.target)
    axis = len(x) - 1 - len(layer.kernel_size)
    for spatial in x[axis + 1 :]:
        labels.fix(spatial, f"'{owner}' slides over them")
    ins, outs = (0, 1) if isinstance(layer, TRANSPOSED) else (1, 0)
    groups = layer.groups
    into, out_of = layer.in_channels // groups, layer.out_channels // groups
    taken = x[axis]
    if groups == 1:
        labels.slot(owner, "weight", ins, taken, Role.INPUT)
        given = labels.outputs(owner, "weight", outs)
        labels.slot(owner, "bias", 0, given, Role.OUTPUT)
    elif groups > into:
        if taken is None:
            taken = labels.fresh(layer.in_channels)
            labels.fix(taken, f"'{owner}' takes channels that cannot go")
        each = labels.tied_over(taken.reshape(groups, into), 1)
        known = labels.groups.setdefault(owner, each)
        labels.tie(known, each)
        given = np.repeat(each, out_of)
        labels.slot(owner, "weight", 0, np.repeat(each, layer.weight.shape[0] // groups), Role.OWN)
        labels.slot(owner, "bias", 0, given, Role.OWN)
    else:
        inner = None if taken is None else labels.tied_over(taken.reshape(groups, into), 0)
        if ins == 1 or inner is None:
            labels.slot(owner, "weight", ins, inner, Role.INPUT)
        else:
            labels.slot(owner, "weight", ins, np.tile(inner, groups), Role.INPUT)
        whole = labels.outputs(owner, "weight", outs)
        given = np.tile(labels.tied_over(whole.reshape(groups, out_of), 0) if outs == 0 else whole, groups)
        labels.slot(owner, "bias", 0, given, Role.OUTPUT)
    return (*rigid(axis), given, *rigid(len(x) - axis - 1))


def linear(labels: Labelling, node: fx.Node, layer: nn.Linear, x: Axes) -> Value:
    owner = str(node.target)
    labels.slot(owner, "weight", 1, x[-1], Role.INPUT)
    given = labels.outputs(owner, "weight", 0)
    labels.slot(owner, "bias", 0, given, Role.OUTPUT)
    return (*x[:-1], given)


def embedding(labels: Labelling, node: fx.Node, layer: nn.Embedding, x: Axes) -> Value:
    labels.fix_all(x, f"'{node.target}' looks them up")
    return (*x, labels.outputs(str(node.target), "weight", 1))


def per_channel(labels: Labelling, node: fx.Node, layer: Any, x: Axes) -> Value:
    """Batch and instance norms, whose channels lie on the second axis, or the first of an input without batch."""
    owner = str(node.target)
    axis = 1
    if isinstance(layer, INSTANCE_NORMS):
        axis = len(x) - 1 - int(type(layer).__name__[-2])
    for other in (*x[:axis], *x[axis + 1 :]):
        labels.fix(other, f"'{owner}' takes statistics over them")
    names = [name for name in ("weight", "bias", "running_mean", "running_var") if getattr(layer, name) is not None]
    given = x[axis]
    for name in names:
        given = labels.slot(owner, name, 0, given, Role.OWN, f"'{owner}' takes channels that cannot go")
    return replaced(x, axis, given)


def group_norm(labels: Labelling, node: fx.Node, layer: nn.GroupNorm, x: Axes) -> Value:
    """Channels of a group go as a whole: statistics over some of them would be others."""
    owner, given = str(node.target), x[1]
    for other in x[2:]:
        labels.fix(other, f"'{owner}' takes statistics over them")
    if given is not None:
        each = labels.tied_over(given.reshape(layer.num_groups, -1), 1)
        labels.tie(labels.groups.setdefault(owner, each), each)
    for name in ("weight", "bias"):
        given = labels.slot(owner, name, 0, given, Role.OWN) if getattr(layer, name) is not None else given
    return replaced(x, 1, given)


def normalises_last(labels: Labelling, node: fx.Node, layer: Any, x: Axes) -> Value:
    """Layer and RMS norms: nothing can go of what they take statistics over."""
    start = len(x) - len(layer.normalized_shape)
    for axis in x[start:]:
        labels.fix(axis, f"'{node.target}' takes statistics over all of them")
    return x


def prelu(labels: Labelling, node: fx.Node, layer: nn.PReLU, x: Axes) -> Value:
    if layer.num_parameters == 1 or len(x) < 2:
        return x
    return replaced(x, 1, labels.slot(str(node.target), "weight", 0, x[1], Role.OWN))


def pool(labels: Labelling, node: fx.Node, layer: Any, x: Axes) -> Value:
    dims = int(type(layer).__name__[-2])
    for axis in x[-dims:]:
        labels.fix(axis, f"'{node.target}' slides over them")
    given = (*x[:-dims], *rigid(dims))
    return given if shape_of(node) is not None else [given, given]


def softmax(labels: Labelling, node: fx.Node, layer: Any, x: Axes) -> Value:
    axis = layer.dim if layer.dim is not None else 0 if len(x) in (0, 1, 3) else 1
    labels.fix(x[axis], f"'{node.target}' takes the softmax over them")
    return x


def glu(labels: Labelling, node: fx.Node, layer: nn.GLU, x: Axes) -> Value:
    axis = layer.dim % len(x)
    both = x[axis]
    if both is None:
        return x
    return replaced(x, axis, labels.tied_over(both.reshape(2, -1), 0))


def pixel_shuffle(labels: Labelling, node: fx.Node, layer: nn.PixelShuffle, x: Axes) -> Value:
    taken = x[-3]
    for axis in x[-2:]:
        labels.fix(axis, f"'{node.target}' spreads channels over them")
    given = None if taken is None else labels.tied_over(taken.reshape(-1, layer.upscale_factor**2), 1)
    return (*x[:-3], given, None, None)


def pixel_unshuffle(labels: Labelling, node: fx.Node, layer: nn.PixelUnshuffle, x: Axes) -> Value:
    taken = x[-3]
    for axis in x[-2:]:
        labels.fix(axis, f"'{node.target}' makes channels of them")
    return (*x[:-3], None if taken is None else np.repeat(taken, layer.downscale_factor**2), None, None)


def channel_shuffle(labels: Labelling, node: fx.Node, layer: nn.ChannelShuffle, x: Axes) -> Value:
    taken = x[1]
    if taken is None:
        return x
    return replaced(x, 1, np.repeat(labels.tied_over(taken.reshape(layer.groups, -1), 0), layer.groups))


def recurrent(labels: Labelling, node: fx.Node, layer: nn.RNNBase, x: Axes) -> Value:
    """Input features may go; what a recurrent layer hands to itself stays."""
    owner = str(node.target)
    for suffix in ("", "_reverse")[: 1 + layer.bidirectional]:
        labels.slot(owner, f"weight_ih_l0{suffix}", 1, x[-1], Role.INPUT)
    for state in node.all_input_nodes[1:]:
        labels.fix_all(labels.values.get(state), f"they are the state of '{owner}'")
    for axis in x[:-1]:
        labels.fix(axis, f"'{owner}' runs over them")
    return [rigid(len(x)), None]


LAYERS: dict[type[nn.Module], LayerRule] = {
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED), convolution),
    nn.Linear: linear,
    nn.Embedding: embedding,
    **dict.fromkeys((*BATCH_NORMS, *INSTANCE_NORMS), per_channel),
    nn.GroupNorm: group_norm,
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), normalises_last),
    nn.PReLU: prelu,
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU), elementwise),
    **dict.fromkeys((nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh), elementwise),
    **dict.fromkeys((nn.Softplus, nn.LogSigmoid, nn.Softshrink, nn.Hardshrink, nn.Threshold, nn.Identity), elementwise),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), elementwise),
    **dict.fromkeys((nn.AlphaDropout, nn.FeatureAlphaDropout), elementwise),
    **{getattr(nn, f"{kind}Pool{dims}d"): pool for kind in ("Avg", "Max") for dims in (1, 2, 3)},
    **{getattr(nn, f"Adaptive{kind}Pool{dims}d"): pool for kind in ("Avg", "Max") for dims in (1, 2, 3)},
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax), softmax),
    nn.GLU: glu,
    nn.PixelShuffle: pixel_shuffle,
    nn.PixelUnshuffle: pixel_unshuffle,
    nn.ChannelShuffle: channel_shuffle,
    **dict.fromkeys((nn.LSTM, nn.GRU, nn.RNN), recurrent),
}
"""The layers of canonical form."""
