"""The serving side of a session: one bidirectional gRPC stream with a router, one merged update a step.

    outbox = Outbox(PrefillUpdate, asyncio.get_running_loop())
    async for update in serve_session(commands, outbox, handle, finish_update, timeout_s): yield update

Other threads `post` parts of updates; whatever has been posted when the stream is ready to send goes out as one message.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from core.errors import Unavailable
from core.log import get_logger
from core.rpc import MAX_MESSAGE_BYTES, PING_INTERVAL_S

log = get_logger("session")


class Outbox:
    """Owner of what one peer has yet to be told. `post` may be called from any thread."""

    def __init__(self, kind: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self._kind, self._loop = kind, loop
        self._lock = threading.Lock()
        self._pending = kind()
        self._bytes = 0
        self._filled = asyncio.Event()
        self.is_closed = False
        """Set when the session is over or its peer reads too slowly; later posts are dropped."""

    def post(self, part: Any) -> None:
        """Merge a message into the next update (repeated fields are appended)."""
        with self._lock:
            if self.is_closed:
                return
            self._pending.MergeFrom(part)
            self._bytes += part.ByteSize()
            if self._bytes > MAX_MESSAGE_BYTES // 2:
                self.is_closed = True
        try:
            self._loop.call_soon_threadsafe(self._filled.set)
        except RuntimeError:  # the loop has ended, and the session with it
            self.is_closed = True

    def close(self) -> None:
        with self._lock:
            self.is_closed = True
        self._filled.set()

    async def next(self, timeout_s: float) -> Any:
        """Everything posted since the last call, as one message; empty after `timeout_s` without a post."""
        try:
            await asyncio.wait_for(self._filled.wait(), timeout_s)
        except TimeoutError:
            pass
        with self._lock:
            self._filled.clear()
            message, self._pending, self._bytes = self._pending, self._kind(), 0
        return message


async def serve_session(
    commands: AsyncIterator[Any],
    outbox: Outbox,
    handle: Callable[[Any], None],
    finish_update: Callable[[Any], None],
    timeout_s: float,
) -> AsyncIterator[Any]:
    """Yield updates until the peer leaves, says nothing for `timeout_s`, or reads too slowly. `handle` takes each command;
    `finish_update` adds what every update carries (the load). Ends by raising Unavailable or returning."""
    loop = asyncio.get_running_loop()
    heard = loop.time()
    problem: list[BaseException] = []

    async def read() -> None:
        nonlocal heard
        try:
            async for command in commands:
                heard = loop.time()
                handle(command)
        except Exception as error:  # outermost: whatever a command did, it ends this session only
            problem.append(error)
        finally:
            outbox.close()

    reader = asyncio.create_task(read())
    try:
        while not outbox.is_closed:
            update = await outbox.next(PING_INTERVAL_S)
            if loop.time() - heard > timeout_s:
                raise Unavailable(f"nothing heard from the peer for {timeout_s:g} s")
            finish_update(update)
            yield update
        if problem:
            log.warning("session.failed", error=repr(problem[0]))
    finally:
        outbox.close()
        reader.cancel()
