"""How much memory there is: what would not fit is refused before the system ends the process for it."""

from __future__ import annotations

import os


def is_too_large(size: int) -> bool:
    """Whether so many bytes are more than half of the machine's memory."""
    return size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
