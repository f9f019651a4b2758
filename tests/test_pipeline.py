"""Pipelines go to text and back unchanged, and every malformed text is answered with place, problem and mend."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import hypothesis.strategies as st
import pytest
from fxcompile.passes import StackKernels
from hypothesis import example, given, settings
from pydantic import Field, field_validator, model_validator

import fxcompile.registry
from fxcompile.contracts import Exact
from fxcompile.errors import PipelineError, UsageError
from fxcompile.options import described, wanted
from fxcompile.pipeline import format_pipeline, format_value, parse_pipeline
from fxcompile.program import Program
from fxcompile.rewriting import Pass, Site, Skip


class Colour(enum.Enum):
    """Enumerations are options as well."""

    RED = "red"
    BLUE = "light blue"


class Every(Pass):
    """A pass with every kind of option."""

    name: ClassVar = "every-option"
    contract: ClassVar = Exact()

    text: str = Field("plain", description="any text")
    flag: bool = False
    count: int = Field(3, ge=1, description="how many")
    share: float = Field(0.5, description="how much")
    either: int | float = Field(0.5, gt=0, description="share or count")
    maybe: Annotated[float, Field(le=1)] | None = None
    choice: Literal["none", "relu", "5"] = "relu"
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (0, "a")
    nested: tuple[tuple[float, ...], ...] = ()
    loose: int | float | str | bool | None = None
    colour: Colour = Colour.RED
    path: Path | None = None

    @field_validator("count")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("it must be odd")
        return value

    @model_validator(mode="after")
    def _together(self) -> Every:
        if self.flag and self.text == "clash":
            raise ValueError("flag and text=clash exclude each other")
        return self

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        yield from ()


class Needs(Pass):
    """A pass that cannot do without an option."""

    name: ClassVar = "needs-option"
    contract: ClassVar = Exact()

    width: int = Field(ge=5, description="the width")

    def sites(self, program: Program) -> Iterator[Site | Skip]:
        yield from ()


class _Entry:
    def __init__(self, load: Callable[[], Any]) -> None:
        self.load = load
        self.value = "somewhere:Class"


@pytest.fixture(autouse=True, scope="module")
def _passes() -> Iterator[None]:
    own = {"every-option": _Entry(lambda: Every), "needs-option": _Entry(lambda: Needs)}
    shipped = ("eliminate-identity", "fold-batchnorm", "stack-kernels")
    found = {**{name: fxcompile.registry._entries()[name] for name in shipped}, **own}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fxcompile.registry, "_entries", lambda: found)
        yield


# there and back

WORDS = st.one_of(
    st.text(),
    st.sampled_from(["features.*", "[a-c]?", "true", "None", "5", "-1.5e3", "inf", "nan", "it's", 'say "no"', "a\\b",
                     "#1", "\u03b1.\u03b2*", "日本 語", "\ufeff", "\ud800", "\x00\n\t\r", "a,b", "a=b", "(", "007",
                     "1_000", "@x"]),
)  # fmt: skip
NUMBERS = st.floats(allow_nan=False)
VALUES = {
    "text": WORDS,
    "flag": st.booleans(),
    "count": st.integers(0, 10**30).map(lambda number: 2 * number + 1),
    "share": NUMBERS,
    "either": st.one_of(st.integers(1), st.floats(1e-300, allow_nan=False)),
    "maybe": st.one_of(st.none(), st.floats(max_value=1, allow_nan=False)),
    "choice": st.sampled_from(["none", "relu", "5"]),
    "names": st.lists(WORDS, max_size=3).map(tuple),
    "sizes": st.lists(st.integers(), max_size=3).map(tuple),
    "pair": st.tuples(st.integers(), WORDS),
    "nested": st.lists(st.lists(NUMBERS, max_size=2).map(tuple), max_size=3).map(tuple),
    "loose": st.one_of(st.none(), st.booleans(), st.integers(), NUMBERS, WORDS),
    "colour": st.sampled_from(Colour),
    "path": st.one_of(st.none(), st.sampled_from([Path("a b/c.txt"), Path("/tmp/ü")])),
    "only": st.lists(WORDS, max_size=2).map(tuple),
    "skip": st.lists(WORDS, max_size=2).map(tuple),
    "max_error": st.one_of(st.none(), st.floats(0, allow_nan=False)),
    "min_saving": st.one_of(st.none(), st.floats(max_value=1, allow_nan=False)),
}
PASSES = st.fixed_dictionaries({}, optional=VALUES).map(lambda options: Every(**options))


@settings(max_examples=400, deadline=None)
@given(st.lists(PASSES, max_size=3))
@example([])
def test_parsing_what_was_formatted_gives_the_same_passes(passes: list[Pass]) -> None:
    text = format_pipeline(passes)
    again = parse_pipeline(text)
    assert again == passes
    assert format_pipeline(again) == text
    for one, other in zip(again, passes, strict=True):
        assert [type(value) for _, value in one] == [type(value) for _, value in other]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab-5.,=()[]\"'#\\ \n", max_size=30))
def test_any_text_parses_or_is_refused_in_one_sentence(text: str) -> None:
    try:
        passes = parse_pipeline(text)
    except PipelineError as error:
        refusal = error
    else:
        assert passes == []  # there is no pass of these letters
        return
    assert str(refusal).startswith("the pipeline, ")
    assert refusal.mend


TEXTS = [
    ("", []),
    (" # nothing\n", []),
    ("every-option", [Every()]),
    ("every-option(),", [Every()]),
    ("every-option(count=5,),every-option", [Every(count=5), Every()]),
    ("every-option(\n  share = 1e-3, # a comment\n  names=[a, 'b c',],\n)\n", [Every(share=1e-3, names=("a", "b c"))]),
    ("\ufeffevery-option(flag=True)\r\n", [Every(flag=True)]),
    ("every-option(names=features.*)", [Every(names=("features.*",))]),
    ("every-option(only=0, skip=[1, b, none])", [Every(only=("0",), skip=("1", "b", "none"))]),
    ("every-option(names=007, sizes=7)", [Every(names=("007",), sizes=(7,))]),
    ("every-option(choice=none, maybe=none)", [Every(choice="none", maybe=None)]),
    ("every-option(choice=5)", [Every(choice="5")]),
    ("every-option(share=-.5, either=+3)", [Every(share=-0.5, either=3)]),
    ("every-option(text=5, loose=5)", [Every(text="5", loose=5)]),
    ("every-option(text='5', loose='5')", [Every(text="5", loose="5")]),
    (r'every-option(text="\"\\\n\u00e9\x41")', [Every(text='"\\\néA')]),
    ("every-option(nested=[[1, 2], [], [3.5]])", [Every(nested=((1, 2), (), (3.5,)))]),
    ("every-option(share=inf)", [Every(share=math.inf)]),
    ("every-option(colour='light blue')", [Every(colour=Colour.BLUE)]),
]


@pytest.mark.parametrize(("text", "passes"), TEXTS)
def test_texts_mean_what_a_reader_expects(text: str, passes: list[Pass]) -> None:
    assert parse_pipeline(text) == passes


def test_the_passes_that_ship_parse_with_their_options() -> None:
    first, second, third = parse_pipeline("fold-batchnorm(skip=0), eliminate-identity, stack-kernels(activation=relu)")
    assert str(first) == 'fold-batchnorm(skip=["0"])'
    assert [str(second), str(third)] == ["eliminate-identity", "stack-kernels(activation=relu)"]


def test_an_option_that_was_given_at_its_default_stays_in_the_text() -> None:
    (written,) = parse_pipeline("every-option(count=3)")
    assert str(written) == "every-option(count=3)"
    assert written == Every()
    changed = written.model_copy(update={"skip": ("a",)})
    assert str(changed) == "every-option(skip=[a], count=3)"


def test_the_complete_text_means_the_same_where_the_defaults_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(Every):
        """The same pass in a later version."""

        count: int = Field(5, ge=1)
        text: str = "other"
        names: tuple[str, ...] = ("a",)
        maybe: Annotated[float, Field(le=1)] | None = 0.5

    passes = [Every(share=0.25), Every(skip=("a", "b"))]
    written = format_pipeline(passes, complete=True)
    assert written.count("count=3") == 2
    monkeypatch.setattr("fxcompile.pipeline.find_pass", lambda name: Later)
    for before, after in zip(passes, parse_pipeline(written), strict=True):
        assert type(after) is Later
        assert after.model_dump() == before.model_dump()
    (plain,) = parse_pipeline(format_pipeline([Every()]))
    assert plain.model_dump() != Every().model_dump()


# what is refused

FORM = "write name(option=value, ...), name, ..."
REFUSED = {
    "fold-batchnrm": "column 1: there is no pass 'fold-batchnrm'; did you mean 'fold-batchnorm'?",
    "eliminate-identity, every-optoin": "column 21: there is no pass 'every-optoin'; did you mean 'every-option'?",
    "eliminate-identity,\n  zzz": "line 2, column 3: there is no pass 'zzz'; choose from eliminate-identity, "
    "every-option, fold-batchnorm, needs-option, stack-kernels",
    "Fold-BatchNorm": "column 1: there is no pass 'Fold-BatchNorm'; did you mean 'fold-batchnorm'?",
    "@passes.txt": "column 1: there is no pass '@passes.txt'; choose from eliminate-identity, every-option, "
    "fold-batchnorm, needs-option, stack-kernels",
    "every-option(": f"column 14: an option's name is wanted, not the end; {FORM}",
    "every-option)": f"column 13: ',' after pass 'every-option' is wanted, not ')'; {FORM}",
    "every-option every-option": f"column 14: ',' after pass 'every-option' is wanted, not 'every-option'; {FORM}",
    "every-option()()": f"column 15: ',' after pass 'every-option' is wanted, not '('; {FORM}",
    "every-option, , x": f"column 15: a pass's name is wanted, not ','; {FORM}",
    ", every-option": f"column 1: a pass's name is wanted, not ','; {FORM}",
    "'every-option'": f"column 1: a pass's name is wanted, not ''every-option''; {FORM}",
    "every-option(count)": f"column 19: '=' after option 'count' is wanted, not ')'; {FORM}",
    "every-option(count 3)": f"column 20: '=' after option 'count' is wanted, not '3'; {FORM}",
    "every-option(count=)": f"column 20: a value for 'count' is wanted, not ')'; {FORM}",
    "every-option(=3)": f"column 14: an option's name is wanted, not '='; {FORM}",
    "every-option(count=3": f"column 21: ',' or ')' after option 'count' is wanted, not the end; {FORM}",
    "every-option(count=3 share=1)": f"column 22: ',' or ')' after option 'count' is wanted, not 'share'; {FORM}",
    "every-option(count=3,, share=1)": f"column 22: an option's name is wanted, not ','; {FORM}",
    "every-option(names=[a": f"column 22: ',' or ']' after a value of 'names' is wanted, not the end; {FORM}",
    "every-option(names=[a b])": f"column 23: ',' or ']' after a value of 'names' is wanted, not 'b'; {FORM}",
    "every-option(names=[a, b)": f"column 25: ',' or ']' after a value of 'names' is wanted, not ')'; {FORM}",
    "every-option(text='it)": "column 19: this quote is never closed; close it",
    'every-option(text="a\\q")': "column 21: '\\q' means nothing here; write \\\\ for a backslash",
    "every-option(count=3, count=5)": "column 23: "
    "option 'count' of pass 'every-option' is given twice; keep one of them",
    "every-option(cuont=3)": "column 14: pass 'every-option' has no option 'cuont'; did you mean 'count'?",
    "eliminate-identity(rank=3)": "column 20: pass 'eliminate-identity' has no option 'rank'; choose from max_error, "
    "min_saving, only, skip",
    "every-option(count=abc)": "column 14: option 'count' of pass 'every-option' cannot be abc; "
    "give a whole number of at least 1: how many",
    "every-option(count=-1)": "column 14: option 'count' of pass 'every-option' cannot be -1; "
    "give a whole number of at least 1: how many",
    "every-option(count=2.5)": "column 14: option 'count' of pass 'every-option' cannot be 2.5; "
    "give a whole number of at least 1: how many",
    "every-option(count=4)": "column 14: option 'count' of pass 'every-option' cannot be 4 (it must be odd); "
    "give a whole number of at least 1: how many",
    "every-option(share=1, either=0)": "column 23: option 'either' of pass 'every-option' cannot be 0; "
    "give a number above 0: share or count",
    "every-option(either=abc)": "column 14: option 'either' of pass 'every-option' cannot be abc; "
    "give a number above 0: share or count",
    "every-option(either=true)": "column 14: option 'either' of pass 'every-option' cannot be true; "
    "give a number above 0: share or count",
    "every-option(maybe=1.5)": "column 14: option 'maybe' of pass 'every-option' cannot be 1.5; "
    "give a number of at most 1, or none",
    "every-option(choice=gelu)": "column 14: option 'choice' of pass 'every-option' cannot be gelu; "
    "give one of none, relu, 5",
    "every-option(flag=maybe)": "column 14: option 'flag' of pass 'every-option' cannot be maybe; give true or false",
    "every-option(sizes=[1, a])": "column 14: option 'sizes' of pass 'every-option' cannot be [1, a]; "
    "give a list of whole numbers like [1, 2]",
    "every-option(share=[1, 2])": "column 14: option 'share' of pass 'every-option' cannot be [1, 2]; "
    "give a number: how much",
    "every-option(colour=green)": "column 14: option 'colour' of pass 'every-option' cannot be green; "
    "give one of red, light blue",
    "fold-batchnorm(max_error=-1)": "column 16: option 'max_error' of pass 'fold-batchnorm' cannot be -1; give a "
    "number of at least 0, or none: largest relative output error that a site may cost",
    "every-option(flag=true, text=clash)": "column 1: pass 'every-option': flag and text=clash exclude each other; "
    "see fxcompile passes every-option",
    "needs-option": "column 1: pass 'needs-option' needs option 'width'; give a whole number of at least 5",
    "needs-option(width=3)": "column 14: option 'width' of pass 'needs-option' cannot be 3; "
    "give a whole number of at least 5: the width",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refusals_name_place_problem_and_mend(text: str) -> None:
    with pytest.raises(PipelineError) as caught:
        parse_pipeline(text)
    assert str(caught.value) == f"the pipeline, {REFUSED[text]}"
    assert caught.value.exit_code == 2


def test_the_place_names_the_file_that_the_text_comes_from() -> None:
    with pytest.raises(PipelineError) as caught:
        parse_pipeline("# what we ship\nfold-batchnorm,  # first\nelimnate-identity\n", "pipeline.txt")
    expected = (
        "pipeline.txt, line 3, column 1: there is no pass 'elimnate-identity'; did you mean 'eliminate-identity'?"
    )
    assert str(caught.value) == expected


# values and types in words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"), (True, "true"), (1, "1"), (-0.5, "-0.5"), (1e-05, "1e-05"), ("a.b*", "a.b*"), ("a b", '"a b"'),
        ("", '""'), ("none", '"none"'), ("5", '"5"'), ("inf", '"inf"'), ('"', '"\\""'), ("\\", "\\"), ("é", "é"),
        ("\u2028", '"\\u2028"'), (("a", 1, (None,)), "[a, 1, [none]]"), ((), "[]"), (Path("/x y"), '"/x y"'),
    ],
)  # fmt: skip
def test_values_as_text(value: object, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "a whole number"), (float | None, "a number, or none"), (int | float, "a number"),
        (bool, "true or false"), (Path, "Path"),
        (tuple[str, ...], "a list of texts like [a, b]"), (list[float], "a list of numbers like [1, 2]"),
        (tuple[int, str], "a list [a whole number, text]"), (tuple, "a list like [a, b]"),
        (tuple[tuple[int, ...], ...], "a list, each a list of whole numbers like [1, 2]"),
        (Literal[1, "a"], "one of 1, a"), (int | str, "a whole number, or text"),
        (Annotated[int, Field(multiple_of=2)], "a whole number that is a multiple of 2"),
    ],
)  # fmt: skip
def test_types_in_words(annotation: object, text: str) -> None:
    assert described(annotation) == text


def test_limits_in_words() -> None:
    class Limited(Every):
        both: float = Field(0.5, gt=0, le=1)
        inner: Annotated[int, Field(ge=2, multiple_of=2)] | None = None

    assert wanted(Limited.model_fields["both"]) == "a number above 0 and of at most 1"
    assert wanted(Limited.model_fields["max_error"]) == "a number of at least 0, or none"


def test_in_python_a_wrong_option_is_refused_in_the_same_words() -> None:
    for options, words in (
        ({"rnk": 0.5}, "pass 'stack-kernels' has no option 'rnk'; did you mean 'rank'?"),
        ({"rank": "half"}, "option 'rank' of pass 'stack-kernels' cannot be 'half'; give "),
        ({"max_error": -1}, "option 'max_error' of pass 'stack-kernels' cannot be -1; give a number of at least 0, or"),
        ({"kernel": 6}, "option 'kernel' of pass 'stack-kernels' cannot be 6 (3x3 kernels compose"),
    ):
        with pytest.raises(UsageError) as refused:
            StackKernels(**options)  # type: ignore[arg-type]
        assert str(refused.value).startswith(words)
        assert "\n" not in str(refused.value)
