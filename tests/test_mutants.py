"""Mutation testing finds what tests miss: whole changes, the right tests for each, and memory that holds no longer."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import fxcompile.manager
import fxcompile.tracing  # noqa: F401  (imported once here, not in each mutant's process)

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import mutant_results as results
import mutant_tests as runs

CALL = "passes/_call.py"


def mutant(code: str = "x = 2", path: str = "passes/a.py", in_function: bool = True, **kept: Any) -> results.Mutant:
    given = {"scope": "f", "line": 3, "span": (3, 3), "before": ("x = 1",), "after": ("x = 2",), **kept}
    return results.Mutant(path, code, in_function=in_function, **given)


def suite() -> results.Suite:
    made = results.Suite()
    lines = {"passes/a.py": {"3": ["t.py::slow", "t.py::quick"], "9": ["t.py::other"]}}
    seconds = {"t.py::slow": 2.0, "t.py::quick": 0.1, "t.py::other": 0.01}
    made.add(runs.Baseline(seconds, lines, ["torch"]), lambda test: f"key of {test}")
    return made


def verdict(code: str, test: str, limit: float = 60.0) -> tuple[str, str]:
    """What becomes of _call.py with other code, held to one test."""
    child, pipe = runs.start(CALL, code, [test], [limit])
    return runs.verdict(os.waitpid(child, 0)[1], pipe, [test])


def test_tests_that_run_the_statement_come_cheapest_first() -> None:
    assert suite().of(mutant()) == ["t.py::quick", "t.py::slow"]
    assert suite().of(mutant(span=(2, 9))) == ["t.py::other", "t.py::quick", "t.py::slow"]
    assert suite().of(mutant(span=(4, 8))) == []


def test_what_is_run_on_import_is_held_to_all_tests_of_the_file() -> None:
    assert suite().of(mutant(in_function=False)) == ["t.py::quick", "t.py::slow", "t.py::other"]
    assert suite().of(mutant(in_function=False, path="passes/b.py")) == []


def test_a_kill_is_remembered_until_its_test_changes_and_a_survivor_until_any_does(tmp_path: Path) -> None:
    tests, keys = ["t.py::quick", "t.py::slow"], {"t.py::quick": "1", "t.py::slow": "2"}
    killed, survived = mutant("x = 2"), mutant("x = 3")
    results.Memory(tmp_path / "kept").keep(results.Finding(killed, "killed", "t.py::quick"), tests, keys)
    results.Memory(tmp_path / "kept").keep(results.Finding(survived, "survived"), tests, keys)
    memory = results.Memory(tmp_path / "kept")
    assert memory.recall(killed, tests, keys) == results.Finding(killed, "killed", "t.py::quick")
    assert memory.recall(survived, tests, keys) == results.Finding(survived, "survived")
    others = keys | {"t.py::slow": "3"}
    assert memory.recall(killed, tests, others) is not None
    assert memory.recall(survived, tests, others) is None
    assert memory.recall(killed, tests, keys | {"t.py::quick": "3"}) is None
    assert memory.hint(killed) == "t.py::quick"
    assert memory.recall(survived, [*tests, "t.py::new"], {**keys, "t.py::new": "4"}) is None
    assert memory.recall(mutant("x = 4"), tests, keys) is None


def test_a_line_half_written_is_forgotten(tmp_path: Path) -> None:
    memory = results.Memory(tmp_path / "kept")
    memory.keep(results.Finding(mutant(), "survived"), [], {})
    whole = memory.file.read_text()
    memory.file.write_text(whole + whole[:20])
    assert len(results.Memory(memory.file).held) == 1
    memory.keep(results.Finding(mutant("other"), "survived"), [], {})
    assert len(results.Memory(memory.file).held) == 2


def test_the_key_of_a_test_changes_with_it_and_with_what_is_no_test(tmp_path: Path) -> None:
    text = textwrap.dedent("""\
        import torch
        def help(): return 1
        @mark
        def test_a(): help()
        def test_b(): pass
        """)

    def keys(changed: str, shared: str = "") -> tuple[str, str]:
        file = tmp_path / "t.py"
        file.write_text(changed)
        key = runs.keys_of(file, shared)
        return key("t.py::test_a[1]"), key("t.py::test_b")

    first, second = keys(text)
    assert first != second
    assert keys(text + "\n\ndef test_c(): pass\n") == (first, second)
    assert keys(text.replace("@mark", "@other"))[1] == second
    assert keys(text.replace("@mark", "@other"))[0] != first
    for changed in (keys(text.replace("return 1", "return 2")), keys(text, "other helpers")):
        assert changed[0] != first
        assert changed[1] != second


def test_survivors_without_a_reason_and_a_low_share_are_faults() -> None:
    killed = [results.Finding(mutant(f"x = {n}"), "killed", "t.py::quick") for n in range(18)]
    survivors = [results.Finding(mutant(after=(line,)), "survived") for line in ("x = 3", "x = 4")]
    one = [results.Reason("passes/a.py", "it is never read", "x = 1", "x = 3")]
    text, faults = results.report([*killed, *survivors], one)
    assert text.splitlines()[:5] == ["passes/a.py:3 f", "  - x = 1", "  + x = 3", "  it is never read", ""]
    assert "  NOT EXPLAINED" in text
    assert text.splitlines()[-1].split() == ["all", "20", "18", "2", "90.0%"]
    assert faults == ["1 survivors are not explained in tools/mutants.toml"]
    every = [results.Reason("passes/a.py", "it is never read", "x = 1")]
    assert results.report([*killed, *survivors], every)[1] == []
    assert results.report([*killed[1:], *survivors], every)[1] == [
        "89.5% of the mutants are killed, and 90% are wanted"
    ]


def test_a_pattern_explains_what_differs_only_in_what_it_matches() -> None:
    reason = results.Reason("passes/*", "the lengths are the same", pattern=r",\s*(strict=\w+)?(?=\))")
    line = ("f(zip(a, b, strict=True))",)
    for other in ("f(zip(a, b, strict=None))", "f(zip(a, b, ))", "f(zip(a, b))"):
        assert reason.explains(mutant(before=line, after=(other,)))
    assert not reason.explains(mutant(before=line, after=("f(zip(a, None, strict=True))",)))
    assert not reason.explains(mutant(path="other/a.py", before=line, after=("f(zip(a, b))",)))


def test_a_mutant_is_killed_by_a_test_that_fails_on_it_and_only_then() -> None:
    code, test = (runs.ROOT / CALL).read_text(), "tests/test_eliminate_identity.py::test_pairs_do_not_overlap"
    assert verdict(code, test) == ("survived", "")
    assert verdict(code.replace("self.function = function", "self.function = None"), test) == ("killed", test)
    assert verdict("import nothing_of_that_name", test) == ("killed", "")
    endless = code.replace("super().__init__()", "super().__init__()\n        while True: pass")
    assert verdict(endless, test, 0.5) == ("timeout", test)


def test_every_mutant_is_one_change_of_a_statement(tmp_path: Path) -> None:
    pytest.importorskip("mutmut", reason="of the extra mutants")
    from mutations import mutants_of

    (tmp_path / "a.py").write_text('''"""A text."""
TABLE = {
    "a": lambda x: x > 1,
}


class Holder:
    number: int = 1

    @property
    def twice(self, times: int = 2) -> float | None:
        """A text."""
        return len(
            [self.number]
        ) * times
''')
    found = mutants_of(tmp_path, tmp_path / "a.py")
    changes = {(item.line, *item.after): item for item in found}
    assert {line for line, *_ in changes} == {2, 3, 8, 11, 15}
    assert changes[3, '"a": lambda x: x >= 1,'].in_function is False
    assert changes[8, "number: int = 2"].scope == "Holder"
    assert changes[15, ") / times"].span == (13, 15)
    assert changes[15, ") / times"].in_function is True
    assert changes[15, ") / times"].scope == "Holder.twice"
    assert changes[15, ") / times"].code == (tmp_path / "a.py").read_text().replace(") * times", ") / times")
    default = changes[11, "def twice(self, times: int = 3) -> float | None:"]
    assert (default.span, default.in_function) == ((11, 15), True)
    assert len({item.code for item in found}) == len(found)
