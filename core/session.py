"""The serving side of a session: one bidirectional gRPC stream with a peer, one merged update a step.

    outbox = Outbox(PrefillUpdate, asyncio.get_running_loop())
    await serve_session(commands, context.write, outbox, handle, finish_update, timeout_s)

Other threads `post` parts of updates; whatever has been posted when the stream is ready to send goes out as one message.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc.aio

from core.errors import Unavailable
from core.rpc import MAX_MESSAGE_BYTES, PING_INTERVAL_S

T = TypeVar("T")


class Outbox:
    """Owner of what one peer has yet to be told. `post` may be called from any thread, the rest belongs to the event loop."""

    def __init__(self, kind: Callable[[], Any], loop: asyncio.AbstractEventLoop, *, max_bytes: int = MAX_MESSAGE_BYTES // 2) -> None:
        """`max_bytes`: a peer that leaves more than this unread is cut off."""
        self._kind, self._loop, self._max_bytes = kind, loop, max_bytes
        self._lock = threading.Lock()
        self._pending = kind()
        self._bytes = 0
        self._filled, self._ended = asyncio.Event(), asyncio.Event()
        self.is_closed = False
        """Set when the session is over or its peer reads too slowly; later posts are dropped."""
        self.is_overfull = False

    def post(self, part: Any) -> None:
        """Merge a message into the next update (repeated fields are appended)."""
        with self._lock:
            if self.is_closed:
                return
            self._pending.MergeFrom(part)
            self._bytes += part.ByteSize()
            if self._bytes > self._max_bytes:
                self.is_closed = self.is_overfull = True
        event = self._ended if self.is_closed else self._filled
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the session with it
            self._loop.call_soon_threadsafe(event.set)

    def close(self) -> None:
        with self._lock:
            self.is_closed = True
        self._ended.set()

    async def closed(self, timeout_s: float) -> bool:
        """Whether it is closed, or was within `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        return self._ended.is_set()

    async def next(self, timeout_s: float) -> Any:
        """Everything posted since the last call, as one message; empty after `timeout_s` without a post."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):  # not wait_for, which before Python 3.12 may swallow a cancellation
                await self._filled.wait()
        with self._lock:
            self._filled.clear()
            message, self._pending, self._bytes = self._pending, self._kind(), 0
        return message


async def first_message(messages: AsyncIterator[T], timeout_s: float) -> T | None:
    """What a peer says first; None if it leaves, or says nothing for `timeout_s`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            return await anext(messages, None)
    return None


async def serve_session(
    commands: AsyncIterator[Any],
    write: Callable[[Any], Awaitable[None]],
    outbox: Outbox,
    handle: Callable[[Any], None],
    finish_update: Callable[[Any], None],
    timeout_s: float,
) -> None:
    """Exchange messages until the peer leaves or the outbox is closed. `handle` takes each command; `finish_update` adds what every
    update carries (the load). Raises Unavailable when the peer says nothing for `timeout_s` or leaves more unread than the outbox
    holds, and whatever `handle` raises. The outbox is closed afterwards."""
    loop = asyncio.get_running_loop()
    heard = loop.time()

    async def read() -> None:
        nonlocal heard
        async for command in commands:
            heard = loop.time()
            handle(command)

    async def send() -> None:
        while True:
            update = await outbox.next(PING_INTERVAL_S)
            if outbox.is_closed:
                return
            finish_update(update)
            try:
                await write(update)
            except grpc.aio.BaseError:  # the call has ended under it
                return

    async def watch() -> None:
        while (left := heard + timeout_s - loop.time()) > 0:
            if await outbox.closed(left):
                return
        raise Unavailable(f"nothing heard from the peer for {timeout_s:g} s")

    tasks = [asyncio.create_task(work()) for work in (read, send, watch)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        if outbox.is_overfull:
            raise Unavailable("the peer reads too slowly: too much lies unread")
    finally:
        outbox.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
