"""What a program gave for the inputs that it was verified on, for as long as it stays what it was."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxcompile.drawing import Case
from fxcompile.program import Program

MOST_BYTES = 64_000_000
"""What is kept at most: outputs may be as large as images."""


class Given:
    """Outputs by case, of one program as it was when it was sealed."""

    def __init__(self) -> None:
        self._sealed: object = None
        self._outputs: dict[Case, tuple[Tensor, ...]] = {}
        self._bytes = 0

    def add(self, case: Case, outputs: Sequence[Tensor]) -> None:
        """Remember what the program gave, unless that is too large."""
        self._bytes += sum(tensor.nbytes for tensor in outputs)
        if self._bytes <= MOST_BYTES:
            self._outputs[case] = tuple(outputs)

    def seal(self, program: Program) -> Given:
        """These are the outputs of this program, as it is now."""
        self._sealed = _fingerprint(program) if self._outputs else None
        return self

    def of(self, program: Program) -> dict[Case, tuple[Tensor, ...]]:
        """The outputs that a program still gives for these cases: none if it is another one by now."""
        return dict(self._outputs) if self._outputs and _fingerprint(program) == self._sealed else {}


def _fingerprint(program: Program) -> list[object]:
    """A program's inputs, nodes and tensors, and two sums of each: what is written to `.data` leaves no other trace."""
    found: list[object] = [program.inputs, *((node.name, node.op, str(node.target)) for node in program.graph.nodes)]
    for tensor in (*program.module.parameters(), *program.module.buffers()):
        values = tensor.detach()
        norm = torch.linalg.vector_norm(values).item() if values.is_floating_point() else 0.0
        found.append((id(tensor), values.sum().item(), norm))
    return found
