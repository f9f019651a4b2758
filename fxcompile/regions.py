"""Sites as regions of a graph: what goes in, what they compute, and what their replacements compute on the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from fxcompile.program import fetch
from fxcompile.rewriting import Replacement, Site


def region_inputs(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes outside a region whose values it takes, in the order in which they appear."""
    inside = set(nodes)
    found: dict[fx.Node, None] = {}
    for node in nodes:
        for item in node.all_input_nodes:
            if item not in inside:
                found[item] = None
    return list(found)


def run_region(site: Site, inputs: Sequence[Tensor]) -> Tensor:
    """What a site computes on given inputs, with `site.layers` for its layers."""
    env: dict[fx.Node, Any] = dict(zip(region_inputs(site.nodes), inputs, strict=True))
    layers = iter(site.layers)
    value: Any = None
    for node in site.nodes:
        if node.op == "get_attr":
            owner = node.graph.owning_module
            assert owner is not None
            env[node] = fetch(owner, str(node.target))
            continue
        args = fx.node.map_arg(node.args, env.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
        function: Any = next(layers) if node.op == "call_module" else node.target
        value = env[node] = function(*args, **kwargs)
    assert isinstance(value, Tensor)
    return value


def run_replacement(replacement: Replacement, inputs: Sequence[Tensor]) -> Tensor:
    """What a replacement computes on the same inputs."""
    if isinstance(replacement, nn.Module):
        value = replacement(*inputs)
        assert isinstance(value, Tensor)
        return value
    current = inputs[0]
    for module in replacement:
        current = module(current)
    return current
