"""Tries to break passes on fresh networks until the time is up. See tools/fuzz."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import torch
from rich.console import Console

from fxcompile.errors import FxcompileError
from fxcompile.pipeline import parse_pipeline
from fxcompile.registry import find_pass, pass_names
from fxcompile.rewriting import Pass
from fxcompile.testing import NothingChecked, PassFailure, Summary, check_pass, check_pipeline
from fxcompile.testing.checks import file_name
from fxcompile.testing.features import statistics
from fxcompile.testing.growing import RandomPicker, grow

ROUND = 200
"""Networks in one round of one pass."""

DRAWS = 1000
"""Networks of which statistics are made."""


@dataclass
class Target:
    """What is tried: a pass, or pipelines of several.

    Attributes:
        name: in what is printed, and of the file that shows a failure.
        check: runs so many examples from a seed, what failed before first.
        networks, with_sites: how many were looked at so far.
        seconds: of processor time, without learning what to plant.
        broken: whether it failed; it is not tried again then.
        rare: whether no network had a site of it; it is not tried again then.
    """

    name: str
    check: Callable[[int, int], Summary]
    networks: int = 0
    with_sites: int = 0
    seconds: float = 0.0
    broken: bool = False
    rare: bool = False


def targets(passes: Sequence[Pass], pipelines: bool, keep: Path) -> list[Target]:
    """Each pass, and pipelines where there are several."""

    def single(pass_: Pass) -> Callable[[int, int], Summary]:
        return lambda examples, seed: check_pass(pass_, examples=examples, seed=seed, database=keep)

    def together(examples: int, seed: int) -> Summary:
        return check_pipeline(passes, examples=examples, seed=seed, database=keep)

    made = [] if pipelines else [Target(str(pass_), single(pass_)) for pass_ in passes]
    return [*made, Target("pipelines", together)] if pipelines or len(passes) > 1 else made


def fuzz(
    found: Sequence[Target],
    until: Callable[[Target], bool],
    seed: int,
    keep: Path,
    console: Console,
    size: int | None = None,
) -> bool:
    """Rounds of all targets in turn, until each is done; whether none was broken.

    Args:
        until: whether a target is done; it is asked before each round.
        seed: of the first round; the next one's is one more.
        size: networks in one round, `ROUND` by default.
    """
    size = size or ROUND
    while left := [target for target in found if not target.broken and not target.rare and not until(target)]:
        for target in left:
            if until(target):
                continue
            try:
                summary = target.check(size, seed)
                target.networks += summary.networks
                target.with_sites += summary.with_sites
                target.seconds += summary.seconds
            except PassFailure as failure:
                target.broken = True
                report(target, failure, seed, keep, console)
            except NothingChecked as nothing:
                target.rare = True
                console.print(f"{target.name}: {nothing}", soft_wrap=True, highlight=False)
        seed += 1
    for target in found:
        rate = target.networks / target.seconds if target.seconds else 0.0
        state = "BROKEN" if target.broken else "rare" if target.rare else "held"
        looked = f"{target.networks:7,} networks, {target.with_sites:,} with sites, {rate:5.1f} a second: "
        console.print(f"{state:6}  {'' if target.broken else looked}{target.name}", soft_wrap=True, highlight=False)
    return not any(target.broken for target in found)


def report(target: Target, failure: PassFailure, seed: int, keep: Path, console: Console) -> None:
    """Write the file that shows a failure, and say where it is."""
    keep.mkdir(parents=True, exist_ok=True)
    path = keep / f"{file_name(target.name)}.py"
    path.write_text(failure.reproducer)
    console.print(
        f"{target.name} breaks '{failure.promise}' (seed {seed}): {failure.evidence}\n  run: python {path}",
        soft_wrap=True,
        highlight=False,
    )


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/fuzz", description=__doc__)
    parser.add_argument("--minutes", type=positive, default=10.0)
    parser.add_argument("--examples", type=lambda text: int(positive(text)))
    parser.add_argument("--passes")
    parser.add_argument("--pipelines", action="store_true")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", type=Path, default=Path(__file__).parent.parent / ".cache" / "fuzz")
    parser.add_argument("--statistics", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console()
    if options.statistics:
        console.print(str(statistics(grow(RandomPicker(seed)) for seed in range(DRAWS))), highlight=False)
        return
    try:
        named = parse_pipeline(options.passes) if options.passes else [find_pass(name)() for name in pass_names()]
    except FxcompileError as error:
        raise SystemExit(f"error: {error}") from None
    deadline = time.monotonic() + 60 * options.minutes

    def done(target: Target) -> bool:
        return time.monotonic() >= deadline if options.examples is None else target.networks >= options.examples

    found, size = targets(named, options.pipelines, options.keep), min(ROUND, options.examples or ROUND)
    held = fuzz(found, done, options.seed, options.keep, console, size)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    # Hypothesis' own profile for CI would draw the same every time, and keep nothing.
    hypothesis.settings.register_profile("fuzz", derandomize=False, deadline=None)
    hypothesis.settings.load_profile("fuzz")
    main()
