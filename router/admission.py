"""Whether there is room for one more request in this router process, and if not, when to come back. Pure but for its counters.

Clients that are refused are given their turns one after the other, as far apart as room comes free when all of it is taken: that is its
size by the mean time for which it was taken of late (Little's law). What came free a second would not do: it falls when those who were
sent away stay away, and would keep them away longer still.
"""

from __future__ import annotations

from collections import deque

from core.clock import Clock
from core.errors import Overloaded

WINDOW_S = 30.0
"""How far back durations count."""

UNKNOWN_S = 5.0
"""Retry-After while nothing has come free."""

MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0


class Room:
    """Something bounded: what is taken of it, for how long it was, and until when turns are given."""

    def __init__(self, limit: int, clock: Clock) -> None:
        self.limit, self.taken = limit, 0
        self._clock = clock
        self._freed: deque[tuple[float, int, float]] = deque(maxlen=4096)
        """When, how much, and for how long it was taken."""
        self._given_until = clock.now()

    def fits(self, amount: int) -> bool:
        """One always fits what is empty, however large it is."""
        return not self.taken or self.taken + amount <= self.limit

    def take(self, amount: int) -> None:
        self.taken += amount

    def free(self, amount: int, seconds: float) -> None:
        """It was taken for so long."""
        self.taken -= amount
        self._freed.append((self._clock.now(), amount, seconds))

    def turn_s(self, amount: int) -> float:
        """Seconds until it is this client's turn, behind those refused before it; between 1 and 60."""
        now = self._clock.now()
        recent = [(freed, seconds) for when, freed, seconds in self._freed if freed and now - when < WINDOW_S]
        if not recent:
            return UNKNOWN_S
        mean_s = sum(freed * seconds for freed, seconds in recent) / sum(freed for freed, _ in recent)
        self._given_until = min(max(self._given_until, now) + amount * mean_s / self.limit, now + MAX_RETRY_S)
        return max(self._given_until - now, MIN_RETRY_S)


class Admission:
    """Owner of what is admitted. Every `enter` is followed by `first_token` for all its prompt tokens and by one `leave`, each with the
    seconds since then."""

    def __init__(self, *, max_requests: int, max_waiting_tokens: int, clock: Clock) -> None:
        self._requests, self._tokens = Room(max_requests, clock), Room(max_waiting_tokens, clock)

    @property
    def num_requests(self) -> int:
        return self._requests.taken

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of admitted requests without a first token."""
        return self._tokens.taken

    def enter(self, num_requests: int, num_tokens: int) -> None:
        """Count a request in (it may stand for several sequences). Raises Overloaded when full; one request always fits an empty router."""
        for room, amount, what in (
            (self._requests, num_requests, "requests are in progress"),
            (self._tokens, num_tokens, "prompt tokens wait"),
        ):
            if not room.fits(amount):
                raise Overloaded(f"{room.taken} {what}, the limit is {room.limit}", retry_after_s=room.turn_s(amount))
        self._requests.take(num_requests)
        self._tokens.take(num_tokens)

    def first_token(self, num_tokens: int, seconds: float) -> None:
        self._tokens.free(num_tokens, seconds)

    def leave(self, num_requests: int, seconds: float) -> None:
        self._requests.free(num_requests, seconds)
