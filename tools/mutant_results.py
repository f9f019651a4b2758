"""What is known of mutants: which tests could kill them, what became of them, why some live rightly, and the report."""

from __future__ import annotations

import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from mutant_tests import Baseline, digest

GOAL = 0.9
"""Share of the mutants that tests shall kill."""


@dataclass(frozen=True)
class Mutant:
    """A source file with one change.

    Attributes:
        path: of the file, relative to the repository.
        code: the whole changed source.
        scope: the function or class that holds the change, dotted; "" at the top of the module.
        in_function: whether it is run by calls only, and not as the module is imported.
        line: where the change starts, from 1.
        span: first and last line of the statement that holds it, without the body of a compound one; of a default of
            a function, all its lines.
        before, after: the changed lines, without indentation.
    """

    path: str
    code: str
    scope: str
    in_function: bool
    line: int
    span: tuple[int, int]
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """What became of a mutant: `killed`, `timeout` (killed too), `survived`; and the test that ended it."""

    mutant: Mutant
    outcome: str
    by: str = ""


@dataclass(frozen=True)
class Reason:
    """Why mutants survive rightly.

    Attributes:
        file: a glob of paths.
        reason: the sentence that is printed.
        line: the changed lines, all of whose mutants are meant.
        mutant: if given, only the mutant of these lines that reads so.
        pattern: instead of a line: all mutants are meant that differ only in what this regular expression matches.
    """

    file: str
    reason: str
    line: str = ""
    mutant: str = ""
    pattern: str = ""

    def explains(self, mutant: Mutant) -> bool:
        before, after = " ".join(mutant.before), " ".join(mutant.after)
        if not fnmatch(mutant.path, self.file):
            return False
        if self.pattern:
            return re.sub(self.pattern, "", before) == re.sub(self.pattern, "", after)
        return self.line == before and self.mutant in ("", after)


@dataclass
class Suite:
    """The tests of the passes: which lines they run, how long they take, and a key for each that changes with it."""

    seconds: dict[str, float] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    lines: dict[str, dict[int, set[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))
    modules: dict[str, None] = field(default_factory=dict)

    def add(self, baseline: Baseline, key: Callable[[str], str]) -> None:
        """Take in what a test file does; `key` gives that of each test, by its node id."""
        self.seconds |= baseline.seconds
        self.keys |= {test: key(test) for test in baseline.seconds}
        self.modules |= dict.fromkeys(baseline.modules)
        for path, lines in baseline.lines.items():
            for line, tests in lines.items():
                self.lines[path][int(line)].update(tests)

    def of(self, mutant: Mutant) -> list[str]:
        """The tests that run the changed statement, cheapest first.

        For what is run on import, all that run the file, and those that run no line of any but look at what is there.
        """
        lines = self.lines[mutant.path]
        here = set().union(*(lines[line] for line in range(mutant.span[0], mutant.span[1] + 1) if line in lines))
        if mutant.in_function:
            return sorted(here, key=lambda test: (self.seconds[test], test))
        running = {test for files in self.lines.values() for found in files.values() for test in found}
        tests = here.union(*lines.values()) | (self.seconds.keys() - running)
        return sorted(tests, key=lambda test: (test not in here, self.seconds[test], test))


class Memory:
    """Results of earlier runs, appended to one file as they come."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.held: dict[str, dict[str, str]] = {}
        if file.exists():
            for line in file.read_text().splitlines():
                with suppress(json.JSONDecodeError):  # a run that was killed leaves half a line
                    item = json.loads(line)
                    self.held[item["mutant"]] = item

    def recall(self, mutant: Mutant, tests: Sequence[str], keys: dict[str, str]) -> Finding | None:
        """What is known and still holds: of a killed mutant as long as the test that killed it stays as it was."""
        item = self.held.get(digest(mutant.path, mutant.code))
        if item is None or item["evidence"] != _evidence(item["outcome"], item["by"], tests, keys):
            return None
        return Finding(mutant, item["outcome"], item["by"])

    def hint(self, mutant: Mutant) -> str:
        """The test that killed the same mutant at some time, or ""."""
        return self.held.get(digest(mutant.path, mutant.code), {}).get("by", "")

    def keep(self, finding: Finding, tests: Sequence[str], keys: dict[str, str]) -> None:
        mutant = finding.mutant
        evidence = _evidence(finding.outcome, finding.by, tests, keys)
        item = {
            "mutant": digest(mutant.path, mutant.code), "outcome": finding.outcome, "by": finding.by,
            "evidence": evidence,
        }  # fmt: skip
        with self.file.open("a") as out:
            out.write("\n" + json.dumps(item) + "\n")  # the line before may be half a one


def _evidence(outcome: str, by: str, tests: Sequence[str], keys: dict[str, str]) -> str:
    if outcome == "survived":
        return digest(*sorted(keys[test] for test in tests))
    return keys.get(by, "gone") if by else "import"


def reasons(file: Path) -> list[Reason]:
    """The explanations kept beside this script."""
    return [Reason(**item) for item in tomllib.loads(file.read_text()).get("survivor", [])]


def report(found: Sequence[Finding], known: Sequence[Reason]) -> tuple[str, list[str]]:
    """Survivors with their reasons and the share killed by file; and what is wrong with it."""
    lines: list[str] = []
    unexplained = 0
    left = [item.mutant for item in found if item.outcome == "survived"]
    for mutant in sorted(left, key=lambda item: (item.path, item.line, item.after)):
        why = next((item.reason for item in known if item.explains(mutant)), None)
        unexplained += why is None
        lines.append(f"{mutant.path}:{mutant.line} {mutant.scope}".rstrip())
        lines += [*(f"  - {line}" for line in mutant.before), *(f"  + {line}" for line in mutant.after)]
        lines += [f"  {'NOT EXPLAINED' if why is None else why}", ""]
    lines.append(f"{'file':32}{'mutants':>9}{'killed':>9}{'survived':>9}{'share':>9}")
    for path in [*sorted({item.mutant.path for item in found}), "all"]:
        these = [item for item in found if path in ("all", item.mutant.path)]
        survived = sum(item.outcome == "survived" for item in these)
        share = 1 - survived / len(these)
        lines.append(f"{path:32}{len(these):9}{len(these) - survived:9}{survived:9}{share:9.1%}")
    faults = [f"{unexplained} survivors are not explained in tools/mutants.toml"] if unexplained else []
    killed = 1 - len(left) / len(found)
    if killed < GOAL:
        faults.append(f"{killed:.1%} of the mutants are killed, and {GOAL:.0%} are wanted")
    return "\n".join(lines), faults
