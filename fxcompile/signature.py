"""How a model is called: which of its arguments are tensors, what they are named, and how to call it again."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxcompile.calling import ModelCode, has_literal
from fxcompile.errors import TraceError
from fxcompile.labels import dtype_name


@dataclass(frozen=True)
class Signature:
    """The example call, taken apart into flat tensors and everything else.

    Attributes:
        names: one for each tensor, after the parameter of forward that holds it.
        tensors: the example's tensors.
        parameters: the names of the parameters of forward that the call gives, positional ones first.
        declared: the parameters of forward as it declares them; none where that is not known.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    parameters: tuple[str, ...]
    declared: tuple[inspect.Parameter, ...]
    _leaves: tuple[Any, ...]
    _places: tuple[int, ...]
    _spec: pytree.TreeSpec

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
        """The signature of a model's forward for an example call."""
        for name in kwargs:
            if not name.isidentifier() or keyword.iskeyword(name):
                raise TraceError(
                    f"forward is given '{name}', which Python code cannot name", mend="give it another name"
                )
        made = cls._make(parameter_names(model.forward, args, kwargs), args, kwargs)
        return replace(made, declared=tuple(parameters_of(model.forward)))

    @property
    def takes_any_number(self) -> bool:
        """Whether forward takes `*args`."""
        return any(item.kind is item.VAR_POSITIONAL for item in self.declared)

    @classmethod
    def of_exported(cls, exported: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
        """The signature of an exported program, whose inputs have the names of the model that was exported."""
        known = exported.module_call_graph[0].signature if exported.module_call_graph else None
        names = list(getattr(known, "forward_arg_names", None) or ())
        if len(names) < len(args):
            flat = [str(name) for name in exported.graph_signature.user_inputs]
            simple = len(flat) == len(args) and not kwargs
            names = flat if simple else [f"input_{index}" for index in range(len(args))]
        return cls._make((*names[: len(args)], *kwargs), args, kwargs)

    @classmethod
    def _make(cls, parameters: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
        paths, spec = pytree.tree_flatten_with_path((args, kwargs))
        leaves = [leaf for _, leaf in paths]
        for leaf in leaves:
            if is_dataclass(leaf) and any(isinstance(value, Tensor) for value in vars(leaf).values()):
                name = type(leaf).__name__
                raise TraceError(
                    f"forward is given a {name}, a class that torch does not take apart",
                    mend=f"register it first: torch.export.register_dataclass({name})",
                )
        names: list[str] = []
        places: list[int] = []
        for index, (path, leaf) in enumerate(paths):
            if not isinstance(leaf, Tensor):
                continue
            places.append(index)
            where, rest = path[1], path[2:]
            top = parameters[where.idx] if isinstance(where, pytree.SequenceKey) else str(where.key)  # type: ignore[attr-defined]
            parts = [str(getattr(key, "idx", getattr(key, "key", getattr(key, "name", key)))) for key in rest]
            name = "_".join([top, *parts])
            name = "".join(char if char.isalnum() or char == "_" else "_" for char in name)
            while name in names or (rest and name in parameters):
                name += "_"
            names.append(name)
        tensors = tuple(leaves[place].detach() for place in places)
        return cls(tuple(names), tensors, parameters, (), tuple(leaves), tuple(places), spec)

    def call(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments of the example call, with other tensors."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return tuple(args), dict(kwargs)

    def set_convention(self, graph: fx.Graph) -> None:
        """Let a graph with flat placeholders be called as the model is: nested arguments, and those that are fixed."""
        args, kwargs = self.call(self.tensors)
        given = dict(zip(self.parameters, (*args, *kwargs.values()), strict=True))
        names, keywords, defaults = self._declaration(given, len(args))
        fixed = {name: value for name, value in (given | defaults).items() if has_literal(value)}
        paths, _ = pytree.tree_flatten_with_path((args, kwargs))
        parts: dict[str, str] = {}
        flat = iter(self.names)
        for path, leaf in paths:
            parameter = self._parameter(path)
            expression = parameter + "".join(_access(key) for key in path[2:])
            if isinstance(leaf, Tensor):
                parts[next(flat)] = expression
            elif parameter not in fixed and has_literal(leaf):
                fixed[expression] = leaf
        graph.set_codegen(ModelCode(names, keywords, parts, fixed))

    def _declaration(self, given: dict[str, Any], positional: int) -> tuple[list[str], set[str], dict[str, Any]]:
        """The parameters in the order of forward, which are given by keyword only, and those left at their defaults."""
        names: list[str] = []
        keywords: set[str] = set()
        defaults: dict[str, Any] = {}
        gap = False
        for item in self.declared:
            if item.kind is item.VAR_POSITIONAL:
                names += self.parameters[len(names) : positional]
                gap = True
            elif item.kind is not item.VAR_KEYWORD and (item.name in given or has_literal(item.default)):
                names.append(item.name)
                if item.name not in given:
                    defaults[item.name] = item.default
                if gap or item.kind is item.KEYWORD_ONLY:
                    keywords.add(item.name)
            elif item.kind is not item.VAR_KEYWORD:
                gap = True  # it has a default that no code can be written for
        others = [name for name in given if name not in names]
        if self.declared:
            keywords.update(others)
        return names + others, keywords, defaults

    def keep(self, placeholders: Sequence[fx.Node]) -> list[fx.Node]:
        """Those placeholders of an exported graph that are tensors here; others were fixed by the example."""
        if len(placeholders) != len(self._leaves):
            return [*placeholders]
        return [placeholders[place] for place in self._places]

    def restore_output(self, output: fx.Node, exported: ExportedProgram) -> None:
        """Give an exported graph's flat output the nesting that the model returns."""
        spec = exported.call_spec.out_spec
        flat = output.args[0]
        if spec is not None and isinstance(flat, (tuple, list)):
            output.args = (plain_containers(pytree.tree_unflatten(list(flat), spec)),)

    def _parameter(self, path: Sequence[Any]) -> str:
        where = path[1]
        return self.parameters[where.idx] if isinstance(where, pytree.SequenceKey) else str(where.key)

    def describe(self) -> str:
        """The shapes and dtypes of the example tensors, for messages."""
        parts = [
            f"{name}: {'x'.join(map(str, tensor.shape)) or 'scalar'} {dtype_name(tensor.dtype)}"
            for name, tensor in zip(self.names, self.tensors, strict=True)
        ]
        return f"({', '.join(parts)})"


def parameters_of(forward: Any) -> list[inspect.Parameter]:
    """The parameters of a function, none where it has no signature."""
    try:
        return list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return []


def parameter_names(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """The parameter of forward that each positional argument goes to, then the keywords."""
    known = [item for item in parameters_of(forward) if item.kind not in (item.KEYWORD_ONLY, item.VAR_KEYWORD)]
    names: list[str] = []
    for index in range(len(args)):
        if index < len(known) and known[index].kind is not inspect.Parameter.VAR_POSITIONAL:
            names.append(known[index].name)
        else:
            base = known[-1].name if known and known[-1].kind is inspect.Parameter.VAR_POSITIONAL else "input"
            names.append(f"{base}_{index}")
    return (*names, *kwargs)


def _access(key: Any) -> str:
    """How Python gets at one part of a container."""
    if isinstance(key, pytree.SequenceKey):
        return f"[{key.idx}]"
    if isinstance(key, pytree.MappingKey):
        return f"[{key.key!r}]"
    return f".{key.name}"


def output_names(output: Any) -> tuple[str, ...]:
    """Names for all tensors of an output: the keys or fields it has, else `output`, `output_0`, `output_1`, ..."""
    if isinstance(output, Tensor):
        return ("output",)
    unique: dict[str, None] = {}
    for name, _ in _named(output, ""):
        clean = "".join(char if char.isalnum() or char in "_.:/-" else "_" for char in name)
        while clean in unique:
            clean += "_"
        unique[clean] = None
    return tuple(unique)


def _named(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value
        return
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif hasattr(value, "_fields"):
        items = [(name, getattr(value, name)) for name in value._fields]
    elif is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, (tuple, list)):
        items = [(f"output_{index}" if not prefix else str(index), item) for index, item in enumerate(value)]
        if len(items) == 1 and not prefix:
            items = [("output", value[0])]
    else:
        return
    for name, item in items:
        yield from _named(item, f"{prefix}_{name}" if prefix else name)


def plain_containers(value: Any) -> Any:
    """Tuples, lists and dicts in place of their subclasses and of dataclasses, which a graph's output cannot hold."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
        value = {key: item for key, item in value.items() if item is not None}
    if isinstance(value, dict):
        return {str(key): plain_containers(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [plain_containers(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value
