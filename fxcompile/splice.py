"""The only place that edits a graph: puts a replacement where a site was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxcompile.canonical import canonicalise
from fxcompile.errors import RewriteError, one_line
from fxcompile.functional import make_functional
from fxcompile.layers import PLAIN, converted, holds_weights, on_meta
from fxcompile.program import (
    FEATURE,
    ORIGIN,
    PART,
    Program,
    dtype_of,
    fetch,
    output_node,
    propagate_shapes,
    record_shape,
    shape_of,
)
from fxcompile.regions import region_inputs
from fxcompile.rewriting import Replacement, Site
from fxcompile.spellings import STATELESS
from fxcompile.trees import drop_dead_code, is_free, outside_of_layers, place

_LAYERS = {*PLAIN, *(kind for kind, _ in STATELESS.values())}


@dataclass(frozen=True)
class Fragment:
    """A replacement as a piece of canonical graph with shapes, not yet in the program.

    Attributes:
        root: holds the new layers, by the targets of the graph's nodes.
        graph: placeholders for the site's inputs, the new nodes, one output.
    """

    root: nn.Module
    graph: fx.Graph

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes that will be new in the program."""
        return [node for node in self.graph.nodes if node.op not in ("placeholder", "output")]

    def for_caller(self, site: Site, region: Sequence[fx.Node]) -> Fragment:
        """The fragment with the shapes that it has at another call of the site's layer, which may take a larger map.

        Raises:
            RewriteError: it does not give there what the layer gives.
        """
        inputs = region_inputs(region)
        holes = [node for node in self.graph.nodes if node.op == "placeholder"]
        if all(shape_of(hole) == shape_of(node) for hole, node in zip(holes, inputs, strict=True)):
            return self
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.graph, copies))
        sized = Fragment(self.root, graph)
        module = fx.GraphModule(converted(self.root, on_meta), graph)
        tensors = [torch.empty(shape_of(node) or (), dtype=dtype_of(node), device="meta") for node in inputs]
        try:
            propagate_shapes(module, tensors)
        except RuntimeError as error:
            raise misfit(
                site, f"does not take what the layer takes at '{region[0].name}': {one_line(error)}"
            ) from error
        check_same_output(site, region[-1], sized)
        return sized

    def paths(self, site: Site) -> dict[str, str]:
        """Where each layer and tensor of the fragment is to be stored in the program, by its target here.

        A layer that the site has already keeps its name. The only layer with weights takes the site's, so that a folded
        layer's tensors are still found under the name they had, and what else is new stands beside it; several go under
        the site's name.
        """
        targets = dict.fromkeys(str(node.target) for node in self.nodes if node.op in ("call_module", "get_attr"))
        held = {target: fetch(self.root, target) for target in targets}
        old = {str(node.target): layer for node, layer in site.calls()}
        paths: dict[str, str] = {}
        for target, what in held.items():
            name = next((name for name, layer in old.items() if same_layer(what, layer)), None)
            if name is not None:
                paths[target] = name
                del old[name]
        new = [target for target in targets if target not in paths]
        weighted = [target for target in new if holds_weights(held[target])]
        heirs = weighted if len(weighted) == 1 else new if len(new) == 1 else []
        for target in new:
            paths[target] = site.name if target in heirs else f"{site.name}{'_' if heirs else '.'}{target}"
        return paths


def same_layer(what: object, layer: nn.Module) -> bool:
    """Whether something of a fragment is a layer of the site: itself, or one without weights that does the same."""
    if what is layer:
        return True
    return type(what) is type(layer) and not holds_weights(layer) and repr(what) == repr(layer)


def fragment_of(site: Site, replacement: Replacement) -> Fragment:
    """A replacement as a graph, its shapes computed from those of the site's inputs.

    Raises:
        RewriteError: it takes another number of inputs, or inputs of another shape.
    """
    inputs = region_inputs(site.nodes)
    modules = [replacement] if isinstance(replacement, nn.Module) else list(replacement)
    if len(inputs) != 1 and not isinstance(replacement, nn.Module):
        raise RewriteError(
            f"the site has {len(inputs)} inputs and its replacement takes one",
            place=f"layer '{site.name}'",
            mend="return one module whose forward takes them all",
        )
    try:
        if all(type(module) in _LAYERS for module in modules):
            return _chain_fragment(inputs, modules)
        return _traced_fragment(inputs, modules[0] if len(modules) == 1 else nn.Sequential(*modules))
    except RuntimeError as error:
        raise misfit(site, f"does not take what the site takes: {one_line(error)}") from error


def _chain_fragment(inputs: Sequence[fx.Node], modules: Sequence[nn.Module]) -> Fragment:
    """Plain layers one after the other; shapes come from running them on the meta device."""
    root, graph = nn.Module(), fx.Graph()
    current = graph.placeholder("x")
    value = torch.empty(shape_of(inputs[0]) or (), dtype=dtype_of(inputs[0]), device="meta")
    record_shape(current, value)
    for index, module in enumerate(modules):
        with torch.no_grad():
            value = converted(module, on_meta)(value)
        root.add_module(str(index), module)
        current = graph.call_module(str(index), (current,))
        record_shape(current, value)
    graph.output(current)
    return Fragment(root, graph)


def _traced_fragment(inputs: Sequence[fx.Node], module: nn.Module) -> Fragment:
    """Any module, traced like a model on zeros of the site's shapes."""
    zeros = tuple(torch.zeros(shape_of(node) or (), dtype=dtype_of(node)) for node in inputs)
    raw = fx.symbolic_trace(module)
    make_functional(raw, zeros)
    canonical = canonicalise(raw, raw)
    return Fragment(canonical, canonical.graph)


class Splicer:
    """Edits one program. Made once for a pass, so that looking up who calls a layer stays cheap."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.calls: dict[str, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if node.op == "call_module":
                self.calls.setdefault(str(node.target), []).append(node)

    def obstacle(self, site: Site) -> str | None:
        """Why a site cannot be replaced as one, or None."""
        if any(node._erased for node in site.nodes):
            return "an earlier site took part of it"
        if len(site.nodes) == 1:
            return None
        for node in site.nodes:
            weights = self.program.layer(node)
            if holds_weights(weights) and len(self.calls[str(node.target)]) > 1:
                return f"layer '{node.target}' is called {len(self.calls[str(node.target)])} times"
        inside = set(site.nodes)
        for node in site.nodes[:-1]:
            if any(user not in inside for user in node.users):
                return f"the value of '{node.target}' is used elsewhere too"
        return None

    def replace(self, site: Site, fragment: Fragment) -> list[fx.Node]:
        """Put a fragment in the site's place, at every call of a site of one layer; returns the new nodes.

        Raises:
            RewriteError: the fragment gives another shape or dtype than the site.
        """
        check_same_output(site, site.nodes[-1], fragment)
        regions: list[tuple[fx.Node, ...]] = [(node,) for node in self._callers(site)] or [site.nodes]
        fragments = [fragment.for_caller(site, region) for region in regions]
        gone = {node for region in regions for node in region}
        for target in {str(node.target) for node in gone if node.op == "call_module"}:
            self.calls[target] = [node for node in self.calls[target] if node not in gone]
            if not self.calls[target]:
                self.program.module.delete_submodule(target)
        names = self._place(site, fragment)
        made: list[fx.Node] = []
        for region, sized in zip(regions, fragments, strict=True):
            made += self._inline(region, sized, names)
        return made

    def _callers(self, site: Site) -> list[fx.Node]:
        """All calls of a layer with weights, which is rewritten once for all of them; none for other sites."""
        held = len(site.nodes) == 1 and any(map(holds_weights, site.layers))
        return list(self.calls[str(site.node.target)]) if held else []

    def _place(self, site: Site, fragment: Fragment) -> dict[str, str]:
        """Store the fragment's layers and tensors in the program; returns their names there."""
        names: dict[str, str] = {}
        root = self.program.module
        for target, path in fragment.paths(site).items():
            name = wanted = outside_of_layers(root, path)
            count = 0
            while not is_free(root, name):
                count += 1
                name = f"{wanted}_{count}"
            names[target] = name
            place(root, name, fetch(fragment.root, target))
        return names

    def _inline(self, region: Sequence[fx.Node], fragment: Fragment, names: dict[str, str]) -> list[fx.Node]:
        graph, last = self.program.graph, region[-1]
        waiting = region_inputs(region)
        mapping: dict[fx.Node, fx.Node] = {}
        made: list[fx.Node] = []
        position = last
        for node in fragment.graph.nodes:
            if node.op == "placeholder":
                mapping[node] = waiting.pop(0)
            elif node.op != "output":
                with graph.inserting_after(position):
                    position = mapping[node] = graph.node_copy(node, lambda item: mapping[item])
                if node.op in ("call_module", "get_attr"):
                    position.target = names[str(node.target)]
                    self.calls.setdefault(position.target, []).append(position)
                made.append(position)
        result = mapping[output_node(fragment.graph).args[0]]  # type: ignore[index]
        origin = tuple(dict.fromkeys(name for node in region for name in node.meta.get(ORIGIN, ())))
        for node in made:
            node.meta[ORIGIN] = origin
            node.meta.pop(FEATURE, None)
            node.meta.pop(PART, None)
        if made and FEATURE in last.meta:
            result.meta[FEATURE] = last.meta[FEATURE]
            if PART in last.meta:
                result.meta[PART] = last.meta[PART]
        last.replace_all_uses_with(result)
        for node in reversed(region):
            graph.erase_node(node)
        return made


def check_same_output(site: Site, old: fx.Node, fragment: Fragment) -> None:
    """Raises RewriteError unless the fragment gives the old node's shape and dtype: `graph.lint` accepts any."""
    new = output_node(fragment.graph).args[0]
    if not isinstance(new, fx.Node):
        raise misfit(site, "does not return one tensor")
    if shape_of(old) != shape_of(new) or dtype_of(old) != dtype_of(new):
        where = "" if old is site.nodes[-1] else f" at '{old.name}'"
        raise misfit(
            site, f"gives {shape_of(new)} {dtype_of(new)}, and the site {shape_of(old)} {dtype_of(old)}{where}"
        )


def misfit(site: Site, what: str) -> RewriteError:
    """The error for a replacement that cannot take its site's place."""
    return RewriteError(f"its replacement {what}", place=f"layer '{site.name}'", mend="this is a bug of the pass")


def finish(program: Program) -> None:
    """After the edits of a pass: drop what nothing uses any more, check the graph, and compile it again."""
    graph = program.graph
    drop_dead_code(graph)
    drop_unused(program.module)
    graph.lint()
    program.module.recompile()


def drop_unused(module: fx.GraphModule) -> None:
    """Delete layers and tensors that no node uses, and modules left empty."""
    used = {str(node.target) for node in module.graph.nodes if node.op in ("call_module", "get_attr")}
    parents: set[str] = set()
    for name in used:
        atoms = name.split(".")
        parents.update(".".join(atoms[:count]) for count in range(1, len(atoms) + 1))

    def sweep(owner: nn.Module, prefix: str) -> None:
        for registry in (owner._modules, owner._parameters, owner._buffers):
            for name in list(registry):
                path = f"{prefix}{name}"
                if path not in parents:
                    del registry[name]
        for name, child in owner._modules.items():
            if child is not None and f"{prefix}{name}" not in used:
                sweep(child, f"{prefix}{name}.")

    sweep(module, "")
