"""Whether there is room for one more request in this router process, and if not, when to come back. Pure but for its counters.

Clients that are refused are given their turns one after the other, as far apart as room comes free when all of it is taken: that is its
size by the mean time for which it was taken of late (Little's law). What came free a second would not do: it falls when those who were
sent away stay away, and would keep them away longer still.
"""

from __future__ import annotations

from collections import deque

from core.clock import Clock
from core.errors import Overloaded

WINDOW_S, MOST_FREED = 30.0, 4096
"""How far back durations count, and how many do."""

UNKNOWN_S = 5.0
"""Retry-After while nothing has come free."""

MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0


class Room:
    """Something bounded: what is taken of it, for how long it was, and until when turns are given."""

    def __init__(self, limit: int, clock: Clock) -> None:
        self.limit, self.taken = limit, 0
        self._clock = clock
        self._freed: deque[tuple[float, int, float]] = deque()
        """When, how much, and that times the seconds for which it was taken, of late; `_amount` and `_busy` are their sums."""
        self._amount, self._busy = 0, 0.0
        self._given_until = clock.now()

    def fits(self, amount: int) -> bool:
        """One always fits what is empty, however large it is."""
        return not self.taken or self.taken + amount <= self.limit

    def take(self, amount: int) -> None:
        self.taken += amount

    def free(self, amount: int, seconds: float) -> None:
        """It was taken for so long."""
        self.taken -= amount
        if amount:
            self._freed.append((self._clock.now(), amount, amount * seconds))
            self._amount, self._busy = self._amount + amount, self._busy + amount * seconds
            self._forget()

    def turn_s(self, amount: int) -> float:
        """Seconds until it is this client's turn, behind those refused before it; between 1 and 60."""
        now = self._clock.now()
        self._forget()
        if not self._freed:
            return UNKNOWN_S
        self._given_until = min(max(self._given_until, now) + amount * self._busy / self._amount / self.limit, now + MAX_RETRY_S)
        return max(self._given_until - now, MIN_RETRY_S)

    def _forget(self) -> None:
        now = self._clock.now()
        while self._freed and (len(self._freed) > MOST_FREED or now - self._freed[0][0] >= WINDOW_S):
            _, amount, busy = self._freed.popleft()
            self._amount, self._busy = self._amount - amount, self._busy - busy
        if not self._freed:
            self._busy = 0.0  # what roundings left


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
        self.refuse_if_full(num_requests)
        _refuse_beyond(self._tokens, num_tokens, "prompt tokens wait")
        self._requests.take(num_requests)
        self._tokens.take(num_tokens)

    def refuse_if_full(self, num_requests: int = 1) -> None:
        """Raises Overloaded if so many more are too many, however few tokens they have."""
        _refuse_beyond(self._requests, num_requests, "requests are in progress")

    def first_token(self, num_tokens: int, seconds: float) -> None:
        self._tokens.free(num_tokens, seconds)

    def leave(self, num_requests: int, seconds: float) -> None:
        self._requests.free(num_requests, seconds)


def _refuse_beyond(room: Room, amount: int, what: str) -> None:
    if not room.fits(amount):
        raise Overloaded(f"{room.taken} {what}, the limit is {room.limit}", retry_after_s=room.turn_s(amount))
