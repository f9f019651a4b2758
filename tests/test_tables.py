"""Tables keep to the width they are given, numbers stay in columns, and nothing is cut."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fxcompile.tables import Row, short, table, wrapped

HEADER = Row("layer", "kind", ("MACs", "s"))
ROWS = (
    Row("stem", "Conv2d 1->8 3x3", ("10.4k", "0.1")),
    Row("  a.much.longer.name", "left as it is"),
    Row("  a.much.longer.name", "ReLU", ("", "12")),
)


def test_one_line_each_where_that_fits() -> None:
    assert table(HEADER, ROWS, 50) == [
        "layer                 kind              MACs    s",
        "stem                  Conv2d 1->8 3x3  10.4k  0.1",
        "  a.much.longer.name  left as it is",
        "  a.much.longer.name  ReLU                     12",
    ]


def test_texts_go_below_where_it_does_not() -> None:
    assert table(HEADER, ROWS, 48) == [
        "layer                  MACs    s",
        "  kind",
        "stem                  10.4k  0.1",
        "  Conv2d 1->8 3x3",
        "  a.much.longer.name  left as it is",
        "  a.much.longer.name          12",
        "    ReLU",
    ]


def test_names_get_lines_of_their_own_where_the_numbers_leave_no_room() -> None:
    assert table(HEADER, ROWS, 24) == [
        "layer          MACs    s",
        "  kind",
        "stem          10.4k  0.1",
        "  Conv2d 1->8 3x3",
        "  a.much.longer.name",
        "    left as it is",
        "  a.much.longer.name",
        "                      12",
        "    ReLU",
    ]


words = st.lists(st.text("abcdef.", min_size=1, max_size=12), min_size=1, max_size=12).map(" ".join)
numbers = st.tuples(st.text("0123456789.k", max_size=6), st.text("0123456789", max_size=4))
rows = st.builds(Row, st.tuples(st.sampled_from(["", "  "]), words).map("".join), words, st.just(()) | numbers)


@given(st.lists(rows, max_size=8), st.integers(40, 140))
def test_no_line_is_wider_and_no_word_is_lost(body: list[Row], width: int) -> None:
    lines = table(HEADER, body, width)
    assert all(len(line) <= width and line == line.rstrip() for line in lines)
    wanted = [word for row in (HEADER, *body) for item in (row.name, row.text, *row.cells) for word in item.split()]
    assert sorted(" ".join(lines).split()) == sorted(wanted)


def test_long_words_such_as_paths_stay_whole() -> None:
    path = "/a/folder-with-hyphens/" + "x" * 50
    assert wrapped(f"{path}: 12 bytes", 40, "  ") == [f"{path}:", "  12 bytes"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((0, "0"), (7, "7"), (999, "999"), (1000, "1k"), (1234, "1.23k"), (28_749, "28.7k"), (999_499, "999k")),
        *((999_500, "1M"), (1_820_000, "1.82M"), (999_999_999, "1G"), (64_000_000_000, "64G"), (5 * 10**12, "5T")),
    ],
)
def test_counts_are_short_and_never_in_powers_of_ten(number: int, text: str) -> None:
    assert short(number) == text


@given(st.integers(0, 10**17))
def test_short_counts_are_right_to_three_digits(number: int) -> None:
    text = short(number)
    unit = text[-1] if text[-1] in "kMGTP" else ""
    value = float(text.removesuffix(unit)) * 1000.0 ** (" kMGTP".index(unit or " "))
    assert len(text) <= 5
    assert abs(value - number) <= 0.005 * number + 1e-9
