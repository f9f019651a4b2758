"""Grows a network step by step: the values that are there to be used, the names, and the choices behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from fxcompile.testing.network import Network, Step

T = TypeVar("T")
Shape = tuple[int, ...]


class Picker(Protocol):
    """Where choices come from: Hypothesis, or a random generator. 0 is the simplest choice."""

    def turn(self, step: int) -> None:
        """What is chosen from here on is for another step: its number."""
        ...

    def below(self, count: int) -> int:
        """A number from 0 to `count - 1`, evenly."""
        ...


@dataclass(frozen=True)
class Value:
    """A tensor that forward has computed.

    Attributes:
        name: its variable.
        shape: without the batch: channels first, then the axes of the map; one number for a vector.
        step: the index of the step that made it, and which of that step's values it is.
        memory: equal for values that share memory, which in-place operations must know.
    """

    name: str
    shape: Shape
    step: tuple[int, int]
    memory: int

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def sizes(self) -> Shape:
        """The axes of the map."""
        return self.shape[1:]

    @property
    def dims(self) -> int:
        return len(self.shape) - 1

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Layer:
    """A layer that may be called again, or share its weight with another one.

    Attributes:
        name: its attribute.
        gives: the output shape for an input shape, or None where it takes no such input.
        twin_takes: whether a layer with the same weight, but other options, may take an input shape.
        twin: for layers with a weight, makes such a layer: `twin(draft, value)`.
    """

    name: str
    gives: Callable[[Shape], Shape | None]
    twin_takes: Callable[[Shape], bool] = lambda shape: False
    twin: Callable[[Draft, Value], Value | None] | None = None


@dataclass(frozen=True)
class Line:
    """A line of forward; `layer` and `source` are set where it does no more than call a layer on one value."""

    step: int
    target: str
    text: str
    layer: str = ""
    source: str = ""

    def __str__(self) -> str:
        return f"{self.target} = {self.text}" if self.target else self.text


CHOICES = 250
"""Choices are drawn from no more numbers than that: a byte does for each."""

FORCE = 19
"""How many times likelier a choice is the planted one than any other one of all."""


@dataclass
class Draft:
    """A network while it grows.

    Attributes:
        picker: where choices come from.
        strict: take a forced choice always, not only most of the time.
        plain: what is not forced is the simplest, most of the time.
        options: for each step, what each of its choices was made from.
    """

    picker: Picker
    strict: bool = False
    plain: bool = False
    inputs: list[tuple[str, Shape]] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    layers: list[tuple[str, str]] = field(default_factory=list)
    made_by: dict[str, int] = field(default_factory=dict)
    extras: list[str] = field(default_factory=list)
    callable: list[Layer] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    odd: dict[str, str] = field(default_factory=dict)
    options: list[dict[str, tuple[Any, ...]]] = field(default_factory=list)
    _offered: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    _choices: dict[str, Any] = field(default_factory=dict)
    _forced: Mapping[str, Any] = field(default_factory=dict)
    _sources: list[tuple[int, int]] = field(default_factory=list)
    _wanted: list[tuple[int, int]] = field(default_factory=list)
    _counts: dict[str, int] = field(default_factory=dict)
    _made: int = 0
    _memories: int = 0

    # choices

    def pick(self, name: str, options: Sequence[T]) -> T:
        """One of the options, the first being the simplest; the forced one most of the time, where there is one."""
        while name in self._choices:
            name += " again"
        count = len(options)
        at = self.picker.below(count * min(FORCE + 1, CHOICES // count)) if count > 1 else 0
        chosen = options[at % count]
        if name in self._forced and (at >= count or self.strict) and self._forced[name] in options:
            chosen = options[options.index(self._forced[name])]
        elif self.plain and at >= count:
            chosen = options[0]
        self._choices[name] = chosen
        self._offered[name] = tuple(options)
        return chosen

    def source(self, accepts: Callable[[Value], bool]) -> Value | None:
        """A value to work on: what a planted step worked on, mostly the newest, at times an older one."""
        found = [value for value in reversed(self.values) if accepts(value)]
        at = self.picker.below(8)
        if not found:
            return None
        chosen = found[max(at - 4, 0) % len(found)]
        if self._wanted:
            wanted = self._wanted.pop(0)
            chosen = next((value for value in found if value.step == wanted), chosen)
        self._sources.append(chosen.step)
        return chosen

    def earlier(self, layers: Sequence[Layer]) -> Layer:
        """A layer to call again or to share a weight with: what a planted step took, or any, the newest first."""
        chosen = layers[-1 - self.picker.below(4 * len(layers)) // 4]
        if self._wanted:
            wanted = self._wanted.pop(0)
            chosen = next((layer for layer in layers if self._place(layer) == wanted), chosen)
        self._sources.append(self._place(chosen))
        return chosen

    def _place(self, layer: Layer) -> tuple[int, int]:
        """The step that made a layer, and which of that step's layers it is, counted down from -1."""
        step = self.made_by[layer.name]
        return step, ~[other.name for other in self.callable if self.made_by[other.name] == step].index(layer.name)

    # writing

    def begin(self, forced: Mapping[str, Any] | None = None, wanted: Sequence[tuple[int, int]] = ()) -> None:
        """Start a step; a planted one is forced to its choices and wants its sources."""
        self._choices, self._offered, self._sources, self._made = {}, {}, [], 0
        self._forced, self._wanted = forced or {}, list(wanted)

    def end(self, kind: str) -> None:
        """Record the step."""
        self.steps.append(Step(kind, tuple(self._choices.items()), tuple(self._sources)))
        self.options.append(self._offered)

    def wrote(self) -> bool:
        """Whether the step under way has written a line of forward."""
        return bool(self.lines) and self.lines[-1].step == len(self.steps)

    def name(self, prefix: str) -> str:
        """The next free name with this prefix."""
        self._counts[prefix] = self._counts.get(prefix, 0) + 1
        return f"{prefix}{self._counts[prefix]}"

    def layer(self, prefix: str, text: str) -> str:
        """A line of `__init__`; returns the attribute's name."""
        name = self.name(prefix)
        self.layers.append((name, text))
        self.made_by[name] = len(self.steps)
        return name

    def parameter(self, prefix: str, shape: Sequence[int]) -> str:
        """A bare parameter; returns how forward reads it."""
        return f"self.{self.layer(prefix, f'nn.Parameter(torch.empty({text(shape)}))')}"

    def buffer(self, prefix: str, shape: Sequence[int]) -> str:
        """A bare buffer; returns how forward reads it."""
        return f"self.{self.layer(prefix, f'nn.Buffer(torch.empty({text(shape)}))')}"

    def compute(self, expression: str, shape: Shape, view_of: Value | None = None) -> Value:
        """A line of forward that makes a new value."""
        target = self.name("y")
        self.lines.append(Line(len(self.steps), target, expression))
        return self._value(target, shape, view_of)

    def call(self, name: str, x: Value, shape: Shape, view: bool = False) -> Value:
        """A line of forward that calls a layer."""
        target = self.name("y")
        self.lines.append(Line(len(self.steps), target, f"self.{name}({x.name})", name, x.name))
        return self._value(target, shape, x if view else None)

    def several(self, expression: str, shapes: Sequence[Shape], view_of: Value) -> list[Value]:
        """A line of forward that takes a value apart."""
        targets = [self.name("y") for _ in shapes]
        self.lines.append(Line(len(self.steps), ", ".join(targets) + "," * (len(targets) == 1), expression))
        return [self._value(target, shape, view_of) for target, shape in zip(targets, shapes, strict=True)]

    def statement(self, text: str) -> None:
        """A line of forward that makes no value."""
        self.lines.append(Line(len(self.steps), "", text))

    def overwrite(self, x: Value, text: str) -> Value:
        """A line of forward that changes a value in place, under its own name."""
        self.statement(text)
        self.values.remove(x)
        return self._value(x.name, x.shape, x)

    def _value(self, name: str, shape: Shape, view_of: Value | None) -> Value:
        memory = view_of.memory if view_of is not None else self._memories
        self._memories += 1
        value = Value(name, tuple(shape), (len(self.steps), self._made), memory)
        self._made += 1
        self.values.append(value)
        return value

    def alone(self, x: Value) -> bool:
        """Whether no other value shares a value's memory, so that an in-place operation is plain to follow."""
        return sum(value.memory == x.memory for value in self.values) == 1

    def add_input(self, name: str, batch: int, shape: Shape) -> None:
        """An input of the network."""
        self.inputs.append((name, (batch, *shape)))
        self._value(name, shape, None)

    # the end

    def unused(self) -> list[Value]:
        """The values that no line reads."""
        words = {word for line in self.lines for word in _words(line.text)}
        return [value for value in self.values if value.name not in words]

    def finish(self, output: str, seed: int, sequential: bool) -> Network:
        """The network as it is now; layers that follow each other may go into an `nn.Sequential`."""
        self.end("output")
        layers, lines, renamed = list(self.layers), list(self.lines), dict[str, str]()
        if sequential:
            layers, lines, renamed = _grouped(self, output)
        named = [f"self.{name} = {text}" for name, text in layers]
        return Network(
            inputs=tuple(self.inputs),
            layers=(*named, *self.extras),
            lines=tuple((line.step, str(line)) for line in lines),
            output=output,
            names=tuple((renamed.get(name, name), step) for name, step in self.made_by.items()),
            steps=tuple(self.steps),
            odd=tuple((renamed.get(name, name), what) for name, what in self.odd.items()),
            seed=seed,
        )


def _words(text: str) -> list[str]:
    return "".join(char if char.isalnum() or char in "_." else " " for char in text).replace(".", " ").split()


def _grouped(draft: Draft, output: str) -> tuple[list[tuple[str, str]], list[Line], dict[str, str]]:
    """Layers that are called once, one on the output of the other and nothing else on it, as one `nn.Sequential`."""
    texts = dict(draft.layers)
    words = [word for line in draft.lines for word in _words(line.text)] + _words(output)
    extra = {word for line in draft.extras for word in _words(line)}

    def simple(line: Line) -> bool:
        return bool(line.layer) and words.count(line.layer) == 1 and line.layer not in extra

    runs: list[list[Line]] = []
    for line in draft.lines:
        last = runs[-1][-1] if runs else None
        if last and simple(last) and simple(line) and line.source == last.target and words.count(last.target) == 1:
            runs[-1].append(line)
        else:
            runs.append([line])
    layers, lines, renamed, count = dict(draft.layers), list[Line](), dict[str, str](), 0
    for run in runs:
        if len(run) == 1:
            lines.append(run[0])
            continue
        count += 1
        body = f"body{count}"
        parts = [texts[line.layer] for line in run]
        for index, line in enumerate(run):
            renamed[line.layer] = f"{body}.{index}"
            del layers[line.layer]
        layers[body] = f"nn.Sequential({', '.join(parts)})"
        lines.append(Line(run[0].step, run[-1].target, f"self.{body}({run[0].source})"))
    return list(layers.items()), lines, renamed


# text


def text(value: Any) -> str:
    """A value as Python."""
    return repr(tuple(value)) if isinstance(value, (tuple, list)) else repr(value)


def size(values: Sequence[int]) -> str:
    """Sizes for each axis as layers take them: one number if they are all the same."""
    return repr(values[0]) if len(set(values)) == 1 else repr(tuple(values))


def arguments(*positional: object, **named: object) -> str:
    """Arguments of a call: positional ones are Python text already; named ones that are None are left out."""
    parts = [str(item) for item in positional]
    parts += [f"{key}={value if isinstance(value, Text) else text(value)}" for key, value in named.items()
              if value is not None]  # fmt: skip
    return ", ".join(parts)


class Text(str):
    """Text that is Python code already."""

    __slots__ = ()
