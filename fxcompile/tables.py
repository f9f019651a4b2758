"""Tables as text, for any width: numbers in columns, names and sentences never cut.

layer                        MACs   s
stem.0  Conv2d 1->8 3x3     10.4k   1        where the longest text fits beside the longest name

layer                MACs   s
stem.0              10.4k   1
  Conv2d 1->8 3x3                            where it does not
a.name.which.is.longer.than.its.column
                    10.4k   1
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_GAP = "  "


@dataclass(frozen=True)
class Row:
    """A row: its name (whose leading blanks are its level), what is said of it, and its numbers, or none."""

    name: str
    text: str
    cells: tuple[str, ...] = ()


def table(header: Row, rows: Sequence[Row], width: int) -> list[str]:
    """The lines of a table with one right-aligned column for each of the header's cells."""
    all_rows = (header, *rows)
    widths = [max(len(row.cells[index]) for row in all_rows if row.cells) for index in range(len(header.cells))]
    numbers = sum(len(_GAP) + size for size in widths)
    names = max(len(row.name) for row in all_rows)
    texts = max(len(row.text) for row in all_rows)
    if names + len(_GAP) + texts + numbers <= width:
        return [f"{row.name:{names}}{_GAP}{row.text:{texts}}{_numbers(row, widths)}".rstrip() for row in all_rows]
    names = min(names, max(width - numbers, 0))
    lines: list[str] = []
    for row in all_rows:
        indent = " " * (len(row.name) - len(row.name.lstrip()) + 2)
        both = f"{row.name}{_GAP}{row.text}"
        if not row.cells and len(both) <= width:
            lines.append(both.rstrip())
            continue
        if len(row.name) > names:
            lines += wrapped(row.name, width, indent + "  ")
            lines += [(" " * names + _numbers(row, widths)).rstrip()] if any(row.cells) else []
        else:
            lines.append(f"{row.name:{names}}{_numbers(row, widths)}".rstrip())
        lines += wrapped(indent + row.text, width, indent) if row.text else []
    return lines


def _numbers(row: Row, widths: Iterable[int]) -> str:
    return "".join(f"{_GAP}{cell:>{size}}" for cell, size in zip(row.cells, widths, strict=False))


def wrapped(text: str, width: int, indent: str) -> list[str]:
    """A sentence in lines of at most so many characters; words, such as paths, stay whole."""
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def short(number: int) -> str:
    """A count in at most five characters: 512, 28.7k, 1.82M."""
    size, unit = float(number), ""
    for larger in "kMGTP":
        if size < 999.5:  # what rounds to 1000 takes the next unit
            break
        size, unit = size / 1000, larger
    return f"{size:.3g}{unit}" if unit else str(number)
