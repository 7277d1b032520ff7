"""An asyncio event loop whose time is virtual: nothing waits, the clock goes to the next thing that is due.

Coroutines of the real code run on it unchanged; the simulation's own events are plain calls (`at`). What is due at the same time happens
in the order in which it was asked for, so a run depends on its seed only.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any


class VirtualLoop(asyncio.AbstractEventLoop):
    def __init__(self) -> None:
        self._now = 0.0
        self._ready: deque[asyncio.Handle] = deque()
        self._due: list[tuple[float, int, asyncio.Handle | Callable[[], None]]] = []
        self._count = 0
        self.num_events = 0
        self.is_ended = False
        self.tasks: list[asyncio.Task[Any]] = []

    def at(self, when: float, call: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._due, (when if when > self._now else self._now, self._count, call))

    def run(self, until: float, is_over: Callable[[], bool]) -> None:
        """Until the time has come, or `is_over` when nothing more is due at a moment. Whatever a call or a task raised is raised."""
        asyncio._set_running_loop(self)
        ready, due = self._ready, self._due
        try:
            while True:
                while ready:
                    handle = ready.popleft()
                    if not handle._cancelled:  # type: ignore[attr-defined]
                        handle._run()
                if not due or due[0][0] > until or is_over():
                    return
                when, _, call = heapq.heappop(due)
                self._now = when
                self.num_events += 1
                if not isinstance(call, asyncio.Handle):
                    call()
                elif not call._cancelled:  # type: ignore[attr-defined]
                    call._run()
        finally:
            asyncio._set_running_loop(None)

    def end(self) -> None:
        """Cancel all tasks and let them come to their ends, whatever they raise."""
        self.is_ended = True
        for task in self.tasks:
            task.cancel()
        self.run(self._now, lambda: False)

    # -- what asyncio asks of a loop ---------------------------------------------------------------------------------------------

    def time(self) -> float:
        return self._now

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_later(self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._count += 1
        heapq.heappush(self._due, (when if when > self._now else self._now, self._count, handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

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
