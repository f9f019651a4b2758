"""Which parameters of a program train: what a pass that needs fine-tuning must leave possible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxcompile.program import Program, flatten_tensors, run_flat


def unreached(program: Program, inputs: Sequence[Tensor]) -> list[str]:
    """The names of the parameters to be trained that the gradient of no output reaches on these flat inputs.

    Nothing is accumulated: `.grad` of the parameters, which may be the user's own, stays as it is.
    """
    wanted = {name: item for name, item in program.module.named_parameters() if item.requires_grad}
    with torch.enable_grad():
        outputs = flatten_tensors(run_flat(program.module, [tensor.clone() for tensor in inputs]))
        sums = [output.sum() for output in outputs if output.requires_grad]
        if not sums:
            return list(wanted)
        gradients = torch.autograd.grad(sums, list(wanted.values()), allow_unused=True)
    return [name for name, gradient in zip(wanted, gradients, strict=True) if gradient is None]
