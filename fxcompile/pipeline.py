"""Pipelines as text and back: `fold-batchnorm, stack-kernels(rank=0.5, only=[features.*])`.

    pipeline := [pass {"," pass} [","]]
    pass     := NAME ["(" [NAME "=" value {"," NAME "=" value}] ")"]
    value    := number | "quoted" | true | false | none | "[" [value {"," value}] "]" | word

A word is any text without blanks, commas, quotes or brackets, so globs need no quotes. Comments run from `#` to the
end of the line. `parse_pipeline(format_pipeline(passes)) == passes` for every list of passes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from fxcompile.errors import PipelineError, did_you_mean
from fxcompile.registry import find_pass
from fxcompile.rewriting import Pass

_TOKEN = re.compile(
    r"""(?P<blank>(?:\s|\#[^\n]*)+)
      | (?P<punct>[(),=\[\]])
      | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<word>[^\s(),=\[\]"'#]+)""",
    re.VERBOSE,
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_CONSTANTS = {"true": True, "false": False, "none": None, "True": True, "False": False, "None": None}


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int


def parse_pipeline(text: str) -> list[Pass]:
    """The passes that a pipeline text names, with their options checked.

    Raises:
        PipelineError: the text does not parse, or names an unknown pass or option, or a value is out of range; with
            the column and, for a misspelling, the nearest right name.
    """
    return _Parser(text).pipeline()


def format_pipeline(passes: Sequence[Pass]) -> str:
    """The text of a list of passes, options at their defaults left out."""
    return ", ".join(map(str, passes))


def format_value(value: Any) -> str:
    """An option's value as pipeline text."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, str):
        matched = _TOKEN.fullmatch(value)
        plain = matched is not None and matched.lastgroup == "word"
        return value if plain and value not in _CONSTANTS and not _NUMBER.fullmatch(value) else _quoted(value)
    return repr(value)


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def make_pass(name: str, options: dict[str, Any], place: str | None = None) -> Pass:
    """A pass by name, its options validated.

    Raises:
        PipelineError: no such pass or option, or a value that the option does not take.
    """
    try:
        kind = find_pass(name)
    except PipelineError as error:
        raise PipelineError(error.problem, place=place, mend=error.mend) from None
    try:
        return kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            problem, mend = f"pass '{name}' has no option '{option}'", did_you_mean(option, kind.model_fields)
        else:
            message = first["msg"].removeprefix("Value error, ")
            problem = f"option '{option}' of pass '{name}' is {format_value(first['input'])}: {message}"
            described = kind.model_fields[option].description if option in kind.model_fields else None
            mend = f"it is the {described}" if described else "see `fxcompile passes " + name + "`"
        raise PipelineError(problem, place=place, mend=mend) from None


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[_Token] = []
        self.at = 0
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise self.error("this quote is never closed", position, "close it")
            if match.lastgroup != "blank":
                self.tokens.append(_Token(str(match.lastgroup), match.group(), position))
            position = match.end()

    def error(self, problem: str, position: int, mend: str) -> PipelineError:
        return PipelineError(problem, place=self.place(position), mend=mend)

    def place(self, position: int) -> str:
        line = self.text.count("\n", 0, position) + 1
        column = position - (self.text.rfind("\n", 0, position) + 1) + 1
        return f"--passes, column {column}" if line == 1 else f"--passes, line {line}, column {column}"

    @property
    def here(self) -> int:
        return self.tokens[self.at].start if self.at < len(self.tokens) else len(self.text)

    def peek(self, text: str) -> bool:
        return self.at < len(self.tokens) and self.tokens[self.at].text == text

    def take(self, text: str) -> bool:
        found = self.peek(text)
        self.at += found
        return found

    def expect(self, text: str, after: str) -> None:
        if not self.take(text):
            found = f"'{self.tokens[self.at].text}'" if self.at < len(self.tokens) else "the end"
            raise self.error(f"'{text}' is wanted after {after}, not {found}", self.here, "write name(option=value, ...)")

    def word(self, what: str) -> tuple[str, int]:
        position = self.here
        if self.at >= len(self.tokens) or self.tokens[self.at].kind != "word":
            found = f"'{self.tokens[self.at].text}'" if self.at < len(self.tokens) else "the end"
            raise self.error(f"{what} is wanted, not {found}", position, "write name(option=value, ...)")
        self.at += 1
        return self.tokens[self.at - 1].text, position

    def pipeline(self) -> list[Pass]:
        passes: list[Pass] = []
        while self.at < len(self.tokens):
            name, position = self.word("a pass's name")
            options = self.options(name) if self.take("(") else {}
            passes.append(make_pass(name, options, self.place(position)))
            if self.at < len(self.tokens):
                self.expect(",", f"pass '{name}'")
        return passes

    def options(self, owner: str) -> dict[str, Any]:
        options: dict[str, Any] = {}
        while not self.take(")"):
            if options:
                self.expect(",", f"an option of '{owner}'")
                if self.take(")"):
                    break
            name, position = self.word("an option's name")
            self.expect("=", f"option '{name}'")
            if name in options:
                raise self.error(f"option '{name}' of pass '{owner}' is given twice", position, "keep one of them")
            options[name] = self.value(name)
        return options

    def value(self, option: str) -> Any:
        if self.take("["):
            items: list[Any] = []
            while not self.take("]"):
                if items:
                    self.expect(",", f"a value of '{option}'")
                    if self.take("]"):
                        break
                items.append(self.value(option))
            return tuple(items)
        position = self.here
        if self.at < len(self.tokens) and self.tokens[self.at].kind == "string":
            self.at += 1
            try:
                return ast.literal_eval(self.tokens[self.at - 1].text)
            except (SyntaxError, ValueError):
                raise self.error(f"the text of '{option}' does not parse", position, "escape backslashes") from None
        text, _ = self.word(f"a value for '{option}'")
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        return ast.literal_eval(text.lstrip("+")) if _is_number(text) else text


def _is_number(text: str) -> bool:
    if not _NUMBER.fullmatch(text):
        return False
    try:
        ast.literal_eval(text.lstrip("+"))
    except (SyntaxError, ValueError):  # 007
        return False
    return True
