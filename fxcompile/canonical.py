"""Brings a raw functional graph to the one spelling that passes match.

The raw graph may come from `torch.fx.symbolic_trace` (functions, methods, the model's own layers) or from
`torch.export` (`aten` operators and bare weights). Each raw node is read as an operation's name with its arguments,
and written again by the first rule for that name that applies: layers with weights, activations, pools and dropouts
as `call_module`; everything else as `call_function` with one target for each operation and its arguments in one form.
Then what depends on the sizes of the inputs is spelled in one way, too.
"""

from __future__ import annotations

from torch import fx, nn

from fxcompile import function_rules, layer_rules, recurrent_rules, scatter_rules
from fxcompile.lowering import Canonicaliser, NoSpelling
from fxcompile.sizes import record_missing_shapes, settle

__all__ = ["NoSpelling", "canonicalise"]

function_rules.register()
layer_rules.register()
recurrent_rules.register()
scatter_rules.register()


def canonicalise(raw: fx.GraphModule, root: nn.Module) -> fx.GraphModule:
    """A new graph module in canonical form.

    Args:
        raw: a functional graph whose nodes carry shapes and plain values (`make_functional`).
        root: the module that the raw graph's `get_attr` and `call_module` targets are paths in.

    Raises:
        NoSpelling: the graph has an operation that canonical form cannot express.
    """
    graph, layers = Canonicaliser(raw, root).run()
    settle(graph, layers)
    record_missing_shapes(graph, layers)
    graph.lint()
    return fx.GraphModule(layers, graph, class_name=type(root).__name__).eval()
