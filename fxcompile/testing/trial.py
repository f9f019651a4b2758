"""One network on which passes are tried: what the model computes, and what comes out of the passes. No Hypothesis."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxcompile.comparing import Broken
from fxcompile.contracts import Approximate, Contract, Exact, Trained
from fxcompile.errors import BudgetError
from fxcompile.layers import is_finite
from fxcompile.manager import PassManager, Result
from fxcompile.program import Program, flatten_tensors
from fxcompile.report import SiteReport
from fxcompile.rewriting import Pass
from fxcompile.tracing import trace


@dataclass
class Trial:
    """A model, the passes that are tried on it, and the inputs on which it is looked at.

    Attributes:
        model: in float64 where nothing else is asked for: it was cast before anything is rewritten.
        examples: its example inputs.
        passes: in the order in which they run.
        inputs: flat inputs to compare on, a tuple for each comparison.
        calibration: samples for passes that fit, by input name, or None.
        exact: hold approximate passes to equality, too, because their options promise it.
        seed: of the run.
        site: which site `only` and `skip` are tried on, counted around.
    """

    model: nn.Module
    examples: tuple[Tensor, ...]
    passes: tuple[Pass, ...]
    inputs: Sequence[tuple[Tensor, ...]] = ()
    calibration: Mapping[str, Tensor] | None = None
    exact: bool = False
    seed: int = 0
    site: int = 0

    @cached_property
    def before(self) -> Held:
        """The model and the random generators, before anything was done with them."""
        return Held(self.model)

    @cached_property
    def program(self) -> Program:
        """The traced model."""
        assert self.before
        return trace(self.model, self.examples)

    @cached_property
    def traced(self) -> Held:
        """The traced program's module, before the passes ran."""
        return Held(self.program.module)

    @cached_property
    def result(self) -> Result:
        """What the passes make of it, not verified by the compiler itself.

        Raises:
            Broken: they fail.
        """
        assert self.traced
        return self.run()

    def run(self, passes: Sequence[Pass] | None = None, program: Program | None = None, **options: Any) -> Result:
        """Run passes, on the traced model if nothing else is given.

        A network in which they cannot save what they are to save is left as it is.

        Raises:
            Broken: they fail.
        """
        options = {"verify": "off", "seed": self.seed, **options}
        chosen = self.passes if passes is None else passes
        manager = PassManager(chosen, calibration=self.calibration, **options)
        try:
            return manager.run(program or self.program)
        except BudgetError:
            manager.passes = [pass_.model_copy(update={"only": ("",)}) for pass_ in chosen]
            return manager.run(program or self.program)
        except Exception as error:
            kind = type(error).__name__
            raise Broken(f"{', '.join(map(str, chosen))} fails with {kind}: {error}") from error

    @property
    def contract(self) -> Contract:
        """The weakest of the passes' contracts."""
        promises = [pass_.promise for pass_ in self.passes]
        for kind in (Trained, Approximate):
            for promise in promises:
                if isinstance(promise, kind):
                    return promise
        return Exact()

    @property
    def is_exact(self) -> bool:
        """Whether the same function is promised."""
        return self.exact or isinstance(self.contract, Exact)

    @property
    def kept(self) -> list[SiteReport]:
        """The sites that were rewritten."""
        return [site for report in self.result.record.passes for site in report.sites if site.outcome == "kept"]

    def wanted(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """What the model itself gives, or None where it takes no such inputs or gives numbers that are not finite."""
        with torch.no_grad():
            try:
                outputs = flatten_tensors(self.model(*[tensor.clone() for tensor in inputs]))
            except (RuntimeError, ValueError):
                return None
        return outputs if all(map(is_finite, outputs)) else None

    def given(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the rewritten module gives.

        Raises:
            Broken: it fails, or writes to its inputs.
        """
        own = [tensor.clone() for tensor in inputs]
        with torch.no_grad():
            try:
                outputs = flatten_tensors(self.result.module(*own))
            except Exception as error:
                raise Broken(f"the rewritten module fails on inputs that the model takes: {error}") from error
        if not all(torch.equal(a, b) for a, b in zip(own, inputs, strict=True)):
            raise Broken("the rewritten module writes to its inputs")
        return outputs

    def single(self) -> Trial:
        """The same in float32."""
        cast = copy.deepcopy(self.model).float()

        def narrow(tensor: Tensor) -> Tensor:
            return tensor.float() if tensor.is_floating_point() else tensor

        return Trial(
            cast.eval(),
            tuple(map(narrow, self.examples)),
            self.passes,
            [tuple(map(narrow, inputs)) for inputs in self.inputs],
            self.calibration and {name: narrow(tensor) for name, tensor in self.calibration.items()},
            self.exact,
            self.seed,
            self.site,
        )


def calibration_of(examples: Sequence[Tensor], names: Sequence[str], samples: int) -> dict[str, Tensor]:
    """Calibration samples for inputs of these shapes and names: normal random numbers, always the same ones."""
    generator = torch.Generator().manual_seed(samples)
    return {
        name: torch.randn((samples, *example.shape[1:]), generator=generator, dtype=torch.float64).to(example.dtype)
        for name, example in zip(names, examples, strict=True)
    }


class Held:
    """The tensors, modes and options of a module's layers and the state of all random generators, to compare later."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.tensors = [
            (name, tensor, tensor.detach().clone(), tensor.requires_grad) for name, tensor in _tensors(module)
        ]
        self.layers = {name: (item.training, _told(item)) for name, item in module.named_modules()}
        self.generators = _generators()

    def difference(self) -> str | None:
        """What has changed since, or None."""
        now = dict(_tensors(self.module))
        for name, tensor, values, trains in self.tensors:
            if now.get(name) is not tensor:
                return f"tensor '{name}' is another one than before"
            if not torch.equal(tensor.detach().nan_to_num(), values.nan_to_num()):
                return f"tensor '{name}' has other values than before"
            if tensor.requires_grad != trains:
                return f"tensor '{name}' {'trained, and is frozen now' if trains else 'was frozen, and trains now'}"
        if len(now) > len(self.tensors):
            return "there are more tensors than before"
        for name, item in self.module.named_modules():
            trained, told = self.layers.get(name, (item.training, ""))
            if item.training != trained:
                return f"layer '{name}' is in {'training' if item.training else 'eval'} mode and was not"
            if _told(item) != told:
                return f"layer '{name}' was {told or 'not there'} and is {_told(item)}"
        return None

    def moved_generator(self) -> str | None:
        """The library whose global random generator was used since, or None."""
        for (name, state), (_, then) in zip(_generators(), self.generators, strict=True):
            if state != then:
                return name
        return None


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _told(layer: nn.Module) -> str:
    """A layer's kind and options, as it prints them."""
    return f"{type(layer).__name__}({layer.extra_repr()})"


def _generators() -> list[tuple[str, object]]:
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  what a pass may use is the legacy generator
    return [
        ("torch", torch.get_rng_state().numpy().tobytes()),
        ("random", random.getstate()),
        ("numpy", (kind, np.asarray(keys).tobytes(), *rest)),
    ]
