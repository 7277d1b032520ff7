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


class ManualClock:
    """A clock that a test moves by hand."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        assert seconds >= 0, f"{seconds=}"
        self._now += seconds


def new_incarnation() -> int:
    """A random positive 63-bit number that identifies one life of one process."""
    return random.SystemRandom().getrandbits(62) + 1
