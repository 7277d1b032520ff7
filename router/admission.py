"""Whether there is room for one more request in this router process. Pure but for its counters."""

from __future__ import annotations

from collections import deque

from core.clock import Clock
from core.errors import Overloaded

RATE_WINDOW_S = 30.0


class Admission:
    def __init__(self, *, max_requests: int, max_waiting_tokens: int, clock: Clock) -> None:
        self._max_requests, self._max_tokens, self._clock = max_requests, max_waiting_tokens, clock
        self.num_requests = 0
        self.waiting_tokens = 0
        """Prompt tokens of admitted requests without a first token."""
        self._finished: deque[float] = deque(maxlen=1000)

    def enter(self, num_requests: int, num_tokens: int) -> None:
        """Count a request in (it may stand for several sequences). Raises Overloaded when full; one request always fits an empty router."""
        if self.num_requests and self.num_requests + num_requests > self._max_requests:
            raise Overloaded(
                f"{self.num_requests} requests are in progress, the limit is {self._max_requests}", retry_after_s=self.retry_after_s()
            )
        if self.waiting_tokens and self.waiting_tokens + num_tokens > self._max_tokens:
            raise Overloaded(
                f"{self.waiting_tokens} prompt tokens are waiting, the limit is {self._max_tokens}", retry_after_s=self.retry_after_s()
            )
        self.num_requests += num_requests
        self.waiting_tokens += num_tokens

    def first_token(self, num_tokens: int) -> None:
        self.waiting_tokens -= num_tokens

    def leave(self, num_requests: int) -> None:
        self.num_requests -= num_requests
        self._finished.append(self._clock.now())

    def retry_after_s(self) -> float:
        """Seconds in which about one request in ten ends, at the rate of the last half minute; between 1 and 60."""
        now = self._clock.now()
        recent = [when for when in self._finished if now - when < RATE_WINDOW_S]
        if not recent:
            return 5.0
        rate = len(recent) / max(now - recent[0], 1.0)
        return min(max(self.num_requests / 10 / rate, 1.0), 60.0)
