"""How long to wait for what must come true soon, on a machine that may have other things to do."""

from __future__ import annotations

import os

SLOWEST = 3.0
"""Machines may be so many times slower than those for which the times in tests were chosen."""


def overload() -> float:
    """How many times as long things may take: threads that want to run, per core, or SLOWEST. Patience costs nothing where all is well."""
    return max(SLOWEST, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
