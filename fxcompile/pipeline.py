"""Pipelines as text and back: `fold-batchnorm, stack-kernels(rank=0.5, only=[features.*])`.

    pipeline := [pass {"," pass} [","]]
    pass     := NAME ["(" [NAME "=" value {"," NAME "=" value} [","]] ")"]
    value    := number | "quoted" | true | false | none | "[" [value {"," value} [","]] "]" | word

A word is any text without blanks, commas, quotes or brackets, so globs need no quotes; what an option does not take as
a number or constant it takes as text (`skip=[0, 3]` are layers of those names), and one value for a list is a list of
one. Comments run from `#` to the end of the line. `parse_pipeline(format_pipeline(passes)) == passes` for every list
of passes.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fxcompile.errors import PipelineError, UsageError
from fxcompile.options import misfit, no_option
from fxcompile.registry import find_pass
from fxcompile.rewriting import Pass

_TOKEN = re.compile(
    r"""(?P<blank>(?:[\s\ufeff]|\#[^\n]*)+)
      | (?P<punct>[(),=\[\]])
      | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<word>[^\s\ufeff(),=\[\]"'#]+)""",
    re.VERBOSE | re.DOTALL,
)
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d*)", re.ASCII)
_FLOAT = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|inf|nan)", re.ASCII)
_CONSTANTS = {"true": True, "false": False, "none": None, "True": True, "False": False, "None": None}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}
_FORM = "write name(option=value, ...), name, ..."


def parse_pipeline(text: str, source: str = "the pipeline") -> list[Pass]:
    """The passes that a pipeline text names, with their options checked.

    Args:
        source: what to call the text in errors: the option or the file that it comes from.

    Raises:
        PipelineError: the text does not parse, or names an unknown pass or option, or a value is out of range; with
            the column and, for a misspelling, the nearest right name.
    """
    return _Parser(text, source).pipeline()


def format_pipeline(passes: Sequence[Pass], *, complete: bool = False) -> str:
    """The text of a list of passes.

    Args:
        complete: write every option, so that the text means the same where the defaults are others; else only those
            that were given.
    """
    return ", ".join(_format_pass(item, complete) for item in passes)


def _format_pass(item: Pass, complete: bool) -> str:
    options = ", ".join(f"{key}={format_value(value)}" for key, value in item.options(complete).items())
    return f"{item.name}({options})" if options else item.name


def format_value(value: Any) -> str:
    """An option's value as pipeline text."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return format_value(value.value)
    if isinstance(value, os.PathLike):
        return format_value(os.fspath(value))
    if isinstance(value, str):
        matched = _TOKEN.fullmatch(value)
        plain = matched is not None and matched.lastgroup == "word" and literal(value) is value
        return value if plain else _quoted(value)
    return repr(value)


def literal(word: str) -> Any:
    """A word as the number or constant it spells, or the word itself."""
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    if _INTEGER.fullmatch(word):
        return int(word) if len(word) < 1000 else word
    return float(word) if _FLOAT.fullmatch(word) else word


def _quoted(value: str) -> str:
    def escaped(char: str) -> str:
        known = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", '"': '\\"'}
        return known.get(char) or (char if char.isprintable() or ord(char) > 0xFFFF else f"\\u{ord(char):04x}")

    return '"' + "".join(map(escaped, value)) + '"'


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int


@dataclass(frozen=True)
class _Value:
    """An option's value: what it reads as, first choice first, and where it stands."""

    readings: tuple[Any, ...]
    start: int


class _Parser:
    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source
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

    # errors

    def error(self, problem: str, position: int, mend: str | None) -> PipelineError:
        line = self.text.count("\n", 0, position) + 1
        column = position - (self.text.rfind("\n", 0, position) + 1) + 1
        where = f"column {column}" if line == 1 else f"line {line}, column {column}"
        return PipelineError(problem, place=f"{self.source}, {where}", mend=mend)

    def unexpected(self, what: str, mend: str = _FORM) -> PipelineError:
        found = f"'{self.tokens[self.at].text}'" if self.at < len(self.tokens) else "the end"
        return self.error(f"{what} is wanted, not {found}", self.here, mend)

    # tokens

    @property
    def here(self) -> int:
        return self.tokens[self.at].start if self.at < len(self.tokens) else len(self.text)

    def take(self, text: str) -> bool:
        found = self.at < len(self.tokens) and self.tokens[self.at] == _Token("punct", text, self.here)
        self.at += found
        return found

    def word(self, what: str) -> _Token:
        if self.at >= len(self.tokens) or self.tokens[self.at].kind != "word":
            raise self.unexpected(what)
        self.at += 1
        return self.tokens[self.at - 1]

    def more(self, closing: str, after: str) -> bool:
        """After an item of a list in brackets: whether another follows; takes the comma, or the closing bracket."""
        if self.take(closing):
            return False
        if not self.take(","):
            raise self.unexpected(f"',' or '{closing}' after {after}")
        return not self.take(closing)

    # grammar

    def pipeline(self) -> list[Pass]:
        passes: list[Pass] = []
        while self.at < len(self.tokens):
            name = self.word("a pass's name")
            options = self.options(name.text) if self.take("(") else {}
            passes.append(self.make(name, options))
            if self.at < len(self.tokens) and not self.take(","):
                raise self.unexpected(f"',' after pass '{name.text}'")
        return passes

    def options(self, owner: str) -> dict[str, _Value]:
        options: dict[str, _Value] = {}
        more = not self.take(")")
        while more:
            name = self.word("an option's name")
            if not self.take("="):
                raise self.unexpected(f"'=' after option '{name.text}'")
            if name.text in options:
                raise self.error(
                    f"option '{name.text}' of pass '{owner}' is given twice", name.start, "keep one of them"
                )
            options[name.text] = _Value(self.value(name.text), name.start)
            more = self.more(")", f"option '{name.text}'")
        return options

    def value(self, option: str) -> tuple[Any, ...]:
        """What a value reads as: itself, then as text."""
        if self.take("["):
            items: list[tuple[Any, ...]] = []
            more = not self.take("]")
            while more:
                items.append(self.value(option))
                more = self.more("]", f"a value of '{option}'")
            return tuple(item[0] for item in items), tuple(item[-1] for item in items)
        if self.at < len(self.tokens) and self.tokens[self.at].kind == "string":
            self.at += 1
            return (self.unquoted(self.tokens[self.at - 1]),)
        word = self.word(f"a value for '{option}'").text
        return literal(word), word

    def unquoted(self, token: _Token) -> str:
        def plain(match: re.Match[str]) -> str:
            code = match.group(1)
            if len(code) > 1:
                return chr(int(code[1:], 16))
            if code not in _ESCAPES:
                position = token.start + 1 + match.start()
                raise self.error(f"'\\{code}' means nothing here", position, "write \\\\ for a backslash")
            return _ESCAPES[code]

        return _ESCAPE.sub(plain, token.text[1:-1])

    # passes

    def make(self, name: _Token, options: dict[str, _Value]) -> Pass:
        """A pass by name, its options validated: each takes the first reading of its value that fits."""
        try:
            kind = find_pass(name.text)
        except PipelineError as error:
            raise self.error(error.problem, name.start, error.mend) from None
        for option, value in options.items():
            if option not in kind.model_fields:
                unknown = no_option(kind, name.text, option)
                raise self.error(unknown.problem, value.start, unknown.mend)
        readings = {
            option: [*value.readings, *((item,) for item in value.readings)] for option, value in options.items()
        }
        first: UsageError | None = None
        while True:
            try:
                made = kind(**{option: values[0] for option, values in readings.items()})
            except UsageError as refused:
                found = refused.__cause__
                if not isinstance(found, ValidationError):
                    raise
                first = first or refused
                wrong = {str(item["loc"][0]) for item in found.errors() if item["loc"]}
                if not wrong or any(len(readings.get(option, ())) < 2 for option in wrong):
                    raise self.refusal(kind, first, name, options) from None
                for option in wrong:
                    readings[option].pop(0)
                continue
            for option, values in readings.items():
                if isinstance(values[0], bool) and not isinstance(getattr(made, option), bool):
                    raise self.misfit(kind, option, options[option])
            return made

    def refusal(self, kind: type[Pass], refused: UsageError, name: _Token, options: dict[str, _Value]) -> PipelineError:
        """What a pass refuses, with the place in the text; a value as it is written there."""
        assert isinstance(refused.__cause__, ValidationError)
        found = refused.__cause__.errors()[0]
        option = str(found["loc"][0]) if found["loc"] else ""
        if option not in options:
            return self.error(refused.problem, name.start, refused.mend)
        return self.misfit(kind, option, options[option], found)

    def misfit(self, kind: type[Pass], option: str, value: _Value, found: ErrorDetails | None = None) -> PipelineError:
        refused = misfit(kind, kind.name, option, format_value(value.readings[0]), found)
        return self.error(refused.problem, value.start, refused.mend)
