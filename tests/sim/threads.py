"""What takes the place of threads and of what they post to streams: events of the process that they belong to."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from tests.sim.network import End, Link

if TYPE_CHECKING:
    from tests.sim.ranks import Rank
    from tests.sim.world import World


class Nothing:
    """Metrics that nobody reads."""

    def __getattr__(self, name: str) -> Nothing:
        setattr(self, name, self)  # the next time it is found at once
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Nothing:
        return self


NOTHING: Any = Nothing()


class SimThread:
    """In place of `InboxThread`: orders and turns happen as events of the process that made it.

    A thread takes its turns when the real one would, but for those of which `quiet_until` knows that they do nothing.
    """

    current: World

    def __init__(self, name: str, turn: Callable[[], float], died: Callable[[Exception], None]) -> None:
        self._process, self._turn = cast("Rank", SimThread.current.current), turn
        self._orders: deque[Callable[[], None]] = deque()
        self.quiet_until: Callable[[], float] = lambda: 0.0
        """Until when, on the process's clock, a turn without an order does nothing."""
        self.check: Callable[[], None] = lambda: None
        """Called after every turn."""
        self._due = -1.0
        self._busy_until = 0.0
        self._is_started = False
        self._polled, self._poll_s = 0.0, 1.0
        """When the last turn was, and after what time there would be another."""

    def start(self) -> None:
        self._is_started = True
        self._wake(0.0)

    def poll(self) -> None:
        """There is something to find for the next turn that the real thread would take."""
        if self._is_started:
            since = self._process.loop._now - self._polled
            self._wake(math.ceil(since / self._poll_s) * self._poll_s - since)

    def put(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        if self._is_started:
            self._wake(0.0)

    def end(self) -> None:
        self._is_started = False

    def join(self) -> None:
        pass

    def _wake(self, delay: float) -> None:
        loop = self._process.loop
        now = loop._now
        when = now + delay
        if when < self._busy_until:
            when = self._busy_until
        if self._due < 0 or when < self._due:
            self._due = when
            if when == now:
                loop.soon(self._process, self._run, when)
            else:
                loop.at_owner(when, self._process, self._run, (when,))

    def _run(self, when: float) -> None:
        if when != self._due or not self._is_started:
            return  # it was woken earlier since
        self._due = -1.0
        if self._process.loop._now < self._busy_until:
            self._wake(0.0)
            return
        orders, process = self._orders, self._process
        while orders:
            orders.popleft()()
        wait = self._turn()
        if process.runner.busy_s:
            wait = process.runner.busy_s
            self._busy_until = process.loop._now + wait
            process.runner.busy_s = 0.0
        self.check()
        self._polled, self._poll_s = process.loop._now, max(wait, 0.001)
        quiet_s = self.quiet_until() - process.now()
        if quiet_s < math.inf:
            self._wake(max(math.ceil(quiet_s / self._poll_s), 1) * self._poll_s)


class SimOutbox:
    """In place of `Outbox`: what was posted leaves as one message, at once."""

    def __init__(self, kind: Callable[[], Any], loop: Any) -> None:
        process = SimThread.current.current
        assert process is not None
        self._process = process
        self._pending: Any = None
        self.is_closed = False
        self.link: Link | None = None
        self.end: End | None = None
        self.finish: Callable[[Any], None] = lambda update: None

    def connect(self, link: Link, end: End, finish: Callable[[Any], None]) -> None:
        self.link, self.end, self.finish = link, end, finish

    def post(self, part: Any) -> None:
        if self.is_closed:
            return
        if self._pending is None:
            self._pending = part
            self._process.loop.soon(self._process, self._flush)
        else:
            self._pending.MergeFrom(part)

    def _flush(self) -> None:
        update, self._pending = self._pending, None
        if self.link is not None and self.end is not None and not self.is_closed:
            self.finish(update)
            self.link.send(self.end, update)

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            if self.link is not None and self.end is not None and self.end.is_open:
                self.link.end(self._process, "the other end closed the session")
                self.end.lost("the session was closed")
