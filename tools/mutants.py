"""Mutation testing of `passes/`: changes the source in one small place and looks whether a test notices.

The changes are those of mutmut's operators (`mutations.py`). Each mutant is run against the tests that run the changed
statement, cheapest first and those that killed its neighbours before, up to the first that fails (`mutant_tests.py`).
What was found is kept under .cache/mutants, by hashes of the mutant's file and of the tests that decided, so that a run
can be stopped and taken up again, and only what changed is run anew (`mutant_results.py`). What the two stand on, such
as fxcompile/ and the other passes, is no part of it: a change there seldom turns a verdict, and all would run anew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from mutant_results import Finding, Memory, Mutant, Suite, reasons, report
from mutant_tests import ROOT, Baseline, digest, keys_of, measure, prepare, start, verdict
from mutations import mutants_of

CACHE = ROOT / ".cache" / "mutants"
_SLACK = (5.0, 10.0)
"""A test has this much CPU time, in seconds, and as many times what it usually takes."""


def measured() -> Suite:
    """All tests of files of passes/, and of what is offered there, run once without a mutant and measured."""
    sources = sorted((ROOT / "passes").glob("*.py"))
    names = {"packaging", *(path.stem.lstrip("_") for path in sources)}
    files = [ROOT / "tests" / f"test_{name}.py" for name in sorted(names)]
    shared = (ROOT / "tests" / "helpers.py").read_text()
    state = digest(*(path.read_text() for path in sources), shared)
    suite = Suite()
    for file in files:
        if not file.exists():
            continue
        held = CACHE / f"{file.stem}-{digest(state, file.read_text())}.json"
        if held.exists():
            baseline = Baseline(**json.loads(held.read_text()))
        else:
            print(f"running {file.relative_to(ROOT)} without a mutant", file=sys.stderr, flush=True)
            found = measure(file)
            if found is None:
                sys.exit(f"error: {file.relative_to(ROOT)} fails without any mutant; mend that first")
            baseline = found
            for old in CACHE.glob(f"{file.stem}-*.json"):
                old.unlink()
            held.write_text(json.dumps(asdict(baseline)))
        suite.add(baseline, keys_of(file, shared))
    return suite


def findings(mutants: Sequence[Mutant], suite: Suite, memory: Memory, workers: int) -> Iterator[Finding]:
    """What becomes of each mutant, as it is known."""
    waiting: list[tuple[Mutant, list[str]]] = []
    for mutant in mutants:
        tests = suite.of(mutant)
        known = memory.recall(mutant, tests, suite.keys)
        if known is not None:
            yield known
        elif tests:
            waiting.append((mutant, tests))
        else:
            yield Finding(mutant, "survived")
    if not waiting:
        return
    prepare(list(suite.modules))
    killers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    running: dict[int, tuple[Mutant, list[str], int]] = {}
    waiting.reverse()
    while waiting or running:
        while waiting and len(running) < workers:
            mutant, tests = waiting.pop()
            neighbours = killers[mutant.path, mutant.scope]
            likely = [memory.hint(mutant), *(test for test, _ in neighbours.most_common(4))]
            tests = list(dict.fromkeys([*(test for test in likely if test in tests), *tests]))
            limits = [_SLACK[0] + _SLACK[1] * suite.seconds[test] for test in tests]
            child, pipe = start(mutant.path, mutant.code, tests, limits)
            running[child] = mutant, tests, pipe
        child, status = os.wait()
        mutant, tests, pipe = running.pop(child)
        finding = Finding(mutant, *verdict(status, pipe, tests))
        if finding.by:
            killers[mutant.path, mutant.scope][finding.by] += 1
        memory.keep(finding, tests, suite.keys)
        yield finding


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/mutants")
    parser.add_argument("--files", default="*", help="only files of passes/ whose names match this glob")
    parser.add_argument("--sample", type=int, help="only so many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--workers", type=int, default=1, help="mutants that are run at once")
    options = parser.parse_args()
    sources = sorted((ROOT / "passes").glob(options.files if options.files.endswith(".py") else f"{options.files}.py"))
    mutants = [mutant for path in sources for mutant in mutants_of(ROOT, path)]
    if not mutants:
        sys.exit(f"error: no file of passes/ with code matches {options.files}; try --files 'fold_*'")
    if options.sample is not None and options.sample < len(mutants):
        mutants = random.Random(options.seed).sample(mutants, options.sample)
    CACHE.mkdir(parents=True, exist_ok=True)
    suite, memory = measured(), Memory(CACHE / "results.jsonl")
    found: list[Finding] = []
    told = time.monotonic()
    for finding in findings(mutants, suite, memory, max(1, options.workers)):
        found.append(finding)
        if time.monotonic() - told > 20:
            told = time.monotonic()
            survived = sum(item.outcome == "survived" for item in found)
            print(f"{len(found)} of {len(mutants)} mutants, {survived} survived", file=sys.stderr, flush=True)
    text, faults = report(found, reasons(ROOT / "tools" / "mutants.toml"))
    print(text)
    if faults:
        print(f"error: {'; '.join(faults)}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
