"""A drawn network: real Python source of an `nn.Module`, the shapes of its inputs, and a seed for all its numbers."""

from __future__ import annotations

import linecache
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

FILENAME = "drawn_network.py"
"""What the source is compiled as, so that a traced node knows the line it comes from."""

IMPORTS = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
"""What the source needs ahead of it."""


def fill(model: nn.Module, seed: int, odd: Mapping[str, str]) -> nn.Module:
    """Give a model weights and statistics from a seed, in float64; `odd` names norms with unusual statistics and
    layers with unusual weights.

    Weights keep the size of what flows through them; scales lie around 1, some are negative; variances around 1.
    """
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            last = name.rpartition(".")[2]
            if not tensor.is_floating_point():
                continue
            if "var" in last:
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 1.5 + 0.5)
                continue
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if last.startswith(("weight", "gamma")) and tensor.dim() == 1:
                values = 1 + 0.3 * values
            elif tensor.dim() > 1:
                values = 1.4 * values / max(tensor[0].numel(), 1) ** 0.5
            tensor.copy_(0.5 * values if "bias" in last else values)
        for name, what in odd.items():
            layer: Any = model.get_submodule(name)
            if what == "negative gamma":
                layer.weight.neg_()
            elif what == "zero gamma":
                layer.weight[::2] = 0
            elif what == "tiny variance":
                layer.running_var.mul_(1e-9)
            elif what == "no variance":
                layer.running_var.zero_()
            elif what == "large variance":
                layer.running_var.mul_(1e6)
            elif what == "large mean":
                layer.running_mean.mul_(30)
            elif what == "dead filters":
                layer.weight[1::2] = 0
            elif what == "dead inputs":
                layer.weight[:, 1::2] = 0
            elif what == "equal filters":
                layer.weight[1:] = layer.weight[:1].clone()
    return model


@dataclass(frozen=True)
class Step:
    """What a network was grown by: a kind of block, what was chosen for it, and the steps whose values it takes.

    `network.steps` of a drawn network that has what you want shows how it is said.

    Attributes:
        kind: a name of `fxcompile.testing.blocks.BLOCKS`, or "inputs" for the first step and "output" for the last.
        choices: the options of the block that were chosen, by name.
        sources: for each value or layer it takes, the index of the step which made it, and which of that step's
            values it is; -1, -2 and so on for its layers.
    """

    kind: str
    choices: tuple[tuple[str, Any], ...] = ()
    sources: tuple[tuple[int, int], ...] = ()

    def __getitem__(self, name: str) -> Any:
        return dict(self.choices).get(name)


@dataclass(frozen=True, repr=False)
class Network:
    """A drawn network; equal ones are the same down to the last bit.

    Attributes:
        inputs: name and shape (with the batch) of each input.
        layers: lines of `__init__`.
        names: for each layer, the step that made it.
        lines: lines of `forward`, each with the index of the step that wrote it.
        output: the expression that forward returns.
        steps: what the network was grown by; `growing.regrow` grows it again.
        odd: names of layers with unusual statistics or weights, and what is unusual.
        seed: of weights, statistics and example inputs.
    """

    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    layers: tuple[str, ...]
    lines: tuple[tuple[int, str], ...]
    output: str
    names: tuple[tuple[str, int], ...] = ()
    steps: tuple[Step, ...] = ()
    odd: tuple[tuple[str, str], ...] = ()
    seed: int = field(default=0)

    @property
    def source(self) -> str:
        """The Python code of the class `Network`; `IMPORTS` go ahead of it."""
        layers = [f"        {line}" for line in self.layers]
        lines = [f"        {line}" for _, line in self.lines]
        names = ", ".join(name for name, _ in self.inputs)
        head = ["class Network(nn.Module):", "    def __init__(self):", "        super().__init__()", *layers, ""]
        body = [f"    def forward(self, {names}):", *lines, f"        return {self.output}", ""]
        return "\n".join([*head, *body])

    def step_of_line(self, number: int) -> int | None:
        """The index of the step that wrote a line of the compiled source, or None."""
        head = IMPORTS.count("\n") + 1 + len(self.layers) + 5  # a blank line, and those of `source` before the body
        at = number - head - 1
        return self.lines[at][0] if 0 <= at < len(self.lines) else None

    def build(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The module in eval mode with its weights, and its example inputs."""
        code = IMPORTS + "\n" + self.source
        linecache.cache[FILENAME] = (len(code), None, code.splitlines(keepends=True), FILENAME)
        namespace: dict[str, Any] = {"__name__": "drawn_network"}
        exec(compile(code, FILENAME, "exec"), namespace)
        with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
            model: nn.Module = fill(namespace["Network"](), self.seed, dict(self.odd)).to(dtype).eval()
        return model, self.examples(dtype)

    def examples(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """The example inputs: normal random numbers from the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _, shape in self.inputs)

    def __repr__(self) -> str:
        return f"\n{self}\n"  # Hypothesis prints what it found by this

    def __str__(self) -> str:
        shapes = ", ".join(f"{name}: {list(shape)}" for name, shape in self.inputs)
        odd = "".join(f"\n# {name}: {what}" for name, what in self.odd)
        return f"{self.source}# {shapes}, weights from seed {self.seed}{odd}"
