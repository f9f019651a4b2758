"""What the model itself computes, for the traced program to be held against; and the model left as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompile.drawing import random_like
from fxcompile.errors import TraceError, one_line
from fxcompile.functional import memory
from fxcompile.program import flatten_tensors
from fxcompile.refusals import definition, text_at, user_line
from fxcompile.signature import Signature, output_names, plain_containers
from fxcompile.watching import Watch


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
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()} if module is not None else {}
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
        if module is not None:
            # Batch norms write to their statistics without counting a version.
            changed = {name for name, version in versions(module).items() if before.get(name) != version}
            now = dict(module.named_buffers())
            changed |= {name for name, held in buffers.items() if name in now and not same_values(held, now[name])}
            self._refuse_updates(module, changed, watch.writes)
        if not flatten_tensors(self.output):
            what = type(self.output).__name__
            raise TraceError(
                f"the model returns no tensor but {what}",
                place=definition(module),
                mend="return the tensors that shall be the outputs",
            )

    def _refuse_updates(self, module: nn.Module, changed: set[str], writes: dict[object, str]) -> None:
        """A buffer that settles after one run is a cache; one that goes on changing is state."""
        if not changed:
            return
        first = {name: tensor.clone() for name, tensor in own_tensors(module) if name in changed}
        self.run(self.examples)
        for name, tensor in own_tensors(module):
            if name in first and not same_values(tensor, first[name]):
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


def same_values(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors hold the same, NaN at the same places included."""
    if torch.equal(ours, theirs) or not theirs.is_floating_point():
        return torch.equal(ours, theirs)
    return torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(), theirs.nan_to_num())


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
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if values and not buffer.is_inference()]
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
            for buffer, values in self._buffers:
                if not same_values(buffer, values):
                    buffer.copy_(values)
        for parameter, own in self._parameters:
            if memory(parameter) != memory(own):
                parameter.data = own
