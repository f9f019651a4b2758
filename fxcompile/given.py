"""What a program gave for the inputs that it was verified on, for as long as it stays what it was."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxcompile.program import Program
from fxcompile.verification import Case

MOST_BYTES = 64_000_000
"""What is kept at most: outputs may be as large as images."""


class Given:
    """Outputs by case, of one program as it is now."""

    def __init__(self, program: Program) -> None:
        self._inputs = program.inputs
        self._fingerprint = _fingerprint(program)
        self._outputs: dict[Case, tuple[Tensor, ...]] = {}
        self._bytes = 0

    def add(self, case: Case, outputs: Sequence[Tensor]) -> None:
        """Remember what the program gave, unless that is too large."""
        self._bytes += sum(tensor.nbytes for tensor in outputs)
        if self._bytes <= MOST_BYTES:
            self._outputs[case] = tuple(outputs)

    def of(self, program: Program) -> dict[Case, tuple[Tensor, ...]]:
        """The outputs that a program still gives for these cases: none if it is another one by now."""
        same = program.inputs == self._inputs and _fingerprint(program) == self._fingerprint
        return dict(self._outputs) if same else {}


def _fingerprint(program: Program) -> list[tuple[object, ...]]:
    """A program's nodes, its tensors, and two sums of each: what is written to `.data` leaves no other trace."""
    found: list[tuple[object, ...]] = [(node.name, node.op, str(node.target)) for node in program.graph.nodes]
    for tensor in (*program.module.parameters(), *program.module.buffers()):
        values = tensor.detach()
        norm = torch.linalg.vector_norm(values).item() if values.is_floating_point() else 0.0
        found.append((id(tensor), values.sum().item(), norm))
    return found
