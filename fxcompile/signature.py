"""How a model is called: which of its arguments are tensors, what they are named, and how to call it again."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Signature:
    """The example call, taken apart into flat tensors and everything else.

    Attributes:
        names: one for each tensor, after the parameter of forward that holds it.
        tensors: the example's tensors.
        parameters: the names of the parameters of forward, positional ones first, in the order of `spec`.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    parameters: tuple[str, ...]
    _leaves: tuple[Any, ...]
    _places: tuple[int, ...]
    _spec: pytree.TreeSpec

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
        """The signature of a model's forward for an example call."""
        return cls._make(parameter_names(model.forward, args, kwargs), args, kwargs)

    @classmethod
    def of_exported(cls, exported: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
        """The signature of an exported program, whose inputs have the names of the model that was exported."""
        count = len(pytree.tree_leaves((args, kwargs)))
        names = list(exported.graph_signature.user_inputs)
        simple = len(names) == count and len(args) + len(kwargs) == count and not kwargs
        parameters = tuple(str(name) for name in names) if simple else None
        if parameters is None:
            parameters = (*(f"input_{index}" for index in range(len(args))), *kwargs)
        return cls._make(parameters, args, kwargs)

    @classmethod
    def _make(cls, parameters: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
        paths, spec = pytree.tree_flatten_with_path((args, kwargs))
        leaves = [leaf for _, leaf in paths]
        names: list[str] = []
        places: list[int] = []
        for index, (path, leaf) in enumerate(paths):
            if not isinstance(leaf, Tensor):
                continue
            places.append(index)
            where, rest = path[1], path[2:]
            top = parameters[where.idx] if isinstance(where, pytree.SequenceKey) else str(where.key)  # type: ignore[attr-defined]
            parts = [str(getattr(key, "idx", getattr(key, "key", key))) for key in rest]
            name = "_".join([top, *parts])
            name = "".join(char if char.isalnum() or char == "_" else "_" for char in name)
            while name in names:
                name += "_"
            names.append(name)
        tensors = tuple(leaves[place].detach() for place in places)
        return cls(tuple(names), tensors, parameters, tuple(leaves), tuple(places), spec)

    def call(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments of the example call, with other tensors."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return tuple(args), dict(kwargs)

    def argument_names(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
        """Names for all arguments of the call, positional ones first."""
        return (*self.parameters[: len(args)], *kwargs)

    def keep(self, placeholders: Sequence[fx.Node]) -> list[fx.Node]:
        """Those placeholders of an exported graph that are tensors here; others were fixed by the example."""
        return [placeholders[place] for place in self._places] if len(placeholders) == len(self._leaves) else [*placeholders]

    def convention(self, module: fx.GraphModule) -> None:
        """Let a graph module with flat placeholders be called as the model is, where that is not flat already."""
        args, kwargs = self.call(self.tensors)
        flat = all(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
        if flat and len(args) + len(kwargs) == len(self.tensors):
            return
        _, tensors_only = pytree.tree_flatten(self.call([0] * len(self.tensors)))
        if len(self._leaves) != len(self.tensors):
            return  # arguments that are no tensors were fixed; the program is called with the tensors alone
        info = fx.graph._PyTreeInfo([*self.parameters[: len(args)], *kwargs], tensors_only, None)
        module.graph.set_codegen(fx.graph._PyTreeCodeGen(info))

    def restore_output(self, output: fx.Node, exported: ExportedProgram) -> None:
        """Give an exported graph's flat output the nesting that the model returns."""
        spec = exported.call_spec.out_spec
        flat = output.args[0]
        if spec is not None and isinstance(flat, (tuple, list)):
            output.args = (plain_containers(pytree.tree_unflatten(list(flat), spec)),)

    def describe(self) -> str:
        """The shapes and dtypes of the example tensors, for messages."""
        parts = [
            f"{name}: {'x'.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"
            for name, tensor in zip(self.names, self.tensors, strict=True)
        ]
        return f"({', '.join(parts)})"


def parameter_names(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """The parameter of forward that each positional argument goes to, then the keywords."""
    try:
        known = [
            parameter
            for parameter in inspect.signature(forward).parameters.values()
            if parameter.kind is not parameter.KEYWORD_ONLY and parameter.kind is not parameter.VAR_KEYWORD
        ]
    except (TypeError, ValueError):
        known = []
    names: list[str] = []
    for index in range(len(args)):
        if index < len(known) and known[index].kind is not inspect.Parameter.VAR_POSITIONAL:
            names.append(known[index].name)
        else:
            base = known[-1].name if known and known[-1].kind is inspect.Parameter.VAR_POSITIONAL else "input"
            names.append(f"{base}_{index}")
    return (*names, *kwargs)


def plain_containers(value: Any) -> Any:
    """Tuples, lists and dicts in place of their subclasses, which a graph's output cannot hold."""
    if isinstance(value, dict):
        return {str(key): plain_containers(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [plain_containers(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value
