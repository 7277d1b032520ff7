"""An asyncio event loop whose time is virtual: nothing waits, the clock goes to the next thing that is due.

Coroutines of the real code run on it unchanged; the simulation's own events are plain calls (`at`). What is due at the same time happens
in the order in which it was asked for, so a run depends on its seed only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from heapq import heappop, heappush
from typing import Any, Protocol

EVENTS_BETWEEN = 4
"""A run asks this often whether it is over."""


class Owner(Protocol):
    """A process."""

    is_alive: bool
    stopped_until: float
    world: Any
    """Its `current` is whose event happens."""


class _Call:
    """In place of asyncio's handles, without a context: nothing in a world keeps state in context variables."""

    __slots__ = ("_args", "_callback", "_when")

    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...], when: float) -> None:
        self._callback: Callable[..., Any] | None = callback
        self._args, self._when = args, when

    def __call__(self) -> None:
        if self._callback is not None:
            self._callback(*self._args)

    def cancel(self) -> None:
        self._callback = None

    def when(self) -> float:
        return self._when


class VirtualLoop(asyncio.AbstractEventLoop):
    def __init__(self) -> None:
        self._now = 0.0
        self._ready: deque[_Call] = deque()
        self._soon: deque[tuple[Owner, Callable[..., None], tuple[Any, ...]]] = deque()
        self._due: list[tuple[float, int, Owner | None, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self.num_events = 0
        self.is_ended = False
        self.tasks: list[asyncio.Task[Any]] = []

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        self._count += 1
        heappush(self._due, (when if when > self._now else self._now, self._count, None, call, args))

    def at_owner(self, when: float, owner: Owner, call: Callable[..., None], args: tuple[Any, ...]) -> None:
        """An event of `owner`: lost if it is dead by then, and put off for as long as it is stopped. Those for the same time keep their
        order."""
        self._count += 1
        heappush(self._due, (when if when > self._now else self._now, self._count, owner, call, args))

    def soon(self, owner: Owner, call: Callable[..., None], *args: Any) -> None:
        """As an event of `owner` at this time, right after what happens now."""
        self._soon.append((owner, call, args))

    def run(self, until: float, is_over: Callable[[], bool] | None = None) -> None:
        """Until the time has come, or `is_over`, which is asked after every few events. Whatever a call or a task raised is raised."""
        asyncio._set_running_loop(self)
        ready, soon, due = self._ready, self._soon, self._due
        num_events, owner, call, args = self.num_events, None, None, ()
        try:
            while True:
                while soon or ready:
                    if soon:
                        owner, call, args = soon.popleft()
                        self._call(owner, call, args)
                    else:
                        handle = ready.popleft()
                        callback = handle._callback
                        if callback is not None:
                            callback(*handle._args)
                if not due or due[0][0] > until or (is_over is not None and num_events % EVENTS_BETWEEN == 0 and is_over()):
                    return
                self._now, _, owner, call, args = heappop(due)
                num_events += 1
                if owner is None:
                    call(*args)
                else:
                    self._call(owner, call, args)
        finally:
            self.num_events = num_events
            asyncio._set_running_loop(None)

    def _call(self, owner: Owner, call: Callable[..., None], args: tuple[Any, ...]) -> None:
        if not owner.is_alive:
            return
        if self._now < owner.stopped_until:
            self.at_owner(owner.stopped_until, owner, call, args)
            return
        owner.world.current = owner
        call(*args)

    def end(self) -> None:
        """Cancel all tasks and let them come to their ends, whatever they raise."""
        self.is_ended = True
        for task in self.tasks:
            task.cancel()
        self.run(self._now)

    # -- what asyncio asks of a loop ---------------------------------------------------------------------------------------------

    def time(self) -> float:
        return self._now

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        call = _Call(callback, args, self._now)
        self._ready.append(call)
        return call

    call_soon_threadsafe = call_soon

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        return self.call_at(self._now + delay, callback, *args)

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        call = _Call(callback, args, when)
        self.at(when, call)
        return call

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:  # type: ignore[override]
        task = asyncio.Task(coro, loop=self, name=name or "task")
        self.tasks.append(task)
        task.add_done_callback(_raise)
        return task

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self.is_ended

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """A callback raised, or a task whose exception nobody has looked at is gone."""
        if not self.is_ended:
            raise context.get("exception") or AssertionError(context["message"])


def _raise(task: asyncio.Task[Any]) -> None:
    """Nobody awaits the tasks of a world: what one of them raised ends it."""
    if not task.cancelled():
        error = task.exception()
        if error is not None:
            raise error
