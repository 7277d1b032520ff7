"""Several streams read as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from router.interleave import MAX_AHEAD, interleaved

ended: list[str] = []


async def source(name: str, count: int, fails: bool = False) -> AsyncGenerator[str, None]:
    try:
        for number in range(count):
            await asyncio.sleep(0)
            yield f"{name}{number}"
        if fails:
            raise ValueError(name)
    finally:
        ended.append(name)


@pytest.fixture(autouse=True)
def nothing_ended() -> None:
    ended.clear()


def test_every_item_comes_once_in_the_order_of_its_source_and_all_take_turns() -> None:
    async def read() -> list[tuple[int, str]]:
        return [found async for found in interleaved([source("a", 3), source("b", 2)])]

    found = asyncio.run(read())
    assert [item for number, item in found if number == 0] == ["a0", "a1", "a2"]
    assert [item for number, item in found if number == 1] == ["b0", "b1"]
    assert {number for number, _ in found[:2]} == {0, 1}, "none waits for the end of another"


def test_the_first_error_ends_all() -> None:
    async def read() -> None:
        async for _ in interleaved([source("a", 10**9), source("b", 2, fails=True)]):
            pass

    with pytest.raises(ValueError, match="b"):
        asyncio.run(read())
    assert sorted(ended) == ["a", "b"]


def test_a_reader_that_leaves_ends_all_and_one_that_waits_is_waited_for() -> None:
    made = 0

    async def counted() -> AsyncGenerator[int, None]:
        nonlocal made
        async with aclosing(source("a", 10**9)) as items:
            async for _ in items:
                made += 1
                yield made

    async def leave() -> None:
        async with aclosing(interleaved([counted()])) as items:
            async for _ in items:
                for _ in range(4 * MAX_AHEAD):
                    await asyncio.sleep(0)
                break

    asyncio.run(leave())
    assert ended == ["a"] and MAX_AHEAD <= made <= MAX_AHEAD + 3
