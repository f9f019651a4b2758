"""How far rounding alone can put a network's outputs, and whether it explains a difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompile.comparing import Broken, relative_maximum
from fxcompile.contracts import tolerance
from fxcompile.layers import CONVOLUTIONS, as_double, converted
from fxcompile.program import Program, flatten_tensors
from fxcompile.summing import function_in_order, layer_in_order


class DoubleInterpreter(fx.Interpreter):
    """Runs a program in float64, casting one layer at a time: the whole network is never held twice."""

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype) -> None:
        super().__init__(module)
        self.dtype = dtype

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            value = super().run_node(n)
            return as_double(value) if isinstance(value, Tensor) else value
        return super().run_node(n)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.wide_layer(target)(*args, **kwargs)

    def wide_layer(self, target: Any) -> Any:
        """A layer over its tensors in float64."""
        layer = self.fetch_attr(target)
        holds = any(True for _ in (*layer.parameters(), *layer.buffers()))
        return converted(layer, as_double) if holds else layer

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        def widen(item: Any) -> Any:
            return torch.float64 if item is self.dtype else item

        return super().call_function(target, fx.node.map_aggregate(args, widen), fx.node.map_aggregate(kwargs, widen))


_TO_A_SHARE_OF_ONE = (nn.Sigmoid, nn.ELU, nn.CELU, nn.SELU)
_TO_A_SHARE_OF_THE_INPUT = (nn.SiLU, nn.GELU)
"""Activations whose kernels are right to a few units in the last place of 1, or of the input, however small the output.

Measured over [-100, 100] against float64, in machine epsilons: ONNX Runtime's sigmoid is off by up to 1.4, and 0 below
-18 or so; its exp(x) - 1 by up to 0.6, all of it near 0; torch's GELU by up to 8 of an input of 100 in its tail.
Softmax, tanh, softplus, mish and erf are right relative to their output.
"""


class NoisyInterpreter(DoubleInterpreter):
    """The same, each layer's output off by as much as rounding may put it, drawn from a seed.

    That is `amplitude * max|y|`, a machine epsilon of the program's dtype where a kernel is no better than that, and
    everywhere the smallest normal number, below which the last places are lost or all is taken for zero.
    Means, sums and norms are those of kernels that add up in float32 (`fxcompile.summing`).
    """

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype, amplitude: float) -> None:
        super().__init__(module, dtype)
        self.amplitude = amplitude
        self.generator = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op in ("call_module", "call_function") and isinstance(value, Tensor) and value.dtype == torch.float64:
            noise = torch.rand(value.shape, generator=self.generator, dtype=torch.float64) * 2 - 1
            largest = float(value.abs().max()) if value.numel() else 0.0
            value = value + noise * (self.amplitude * largest + self._floor(n))
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        given = layer_in_order(self.wide_layer(target), args[0]) if self._is_widened(*args) else None
        return super().call_module(target, args, kwargs) if given is None else given

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        given = function_in_order(target, *args) if not kwargs and self._is_widened(*args) else None
        return super().call_function(target, args, kwargs) if given is None else given

    def _is_widened(self, *args: Any) -> bool:
        """Whether the first argument holds numbers that the program has in fewer bits."""
        x = args[0] if args else None
        return self.dtype != torch.float64 and isinstance(x, Tensor) and x.dtype == torch.float64 and x.numel() > 0

    def _floor(self, n: fx.Node) -> float:
        """By how much a kernel may be off though all of its outputs are tiny.

        Sums of products that cancel keep the rounding of what cancels: of terms of any sign, about as much as the norm
        of the weights makes of an input.
        """
        layer = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        epsilon, tiny = torch.finfo(self.dtype).eps, float(torch.finfo(self.dtype).tiny)
        if isinstance(layer, _TO_A_SHARE_OF_ONE):
            return epsilon
        share = 1.0 if isinstance(layer, _TO_A_SHARE_OF_THE_INPUT) else 0.0
        if isinstance(layer, (*CONVOLUTIONS, nn.Linear)) and layer.weight.numel():
            share = float(layer.weight.detach().double().flatten(1).norm(dim=1).max())
        inputs: Any = self.map_nodes_to_values(n.args, n) if share else ()
        return max(tiny, epsilon * share * float(inputs[0].abs().max())) if share and inputs[0].numel() else tiny


def rounding_reach(program: Program, inputs: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """How far rounding inside the network can put each output, relative to its maximum, on these inputs.

    Every layer's output is perturbed by a tenth of the tolerance for one layer (about what other kernels for the same
    layer differ by), and the network run on in float64.
    """
    return [
        relative_maximum(noisy, clean) if clean.is_floating_point() else 0.0
        for noisy, clean in zip(run_noisy(program, inputs, tolerance(program.dtype) / 10), exact, strict=True)
    ]


def run_double(program: Program, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of a program computed in float64 from its own weights."""
    return _run_wide(DoubleInterpreter(program.module, program.dtype), inputs)


def run_noisy(program: Program, inputs: Sequence[Tensor], amplitude: float) -> tuple[Tensor, ...]:
    """The same, each layer's output off by up to `amplitude` of its largest value, drawn from a seed."""
    return _run_wide(NoisyInterpreter(program.module, program.dtype, amplitude), inputs)


def _run_wide(interpreter: DoubleInterpreter, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    wide = [as_double(tensor) for tensor in inputs]
    with torch.no_grad():
        return flatten_tensors(interpreter.run(*wide, enable_io_processing=False))


@dataclass
class Seen:
    """The largest differences seen between two computations of one function, relative to an output's largest value.

    Attributes:
        error: of those within the tolerance.
        amplified: of those beyond it that rounding inside the network explains; 0 where there were none.
    """

    error: float = 0.0
    amplified: float = 0.0

    def add(self, other: Seen) -> None:
        """The larger of both."""
        self.error, self.amplified = max(self.error, other.error), max(self.amplified, other.amplified)


NOISE = 4.0
"""How many times the reach of rounding another computation of the same function may be off."""


def compare_noisy(given: Sequence[Tensor], own: Sequence[Tensor], program: Program, inputs: Sequence[Tensor]) -> Seen:
    """Hold another computation of a program's outputs against its own; returns the largest errors seen.

    An error within the tolerance passes. A deep, saturating or normalising network amplifies harmless rounding past
    it: a larger error passes only if the other computation is within the tolerance of what float64 gives, or if
    rounding inside the network, amplified in the same way, explains it.

    Raises:
        Broken: an output differs by more than that.
    """
    if len(given) != len(own):
        raise Broken(f"there are {len(given)} outputs instead of {len(own)}")
    exact: tuple[Tensor, ...] = ()
    reach: list[float] = []
    seen = Seen()
    for index, (name, theirs, ours) in enumerate(zip(program.output_names, given, own, strict=True)):
        if theirs.shape != ours.shape:
            raise Broken(f"'{name}' has shape {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
        error = relative_maximum(theirs, ours) if ours.is_floating_point() else float(not torch.equal(theirs, ours))
        if error <= tolerance(ours.dtype):
            seen.add(Seen(error))
            continue
        if not exact:
            exact = run_double(program, inputs)
            reach = rounding_reach(program, inputs, exact)
        if not ours.is_floating_point():
            if torch.equal(ours, exact[index]):
                raise Broken(f"'{name}' differs in {int((theirs != ours).sum())} of {ours.numel()} elements")
            continue  # a comparison so close that float64 decides it otherwise, too
        off = relative_maximum(theirs, exact[index])
        if not off <= max(NOISE * reach[index], tolerance(ours.dtype)):
            raise Broken(f"'{name}' differs by {off:.2e} of its largest value, rounding reaches {reach[index]:.0e}")
        seen.add(Seen(amplified=error))
    return seen
