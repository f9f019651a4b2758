"""What would not fit in memory, or claims to be larger than it is, is refused before it is unpacked."""

from __future__ import annotations

import os


def is_too_large(size: int) -> bool:
    """Whether so many bytes are more than half of the machine's memory."""
    return size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


LARGE = 10_000_000
"""Values that a tensor may claim beyond the bytes it holds: a scalar expanded over a map is no attack."""


def is_inflated(values: int, held: int) -> bool:
    """Whether a tensor of so many values and held bytes, made dense, would be out of all proportion."""
    return values > max(LARGE, held)
