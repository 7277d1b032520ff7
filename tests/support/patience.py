"""How long to wait for what must come true soon, on a machine that may have other things to do."""

from __future__ import annotations

import os


def overload() -> float:
    """How many times as long as on a machine that does nothing else things may take: threads that want to run, per core; at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
