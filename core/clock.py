"""The only source of time and randomness for decision code, so that tests and the simulation can supply their own."""

from __future__ import annotations

import random
import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds on a monotonic scale with an arbitrary origin; never goes back, unaffected by wall-clock changes."""
        ...


class SystemClock:
    def now(self) -> float:
        return time.monotonic()


def new_incarnation() -> int:
    """A random positive 63-bit number that identifies one life of one process."""
    return random.SystemRandom().getrandbits(62) + 1
