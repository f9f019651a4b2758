"""Puts the orders in which channels are taken into the weights of the layers around."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompile.contracts import Exact
from fxcompile.labels import node_name
from fxcompile.layers import BATCH_NORMS, INSTANCE_NORMS, Reorder, holds_weights
from fxcompile.program import Program, fetch, shape_of
from fxcompile.rewriting import Pass, Site, Skip

from ._call import Call
from ._channels import carry
from ._reordering import in_order, reorder, with_inputs, with_outputs, within_groups
from .fold_batchnorm import LINEAR, channel_axis, in_channels, out_channels

Rule = Callable[[Any, int, int], bool]
"""(the layer, or the call's arguments after the input; axis of the channels; rank) -> whether it does the same to each
channel, by numbers of its own at most."""


def _always(what: Any, axis: int, rank: int) -> bool:
    return True


def _second(what: Any, axis: int, rank: int) -> bool:
    return axis == 1


def _maps(dims: int) -> Rule:
    return lambda what, axis, rank: axis < rank - dims


def _pad(args: Any, axis: int, rank: int) -> bool:
    return axis < rank - math.ceil(len(args[0]) / 2)


LAYERS: dict[type[nn.Module], Rule] = {
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SELU), _always),
    **dict.fromkeys((nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh), _always),
    **dict.fromkeys((nn.Softplus, nn.LogSigmoid, nn.Softshrink, nn.Hardshrink, nn.Threshold), _always),
    **dict.fromkeys((*BATCH_NORMS, *INSTANCE_NORMS, nn.PReLU), _second),
    **{getattr(nn, f"{kind}Pool{dims}d"): _maps(dims) for kind in ("Avg", "Max") for dims in (1, 2, 3)},
    **{getattr(nn, f"Adaptive{kind}Pool{dims}d"): _maps(dims) for kind in ("Avg", "Max") for dims in (1, 2, 3)},
}
FUNCTIONS: dict[Any, Rule] = {F.pad: _pad}
"""Beside what carries channels and leaves them on their axis."""


class AbsorbShuffles(Pass):
    """conv[O, C, ...] -> norm, activation, pool -> channels in the order p  =>  conv with outputs p, norm of p, ...
    channels in the order p -> norm, activation, pool -> conv[O, C, ...]  =>  norm of p^-1, ..., conv with inputs p^-1

    An order is a `nn.ChannelShuffle`, or an `index_select` of all channels, each once, as
    `group-shuffle(style=permuted)` and `split-kernels(arrangement=parallel, merge=concat)` leave them. It goes into the
    layer before it if that allows it, else into the one after it: a convolution, transposed or not, or a linear layer,
    also behind a flatten. What stands between treats all channels alike, by numbers of their own at most, which are put
    in order too: batch and instance norms, activations, pools and means, depthwise convolutions. A layer with groups
    takes orders that keep its groups together. An order stays where the value is used several times on the way, or a
    layer is called again or shares its weight. Of those that stay, one does for all between which there is nothing
    else.
    """

    name: ClassVar = "absorb-shuffles"
    contract: ClassVar = Exact()

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        """Each layer with the orders that go into it; with reasons, orders that stay."""
        search = _Search(program)
        found: list[tuple[fx.Node, Site | Skip]] = []
        for name, nodes in search.chains():
            found.append((nodes[0], Site.of(program, *nodes, name=name)))
        for node, reason in search.left.items():
            found.append((node, Skip.of(node, reason)))
        numbers = {node: number for number, node in enumerate(program.graph.nodes)}
        yield from (item for _, item in sorted(found, key=lambda pair: numbers[pair[0]]))

    def rewrite(self, site: Site) -> list[nn.Module]:
        """The layer and what stands around it, in the other order."""
        layers = iter(site.layers)
        nodes = [node for node in site.nodes if node.op != "get_attr"]
        chain: list[Any] = [next(layers) if node.op == "call_module" else Call.of(node) for node in nodes]
        orders = [order_of(layer, node) for layer, node in zip(chain, nodes, strict=True)]
        at = next((n for n, item in enumerate(chain) if isinstance(item, LINEAR) and not is_depthwise(item)), 0)
        if (first := orders[at]) is not None:
            chain[at], orders[at] = Reorder(first, axis_of(nodes[at])), None
        for index, order in enumerate(orders):
            if order is not None and index > at:
                chain[at] = with_outputs(chain[at], order)
                chain[at + 1 : index] = [in_order(item, order) for item in chain[at + 1 : index]]
        for index, order in reversed([*enumerate(orders)][:at]):
            if order is not None:
                back = order.argsort()
                for later in range(index + 1, at):
                    chain[later], back = in_order(chain[later], back), after(nodes[later], back)
                chain[at] = with_inputs(chain[at], back)
        kept = [item for item, order in zip(chain, orders, strict=True) if order is None]
        if isinstance(kept[0], Reorder):
            kept[:1] = reorder(kept[0].order, kept[0].axis)
        return kept


class _Search:
    """Decides for each order of a program which layer it goes into.

    Attributes:
        behind: by the node of a layer, the nodes from it (without it) to the last order after it; likewise by that of
            an order which goes into no layer, and into which others go.
        ahead: by the node of a layer, the nodes from the first order before it to it (without it).
        left: by the node of an order that stays, the reason.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.called, self.tied = program.calls(), program.tied()
        self.behind: dict[fx.Node, list[fx.Node]] = {}
        self.ahead: dict[fx.Node, list[fx.Node]] = {}
        self.left: dict[fx.Node, str] = {}
        self.going: set[fx.Node] = set()
        orders = [
            (node, order) for node in program.graph.nodes if (order := order_of(program.layer(node), node)) is not None
        ]
        waiting = [(node, order, reason) for node, order in orders if (reason := self.back(node, order))]
        self.going.clear()
        for node, order, before in reversed(waiting):
            reason = self.forth(node, order)
            if reason is not None:
                self.left[node] = f"it goes neither into what is before it ({before}) nor after it ({reason})"
        self.going.clear()
        for node, order in orders:
            if node in self.left and self.back(node, order) is None:
                del self.left[node]
        for node in self.behind:
            self.left.pop(node, None)

    def chains(self) -> Iterator[tuple[str, list[fx.Node]]]:
        """The name of each layer, and all nodes from the first order before it to the last after it."""
        for layer in dict.fromkeys([*self.behind, *self.ahead]):
            nodes = [*self.ahead.get(layer, ()), layer, *self.behind.get(layer, ())]
            yield node_name(layer), [item for node in nodes for item in (*self.constant(node), node)]

    def constant(self, node: fx.Node) -> list[fx.Node]:
        """The node of the tensor that an index_select takes its order from."""
        return [item for item in node.all_input_nodes[1:] if item.op == "get_attr"]

    def back(self, node: fx.Node, order: Tensor) -> str | None:
        """Put an order into the layer before it, or an order that stays; why it does not go there."""
        axis, nodes = axis_of(node), [node]
        while True:
            source = nodes[0].all_input_nodes[0]
            if len(source.users) > 1:
                return f"the output of '{node_name(source)}' is used {len(source.users)} times"
            layer = self.program.layer(source)
            if source in self.left and axis_of(source) == axis:
                reason = None
                break
            if isinstance(layer, LINEAR) and not is_depthwise(layer):
                reason = self.unfit(source, layer, source, axis, order, out_channels(layer))
                break
            if source not in self.going and not self.carries(source, axis):
                return f"'{node_name(source)}' is no layer that takes it"
            nodes.insert(0, source)
        if reason is None:
            self.behind[source] = nodes
            self.going.add(node)
        return reason

    def forth(self, node: fx.Node, order: Tensor) -> str | None:
        """Put an order into the layer after it; why it does not go there."""
        axis, nodes = axis_of(node), [node]
        while True:
            if len(nodes[-1].users) != 1:
                return f"the output of '{node_name(nodes[-1])}' is used {len(nodes[-1].users)} times"
            target = next(iter(nodes[-1].users))
            layer = self.program.layer(target)
            if isinstance(layer, LINEAR) and not is_depthwise(layer):
                break
            flat = is_flatten(target, axis)
            if target not in self.going and not flat and not self.carries(target, axis):
                return f"'{node_name(target)}' is no layer that takes it"
            order = after(target, order)
            nodes.append(target)
        reason = self.unfit(target, layer, nodes[-1], axis, order, in_channels(layer))
        if reason is None:
            self.ahead[target] = nodes  # longer than those of orders that follow, which were put there before
            self.going.add(node)
        return reason

    def carries(self, node: fx.Node, axis: int) -> bool:
        """Whether a node does the same to each channel, by numbers of its own at most, which may be changed."""
        layer = self.program.layer(node)
        if len(node.all_input_nodes) != 1 or (layer is not None and (node.kwargs or len(node.args) != 1)):
            return False
        shape = shape_of(node.all_input_nodes[0]) or ()
        rank = len(shape)
        if carry(self.program, node, axis) == axis:
            return (shape_of(node) or ())[axis] == shape[axis]  # a flatten gives several for each
        if layer is None:
            rule = FUNCTIONS.get(node.target)
            return rule is not None and rule(node.args[1:], axis, rank)
        if is_depthwise(layer):
            return axis == channel_axis(layer, node) and self.shared(node, layer) is None
        rule = LAYERS.get(type(layer))
        return rule is not None and rule(layer, axis, rank) and self.shared(node, layer) is None

    def unfit(self, node: fx.Node, layer: Any, value: fx.Node, axis: int, order: Tensor, channels: int) -> str | None:
        """Why an order of the channels of a value, which are on this axis, does not go into a layer; or None."""
        if channel_axis(layer, value) != axis or channels != len(order):
            return f"'{node_name(node)}' has its channels on another axis"
        if within_groups(order, getattr(layer, "groups", 1)) is None:
            return f"the groups of '{node_name(node)}' would be mixed"
        return self.shared(node, layer)

    def shared(self, node: fx.Node, layer: nn.Module) -> str | None:
        """Why a layer's weights must not change for this call alone, or None."""
        if not holds_weights(layer):
            return None
        if len(self.called[id(layer)]) > 1:
            return f"'{node.target}' is called {len(self.called[id(layer)])} times"
        if len(node.args) != 1 or node.kwargs:
            return f"'{node.target}' is called with an output size"
        return f"'{node.target}' shares its weight" if self.program.tied_to(node, self.tied) else None


def order_of(layer: nn.Module | None, node: fx.Node) -> Tensor | None:
    """The order in which a node takes channels, if it takes each of them once; it gives channel order[i] as i."""
    if type(layer) is nn.ChannelShuffle:
        count = (shape_of(node) or (0, 0))[1]
        return torch.arange(count).reshape(layer.groups, -1).T.flatten()
    if node.target is not torch.index_select or node.kwargs:
        return None
    arguments: Any = node.args
    x, axis, index = arguments
    if not isinstance(index, fx.Node) or index.op != "get_attr" or len(index.users) > 1 or not isinstance(axis, int):
        return None
    assert node.graph.owning_module is not None
    order: Tensor = fetch(node.graph.owning_module, str(index.target)).detach().long()
    whole = torch.arange((shape_of(x) or ())[axis])
    return order if order.shape == whole.shape and torch.equal(order.sort().values, whole) else None


def axis_of(node: fx.Node) -> int:
    """The axis of the channels of which a node takes some order."""
    if node.op == "call_module":
        return 1
    axis, rank = node.args[1], len(shape_of(node) or ())
    assert isinstance(axis, int)
    return axis % rank


def is_depthwise(layer: Any) -> bool:
    """Whether each channel has a kernel of its own."""
    return isinstance(layer, LINEAR) and 1 < getattr(layer, "groups", 1) == in_channels(layer) == out_channels(layer)


def is_flatten(node: fx.Node, axis: int) -> bool:
    """Whether a node makes the pixels of each channel of axis 1 channels of their own."""
    rank = len(shape_of(node.all_input_nodes[0]) or ())
    return node.target is torch.flatten and axis == 1 and node.args[1:] in ((1, -1), (1, rank - 1))


def after(node: fx.Node, order: Tensor) -> Tensor:
    """An order of channels behind a node."""
    pixels = (shape_of(node) or (0, 0))[1] // len(order) if is_flatten(node, 1) else 1
    return (order.unsqueeze(1) * pixels + torch.arange(pixels)).flatten()
