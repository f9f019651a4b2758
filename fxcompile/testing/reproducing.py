"""Writes a failure as a Python file of its own: the model, its numbers, the pass, the input, the comparison."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fxcompile.drawing import SCALES, Case, moments
from fxcompile.rewriting import Pass
from fxcompile.testing.network import IMPORTS, Network, fill

HEAD = '''"""{title}

{evidence}
Written by fxcompile.testing. Run it with Python: it exits with 1 as long as the promise is broken.
"""

import sys
from collections.abc import Mapping
from typing import Any

{imports}
{passes}

{source}

{fill}

model = fill(Network(), seed={seed}, odd={odd}).eval()
{examples}
passes = [{made}]
{inputs}
'''

COMPARE = '''
def flat(value):
    """All tensors of an output."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in (value.values() if isinstance(value, dict) else value) for tensor in flat(item)]


program = fxc.trace(model, examples)
result = fxc.PassManager(passes, seed={seed}, verify="off").run(program)
with torch.no_grad():
    wanted = flat(model(*[tensor.clone() for tensor in inputs]))
    own = [tensor.clone() for tensor in inputs]
    given = flat(result.module(*own))
broken = len(given) != len(wanted)
if not all(map(torch.equal, own, inputs)):
    print("the rewritten module writes to its inputs")
    broken = True
for name, ours, theirs in zip(program.output_names, given, wanted):
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        print(f"{{name}}: {{tuple(ours.shape)}} {{ours.dtype}} instead of {{tuple(theirs.shape)}} {{theirs.dtype}}")
        broken = True
        continue
    difference, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    print(f"{{name}}: max|d| = {{difference:.3e}}, max|y| = {{largest:.3e}}, allowed is 1e-12 of it")
    broken |= not difference <= 1e-12 * largest
sys.exit(1 if broken else 0)
'''

PROMISE = """
trial = Trial(model, examples, tuple(passes), {arguments})
try:
    {call}
except Broken as broken:
    print("broken:", broken)
    sys.exit(1)
print("the promise is kept")
"""


def reproducer(
    title: str,
    evidence: str,
    network: Network,
    passes: Sequence[Pass],
    inputs: Sequence[tuple[Case, tuple[Tensor, ...]]],
    *,
    promise: str,
    home: str,
    plain: bool = False,
    seed: int = 0,
    exact: bool = False,
    samples: int = 0,
    site: int = 0,
) -> str:
    """The text of the file.

    Args:
        title: the sentence that says which pass breaks what.
        evidence: the figures.
        inputs: the cases that are compared on, and their tensors; the first ones that break it are best.
        promise: the name of the function that checks it, in the module `home`.
        plain: whether the outputs must be equal, and nothing else is promised: the file then compares them itself.
        samples: calibration samples, 0 for none.
        site: which one `only` and `skip` are tried on.
    """
    imports = IMPORTS + ("\nimport fxcompile as fxc" if plain else "")
    if not plain:
        imports += f"\nfrom {home} import {promise}\nfrom fxcompile.testing.trial import Trial, calibration_of"
        imports += "\nfrom fxcompile.comparing import Broken"
    lines, made = import_lines(passes)
    parts = {
        "title": title.replace('"""', "'''"),
        "evidence": textwrap.fill(evidence.replace('"""', "'''").replace("\\", "/"), 116) + "\n" if evidence else "",
        "imports": imports,
        "passes": "\n".join(lines),
        "source": "\n" + network.source.strip() + "\n",
        "fill": inspect.getsource(fill).strip() + "\n",
        "seed": network.seed,
        "odd": repr(dict(network.odd)),
        "examples": examples_text(network),
        "made": ", ".join(made),
        "inputs": inputs_text(network, inputs if not plain else inputs[:1], many=not plain),
    }
    text = HEAD.format(**parts)
    if plain:
        return text + COMPARE.format(seed=seed)
    arguments = [f"inputs, exact={exact}, seed={seed}", *([f"site={site}"] if promise == "selection" else [])]
    if samples:
        text += calibration_text(network, samples)
        arguments.append("calibration=calibration")
    return text + PROMISE.format(arguments=", ".join(arguments), call=f"{promise}(trial)")


def import_lines(passes: Sequence[Pass]) -> tuple[list[str], list[str]]:
    """Lines that import the classes of passes, and the expressions that make the passes."""
    lines: dict[str, None] = {}
    made: list[str] = []
    for pass_ in passes:
        kind = type(pass_)
        options = ", ".join(f"{name}={value!r}" for name, value in pass_.options().items())
        made.append(f"{kind.__name__}({options})")
        for line in class_lines(kind):
            lines[line] = None
    return list(lines), made


def class_lines(kind: type) -> list[str]:
    """Lines after which a class is known by its name."""
    module = sys.modules.get(kind.__module__)
    path = getattr(module, "__file__", None)
    name = kind.__module__
    lines: list[str] = []
    if name == "__main__" and path is not None:
        name = Path(path).stem
    if path is not None and not importable(name, path):
        depth = name.count(".") + (Path(path).stem == "__init__")
        lines.append(f"sys.path.append({str(Path(path).resolve().parents[depth])!r})")
    if "<locals>" not in kind.__qualname__:
        top, *rest = kind.__qualname__.split(".")
        lines.append(f"from {name} import {top}")
        return [*lines, f"{kind.__name__} = {kind.__qualname__}"] if rest else lines
    lines.append(f"import {name}")
    lines.append(f"globals().update(vars({name}))  # the pass is defined inside of a function there: this is its code")
    return [*lines, textwrap.dedent(inspect.getsource(kind))]


def importable(name: str, path: str) -> bool:
    """Whether Python finds a module without help: it is installed, or a part of what is."""
    package = name.partition(".")[0]
    places = [item for item in sys.path if "site-packages" in item or "dist-packages" in item]
    if any(Path(path).resolve().is_relative_to(Path(place).resolve()) for place in places if place):
        return True
    return package == "fxcompile"


def examples_text(network: Network) -> str:
    """Code that makes the example inputs."""
    lines = [f"generator = torch.Generator().manual_seed({network.seed})", "examples = ("]
    lines += [
        f"    torch.randn({tuple(shape)}, generator=generator, dtype=torch.float64),  # {name}"
        for name, shape in network.inputs
    ]
    return "\n".join([*lines, ")"])


def inputs_text(network: Network, inputs: Sequence[tuple[Case, tuple[Tensor, ...]]], many: bool) -> str:
    """Code that makes the inputs to compare on: one tuple, or a list of them."""
    lines: list[str] = []
    for case, tensors in inputs:
        lines.append(f"generator = torch.Generator().manual_seed({case.seed})  # {case}")
        lines.append("inputs.append((" if many else "inputs = (")
        parts = zip(tensors, network.examples(), strict=True)
        lines += [f"    {tensor_text(tensor, case, example)}," for tensor, example in parts]
        lines.append("))" if many else ")")
    if many:
        return "\n".join(["inputs = []", *lines])
    return "\n".join(lines) if lines else "inputs = examples"


def tensor_text(tensor: Tensor, case: Case, example: Tensor) -> str:
    """An expression that gives a tensor, to the last bit; random ones draw from `generator`."""
    shape = tuple(tensor.shape)
    if case.kind in SCALES:  # whatever the numbers are: the next input's are drawn after them
        mean, deviation = moments(example)
        return (
            f"(torch.randn({shape}, generator=generator, dtype=torch.float64) * {deviation!r} + {mean!r})"
            f" * {SCALES[case.kind]!r}"
        )
    zeros = f"torch.zeros({shape}, dtype={tensor.dtype})"
    found = tensor.flatten().nonzero().flatten().tolist()
    if not found:
        return zeros
    first = tensor.flatten()[found[0]].item()
    if len(found) == 1 and tensor.numel() > 1:
        return f"{zeros}.flatten().index_fill(0, torch.tensor({found[0]}), {first!r}).reshape({shape})"
    if bool((tensor == first).all()):
        return f"torch.full({shape}, {first!r}, dtype={tensor.dtype})"
    return f"torch.tensor({tensor.tolist()!r}, dtype={tensor.dtype})"


def calibration_text(network: Network, samples: int) -> str:
    """Code that makes calibration samples."""
    names = [name for name, _ in network.inputs]
    return f"calibration = calibration_of(examples, {names}, {samples})\n"
