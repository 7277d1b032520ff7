"""The choices of one request, read as one stream: whichever has something new."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")

MAX_AHEAD = 256
"""Items that are read before somebody wants them."""


async def interleaved(sources: Iterable[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """(number of the source, item), those of one source in order. Raises the first error of any; closing it closes all sources."""
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(MAX_AHEAD)

    async def read(number: int, source: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(source) as items:
                async for item in items:
                    await queue.put((number, item))
            await queue.put(None)
        except Exception as error:  # handed to the reader, who raises it
            await queue.put(error)

    tasks = [asyncio.create_task(read(number, source)) for number, source in enumerate(sources)]
    try:
        left = len(tasks)
        while left:
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                left -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
