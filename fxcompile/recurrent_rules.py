"""Rules for recurrent layers: LSTM, GRU and RNN."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from fxcompile import spellings
from fxcompile.lowering import MODULE_RULES, Canonicaliser, rule
from fxcompile.raw_nodes import Call, is_traced_constant, operation_name


def module_recurrent(self: Canonicaliser, node: fx.Node, module: nn.RNNBase) -> Any:
    """A recurrent layer; it starts with zeros by itself."""
    inputs = node.args
    if len(inputs) > 1 and (inputs[1] is None or is_zero(self, inputs[1])):
        inputs = inputs[:1]
    return self.call_module_layer(node, module, inputs)


def lower_recurrent(self: Canonicaliser, call: Call) -> Any:
    """`aten.lstm` and kin: input, state, weights, has_biases, layers, dropout, train, bidirectional, batch_first."""
    if len(call.args) != 9 or not isinstance(call.args[2], (list, tuple)):
        return NotImplemented
    source, state, raw_weights, has_biases, layers, dropout, _, bidirectional, batch_first = call.args
    weights = [self.weight(item) for item in raw_weights]
    first, recurrent = weights[0], weights[1]
    if first is None or recurrent is None or any(weight is None for weight in weights):
        return NotImplemented
    gates = {"lstm": 4, "gru": 3}.get(call.name, 1)
    hidden = first.shape[0] // gates
    options: dict[str, Any] = {"bias": has_biases, "batch_first": batch_first, "dropout": dropout}
    if recurrent.shape[1] != hidden:
        options["proj_size"] = recurrent.shape[1]
    if call.name.startswith("rnn"):
        options["nonlinearity"] = call.name.removeprefix("rnn_")
    kind = {"lstm": nn.LSTM, "gru": nn.GRU}.get(call.name, nn.RNN)
    layer = kind(first.shape[1], hidden, layers, bidirectional=bidirectional, device="meta", **options)
    if len(layer._flat_weights_names) != len(weights):
        return NotImplemented
    for name, weight in zip(layer._flat_weights_names, weights, strict=True):
        assert weight is not None
        setattr(layer, name, weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False))
    inputs = (
        (source,) if is_zero(self, state) else (source, tuple(state) if isinstance(state, (list, tuple)) else state)
    )
    owner = str(raw_weights[0].target).rpartition(".")[0] if raw_weights[0].op == "get_attr" else ""
    scope = self.layer_name(call.node, None, kind.__name__)
    new = self.call_layer(scope or owner or None, layer, inputs, call.node)
    if call.name != "lstm":
        return new
    meta = call.node.meta.get("tensor_meta")
    if isinstance(meta, tuple):
        new.meta["tensor_meta"] = (meta[0], None)  # the layer gives the two states as one tuple
    states = self.make(operator.getitem, (new, 1), call.node)
    states.meta.pop("tensor_meta", None)
    places = ((new, 0), (states, 0), (states, 1))
    return tuple(_take(self, call.node, where, index) for index, where in enumerate(places))


def _take(self: Canonicaliser, node: fx.Node, where: tuple[fx.Node, int], index: int) -> fx.Node:
    new = self.make(operator.getitem, where, node)
    meta = node.meta.get("tensor_meta")
    if type(meta) is tuple:
        new.meta["tensor_meta"] = meta[index]
    return new


def is_zero(self: Canonicaliser, state: Any) -> bool:
    """Whether a recurrent layer's initial state is made of zeros, which is what it starts with if given none."""
    nodes = list(state) if isinstance(state, (list, tuple)) else [state]
    for node in nodes:
        while isinstance(node, fx.Node) and operation_name(node) in ("to", *spellings.IDENTITIES) and node.args:
            node = node.args[0]
        if not isinstance(node, fx.Node):
            return False
        held = self.constant(node)
        if operation_name(node) not in ("zeros", "new_zeros") and (
            held is None
            or isinstance(held, nn.Parameter)
            or bool(held.any())
            or not is_traced_constant(str(node.target))
        ):
            return False
    return True


def register() -> None:
    """Enter these rules."""
    MODULE_RULES.update(dict.fromkeys((nn.LSTM, nn.GRU, nn.RNN), module_recurrent))
    rule("lstm", "gru", "rnn_tanh", "rnn_relu")(lower_recurrent)
