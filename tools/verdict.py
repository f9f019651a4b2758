"""How a bench ends: its figures in a file, what it missed on the console and in the exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console


def finish(console: Console, figures: Any, missed: Sequence[str], path: Path | None) -> NoReturn:
    """Write the figures where they are wanted, print each goal that was missed, and exit with 1 if any was."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")
    for fault in missed:
        console.print(f"missed: {fault}", soft_wrap=True)
    sys.exit(1 if missed else 0)
