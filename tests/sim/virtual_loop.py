"""An asyncio event loop whose time is virtual: nothing waits, the clock goes to the next thing that is due.

Coroutines of the real code run on it unchanged; the simulation's own events are plain calls (`at`). What is due at the same time happens
in the order in which it was asked for, so a run depends on its seed only.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

EVENTS_BETWEEN = 8
"""A run asks this often whether it is over."""


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
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self.num_events = 0
        self.is_ended = False
        self.tasks: list[asyncio.Task[Any]] = []

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        self._count += 1
        heapq.heappush(self._due, (when if when > self._now else self._now, self._count, call, args))

    def run(self, until: float, is_over: Callable[[], bool] | None = None) -> None:
        """Until the time has come, or `is_over`, which is asked after every few events. Whatever a call or a task raised is raised."""
        asyncio._set_running_loop(self)
        ready, due = self._ready, self._due
        try:
            while True:
                while ready:
                    ready.popleft()()
                if not due or due[0][0] > until or (is_over is not None and self.num_events % EVENTS_BETWEEN == 0 and is_over()):
                    return
                self._now, _, call, args = heapq.heappop(due)
                self.num_events += 1
                call(*args)
        finally:
            asyncio._set_running_loop(None)

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
