"""`python -m benchmarks.child FIGURES.json ARGUMENT...`: the command `fxcompile ARGUMENT...` with its stages counted.

It runs in a process of its own, so that its peak memory is that of the command. Imports that it would do on the way
are done first and counted as the stage `imports`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.stages import Stages, count_compiler


def main(figures: Path, arguments: list[str]) -> None:
    """Run the command and write the figures, whatever its exit code."""
    stages = Stages(memory=True)
    with stages.stage("imports"):
        count_compiler(stages)
        from fxcompile import cli, reading

        stages.wrap(reading, "read_model", "read")
    try:
        with stages.stage("other"):
            cli.main(arguments)
    finally:
        figures.write_text(json.dumps({path: asdict(stage) for path, stage in stages.found.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
