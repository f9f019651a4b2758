"""What drawn networks contain: a table of features, and their shares among many draws."""

from __future__ import annotations

import re
import statistics as figures
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fxcompile.errors import FxcompileError
from fxcompile.layers import is_finite
from fxcompile.program import flatten_tensors
from fxcompile.testing.network import Network
from fxcompile.tracing import trace

Feature = Callable[[Network], bool]


def wrote(pattern: str) -> Feature:
    """The source has this regular expression."""
    found = re.compile(pattern)
    return lambda network: found.search(network.source) is not None


def has(kind: str, **choices: object) -> Feature:
    """A step of a kind has these choices; a choice that is given as a set may be any of it."""

    def fits(held: object, wanted: object) -> bool:
        return held in wanted if isinstance(wanted, set) else held == wanted

    wanted = {name.replace("_", " "): value for name, value in choices.items()}
    return lambda network: any(
        step.kind == kind and all(fits(step[name], value) for name, value in wanted.items()) for step in network.steps
    )


def follows(first: str, second: str, head: str) -> Feature:
    """A step of one kind takes what one of the other kind gives, or a head is written in this way."""

    def found(network: Network) -> bool:
        pairs = ((step, network.steps[number]) for step in network.steps for number, _ in step.sources)
        heads = (str(step["form"]) for step in network.steps if step.kind == "head")
        return any((step.kind, source.kind) == (second, first) for step, source in pairs) or any(
            re.search(head, form) for form in heads
        )

    return found


def odd(what: str) -> Feature:
    """A layer has these unusual statistics or weights."""
    return lambda network: what in dict(network.odd).values()


WITHIN = r"(?:[^()]|\([^()]*\))*?"
"""The arguments of a call, up to what is looked for."""

CONV = r"nn\.Conv[123]d\(" + WITHIN
ANY_CONV = r"(nn\.Conv|F\.conv)[123]d\(" + WITHIN
NORM = r"nn\.BatchNorm[123]d\(" + WITHIN

FEATURES: dict[str, Feature] = {
    "convolution": wrote(ANY_CONV),
    "convolution 1-d": wrote(r"(nn\.Conv|F\.conv)1d\("),
    "convolution 3-d": wrote(r"(nn\.Conv|F\.conv)3d\("),
    "functional convolution": wrote(r"F\.conv[123]d\("),
    "stride": wrote(ANY_CONV + r"stride="),
    "uneven stride": wrote(ANY_CONV + r"stride=\("),
    "padding": wrote(ANY_CONV + r"padding=[1-9]"),
    "uneven padding": wrote(ANY_CONV + r"padding=\("),
    "padding same": wrote(ANY_CONV + r"padding='same'"),
    "padding valid": wrote(ANY_CONV + r"padding='valid'"),
    "padding reflect": wrote(CONV + r"'reflect'"),
    "padding replicate": wrote(CONV + r"'replicate'"),
    "padding circular": wrote(CONV + r"'circular'"),
    "dilation": wrote(ANY_CONV + r"dilation="),
    "groups": wrote(ANY_CONV + r"groups="),
    "depthwise": lambda network: any(
        inputs == groups != "1"
        for inputs, groups in re.findall(rf"nn\.Conv[123]d\((\d+), {WITHIN}groups=(\d+)", network.source)
    ),
    "bias": wrote(r"nn\.Conv[123]d\((?!(?:[^()]|\([^()]*\))*bias=False)"),
    "no bias": wrote(CONV + r"bias=False"),
    "even kernel": has("convolution", kernel={2, 4}),
    "non-square kernel": wrote(r"nn\.Conv[123]d\(\d+, \d+, \("),
    "transposed convolution": wrote(r"(nn\.ConvTranspose|F\.conv_transpose)[123]d\("),
    "output padding": wrote(r"output_padding="),
    "output size": wrote(r"output_size="),
    "dead filters": odd("dead filters"),
    "dead inputs": odd("dead inputs"),
    "equal filters": odd("equal filters"),
    "batch norm": wrote(r"nn\.BatchNorm"),
    "functional batch norm": wrote(r"F\.batch_norm"),
    "batch norm of a vector": wrote(r"nn\.BatchNorm1d"),
    "batch norm without affine": wrote(NORM + r"affine=False"),
    "batch norm by the batch": wrote(NORM + r"track_running_stats=False"),
    "large eps": wrote(NORM + r"eps=0\.5"),
    "tiny variance": odd("tiny variance"),
    "no variance": odd("no variance"),
    "large variance": odd("large variance"),
    "large mean": odd("large mean"),
    "negative gamma": odd("negative gamma"),
    "zero gamma": odd("zero gamma"),
    "instance norm": wrote(r"InstanceNorm|F\.instance_norm"),
    "group norm": wrote(r"GroupNorm|F\.group_norm"),
    "layer norm": wrote(r"LayerNorm|F\.layer_norm"),
    "root mean square norm": wrote(r"RMSNorm"),
    "local response norm": wrote(r"LocalResponseNorm|local_response_norm"),
    "activation as a layer": wrote(r"nn\.(ReLU|SiLU|GELU|Sigmoid|Tanh|ELU|Mish|Hardswish)"),
    "activation as a function": wrote(r"(F|torch)\.(relu|silu|gelu|sigmoid|tanh|elu|mish|hardswish)\("),
    "activation as a method": wrote(r"\)?\.(relu|sigmoid|tanh)\(\)"),
    "activation in place": wrote(r"inplace=True|relu_\(|sigmoid_\(|elu_\("),
    "prelu": wrote(r"nn\.PReLU|F\.prelu"),
    "softmax": wrote(r"nn\.Softmax|F\.softmax|\.softmax\("),
    "max pool": wrote(r"MaxPool[123]d|max_pool[123]d"),
    "average pool": wrote(r"nn\.AvgPool|F\.avg_pool"),
    "ceil mode": wrote(r"ceil_mode=True"),
    "no ceil mode": wrote(r"(MaxPool|AvgPool)[123]d\((?!(?:[^()]|\([^()]*\))*ceil_mode)"),
    "padding not counted": wrote(r"count_include_pad=False"),
    "divisor": wrote(r"divisor_override="),
    "adaptive pool": wrote(r"nn\.Adaptive|F\.adaptive"),
    "global pool": wrote(r"\.mean\(|\.amax\(|torch\.mean"),
    "padding layer": wrote(r"nn\.\w+Pad[123]d"),
    "asymmetric padding": has("pad", sides={"before", "after", "uneven"}),
    "cropping": has("pad", sides="crop"),
    "residual add": has("residual"),
    "add of branches": has("add"),
    "add in place": wrote(r"\+= |add_\("),
    "concat": wrote(r"torch\.cat\("),
    "split": wrote(r"split\("),
    "chunk": wrote(r"chunk\("),
    "slice": wrote(r"\[:, "),
    "squeeze and excitation": has("squeeze and excitation"),
    "channel shuffle": has("channel shuffle"),
    "pixel shuffle": has("pixel shuffle"),
    "layer called twice": lambda network: any(
        len(re.findall(rf"self\.{name.partition('.')[0]}\(", network.source)) > 1
        for name in {name for name, _ in network.names}
    ),
    "tied weights": has("tied"),
    "frozen weight": wrote(r"requires_grad_\(False\)"),
    "several inputs": lambda network: len(network.inputs) > 1,
    "several outputs": lambda network: network.output[0] in "([{",
    "outputs by name": lambda network: network.output[0] == "{",
    "flatten and linear": follows("flatten", "linear", head=r"flatten\("),
    "global pool head": follows("global pool", "linear", head=r"mean\(|pool"),
    "linear": wrote(r"nn\.Linear|F\.linear|torch\.matmul"),
    "interpolation": wrote(r"F\.interpolate|nn\.Upsample"),
    "dropout": wrote(r"[Dd]ropout"),
    "reshape": wrote(r"\.(reshape|view|flatten)\(|torch\.flatten|nn\.Flatten"),
    "permute": wrote(r"permute\(|transpose\(|movedim\("),
    "arithmetic with a number": has("arithmetic"),
    "nested layers": wrote(r"nn\.Sequential"),
    "attention": has("attention"),
}  # fmt: skip
"""By name, whether a network has it."""


@dataclass(frozen=True)
class Statistics:
    """What many drawn networks are like.

    Attributes:
        draws: how many there are.
        shares: for each feature, the share of networks that have it.
        steps: median number of steps.
        layers: median number of layers and bare tensors.
        valid: the share that builds, runs, gives finite numbers, and can be traced.
        alive: the share, of the valid ones, in which some output follows the input.
    """

    draws: int
    shares: dict[str, float]
    steps: float
    layers: float
    valid: float
    alive: float

    @property
    def missing(self) -> list[str]:
        """The features that no network has."""
        return [name for name, share in self.shares.items() if share == 0]

    def __str__(self) -> str:
        head = (
            f"{self.draws} networks: {self.valid:.1%} valid, {self.alive:.1%} of them alive; "
            f"median {self.steps:g} steps, {self.layers:g} layers"
        )
        return "\n".join([head, *(f"{share:7.1%}  {name}" for name, share in self.shares.items())])


def statistics(draws: Iterable[Network]) -> Statistics:
    """The share of each feature among drawn networks, how large they are, and how many are valid."""
    networks = list(draws)
    states = [state(network) for network in networks]
    valid = [item for item in states if item is not None]
    count = max(len(networks), 1)
    return Statistics(
        len(networks),
        {name: sum(map(feature, networks)) / count for name, feature in FEATURES.items()},
        figures.median(len(network.steps) - 2 for network in networks),
        figures.median(len(network.layers) for network in networks),
        len(valid) / count,
        sum(valid) / max(len(valid), 1),
    )


def state(network: Network) -> bool | None:
    """Whether a network follows its input, or None where it is not valid."""
    try:
        model, examples = network.build()
        with torch.no_grad():
            outputs = flatten_tensors(model(*[tensor.clone() for tensor in examples]))
            others = flatten_tensors(model(*[tensor.flip(0) * 1.5 + 0.25 for tensor in examples]))
        if not all(map(is_finite, outputs)):
            return None
        trace(model, examples)
    except (FxcompileError, RuntimeError, ValueError):
        return None
    return any(not torch.equal(a, b) for a, b in zip(outputs, others, strict=True))
