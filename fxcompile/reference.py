"""What the model itself computes, for the traced program to be held against; and the model left as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxcompile import spellings
from fxcompile.errors import TraceError
from fxcompile.program import flatten_tensors
from fxcompile.refusals import current_line, definition, one_line, text_at, user_line
from fxcompile.signature import Signature, output_names, plain_containers
from fxcompile.verification import random_like


class Reference:
    """A model's outputs on the examples, and on other values and batch sizes.

    Attributes:
        examples: the example's tensors.
        output: the model's own output for them, subclasses of containers made plain.
        output_names: one for each tensor in it.
        suspects: the first line of the model that did what no graph can hold, by what it did.

    Raises:
        TraceError: the model fails on the examples, returns no tensor, or changes its own tensors each time it runs.
    """

    def __init__(self, model: Callable[..., Any], signature: Signature) -> None:
        self.model = model
        self.signature = signature
        self.examples = signature.tensors
        if not self.examples:
            raise TraceError(
                "no tensor among the example inputs",
                mend="give the tensors that forward takes, torch.randn(1, 3, 224, 224) say, or torch.from_numpy",
            )
        module = model if isinstance(model, nn.Module) else None
        watch = Watch({memory(tensor) for _, tensor in own_tensors(module)})
        before = versions(module)
        try:
            with watch:
                output = self._call(self.examples)
        except Exception as error:
            raise TraceError(
                f"the model fails on the example inputs {signature.describe()}: {one_line(error)}",
                place=user_line(error) or definition(module),
                mend="give the inputs that forward takes, with their batch axis (--input-shape 1x3x224x224)",
            ) from error
        self.output, self.output_names = plain_containers(output), output_names(output)
        self.suspects = watch.suspects
        self._refuse_updates(module, before, watch.writes)
        if not flatten_tensors(self.output):
            what = type(self.output).__name__
            raise TraceError(
                f"the model returns no tensor but {what}",
                place=definition(module),
                mend="return the tensors that shall be the outputs",
            )

    def _refuse_updates(
        self, module: nn.Module | None, before: dict[str, tuple[int, ...]], writes: dict[object, str]
    ) -> None:
        """A buffer that settles after one run is a cache; one that goes on changing is state."""
        changed = [name for name, version in versions(module).items() if before.get(name) != version]
        if not changed or module is None:
            return
        first = {name: tensor.clone() for name, tensor in own_tensors(module) if name in changed}
        self.run(self.examples)
        for name, tensor in own_tensors(module):
            if name in first and (tensor.shape != first[name].shape or not torch.equal(tensor, first[name])):
                atoms = name.split(".")
                owners = [module.get_submodule(".".join(atoms[:depth])) for depth in range(len(atoms))]
                keys = [*((id(owner), atom) for owner, atom in zip(owners, atoms, strict=True)), memory(tensor)]
                place = next((writes[key] for key in keys if key in writes), self.suspects.get("write"))
                line = text_at(place)
                raise TraceError(
                    f"forward updates the model's own tensor '{name}'{f' (`{line}`)' if line else ''}",
                    place=place or definition(module),
                    mend="compute the new value and return it instead of writing it to the module",
                )

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """The model's output for other tensors, in plain containers."""
        return plain_containers(self._call(tensors))

    def _call(self, tensors: Sequence[Tensor]) -> Any:
        args, kwargs = self.signature.call([tensor.clone() for tensor in tensors])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.model(*args, **kwargs)

    def batch_inputs(self) -> list[int]:
        """Indices of the inputs that share the first axis, if the model may be batched over it."""
        sizes = [tensor.shape[0] if tensor.dim() else None for tensor in self.examples]
        return [index for index, size in enumerate(sizes) if size is not None and size == sizes[0]]

    def other(self, grow: int, seed: int) -> list[Tensor]:
        """Other inputs of the same range, the batch axis longer by `grow`."""
        generator = torch.Generator().manual_seed(seed)
        batched = self.batch_inputs() if grow else []
        made = []
        for index, example in enumerate(self.examples):
            shape = list(example.shape)
            if index in batched:
                shape[0] += grow
            made.append(random_like(example, shape, generator))
        return made


_VALUES = {"item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "nonzero",
           "masked_select", "unique"}  # fmt: skip


class Watch(TorchFunctionMode):
    """Notes the lines of a model that do what no graph can hold, while the model runs.

    Args:
        own: where the model's own tensors lie in memory.

    Attributes:
        suspects: the first line of each kind: "random", "value" (made a Python number), "write" (to the module).
        writes: the first line that wrote to each of the model's tensors, by `memory`, or set an attribute of one of its
            modules to a tensor or layer, by the module's id and the attribute's name.
    """

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.own = own
        self.suspects: dict[str, str] = {}
        self.writes: dict[object, str] = {}

    def __enter__(self) -> Watch:
        set_attribute = self._set_attribute = nn.Module.__setattr__

        def watched(module: nn.Module, name: str, value: Any) -> None:
            if isinstance(value, (Tensor, nn.Module)):
                self._note("write", (id(module), name))
            set_attribute(module, name, value)

        nn.Module.__setattr__ = watched  # type: ignore[method-assign,assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        nn.Module.__setattr__ = self._set_attribute  # type: ignore[method-assign]
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = self._kind(getattr(func, "__name__", ""), args, kwargs or {})
        if kind is not None:
            self._note(kind, memory(args[0]) if kind == "write" else None)
        return func(*args, **(kwargs or {}))

    def _note(self, kind: str, key: object) -> None:
        if kind in self.suspects and (key is None or key in self.writes):
            return
        line = current_line()
        if line is not None:
            self.suspects.setdefault(kind, line)
            if key is not None:
                self.writes.setdefault(key, line)

    def _kind(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
        if name in _VALUES:
            return "value"
        bare = name.rstrip("_")
        if bare in spellings.RANDOM or (bare in spellings.RANDOM_IN_TRAINING and kwargs.get("training")):
            return "random"
        in_place = name in ("__setitem__", "__set__") or (
            name.startswith("__i") and name not in ("__int__", "__invert__", "__index__")
        )
        if in_place or (name.endswith("_") and not name.endswith("__")):
            first = args[0] if args else None
            if isinstance(first, Tensor) and first.layout == torch.strided and memory(first) in self.own:
                return "write"
        return None


def memory(tensor: Tensor) -> int:
    """Where a tensor's storage lies."""
    return tensor.untyped_storage().data_ptr()


def own_tensors(module: nn.Module | None) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a module, with their names."""
    if module is not None:
        yield from module.named_parameters()
        yield from module.named_buffers()


def versions(module: nn.Module | None) -> dict[str, tuple[int, ...]]:
    """For each parameter and buffer, which tensor it is, where it lies, and how often it was written to."""
    return {
        name: (id(tensor), memory(tensor), -1 if tensor.is_inference() else tensor._version)
        for name, tensor in own_tensors(module)
    }


RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(dir(nn.Module()))
"""Names that a graph module has a use of its own for: a model's part of such a name goes by another meanwhile."""


@contextmanager
def left_alone(model: nn.Module) -> Iterator[ModelState]:
    """The model in eval mode; afterwards its modes, attributes and buffers are what they were, and so is the seed."""
    state = ModelState(model, values=True)
    try:
        model.eval()
    except NotImplementedError:  # as the graph modules of exported programs do
        for module in model.modules():
            module.training = False
    for module in model.modules():
        module._compiled_call_impl = None  # what `module.compile()` sets
    for registry in (model._modules, model._parameters, model._buffers):
        for name in RESERVED.intersection(registry):
            model.__dict__[name] = registry.pop(name)
            registry[f"{name}_"] = model.__dict__[name]
    try:
        with torch.random.fork_rng(devices=[]):
            yield state
    finally:
        state.restore()


class ModelState:
    """The attributes of all modules of a model, as they are now.

    Args:
        model: the model.
        values: keep the values of buffers, and which memory parameters lie in, too.
    """

    def __init__(self, model: nn.Module, values: bool = False) -> None:
        self._attributes = [(module, dict(module.__dict__)) for module in model.modules()]
        self._containers = [
            (value, value.copy())
            for _, attributes in self._attributes
            for value in attributes.values()
            if isinstance(value, (dict, list, set))
        ]
        self._buffers = [
            (buffer, buffer.clone(), buffer._version)
            for buffer in model.buffers()
            if values and not buffer.is_inference()
        ]
        self._parameters = [(parameter, parameter.detach()) for parameter in model.parameters() if values]

    def restore(self) -> None:
        """Put everything back."""
        for module, attributes in self._attributes:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for container, content in self._containers:
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)
        with torch.no_grad():
            for buffer, values, version in self._buffers:
                if buffer._version != version:
                    buffer.copy_(values)
        for parameter, own in self._parameters:
            if memory(parameter) != memory(own):
                parameter.data = own
