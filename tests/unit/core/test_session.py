"""The serving side of a session, with a peer in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from core.errors import Unavailable
from core.session import Outbox, first_message, serve_session
from protos import common_pb2, decode_pb2


def failure(name: str) -> decode_pb2.DecodeUpdate:
    return decode_pb2.DecodeUpdate(failures=[common_pb2.Failure(request_id=name)])


class Peer:
    """`commands` is what it says; None ends it. `write` is how it is told."""

    def __init__(self, *, reads: bool = True) -> None:
        self.said: asyncio.Queue[Any] = asyncio.Queue()
        self.heard: list[Any] = []
        self.reads = reads

    async def commands(self) -> AsyncIterator[Any]:
        while (command := await self.said.get()) is not None:
            yield command

    async def write(self, update: Any) -> None:
        if not self.reads:
            await asyncio.Event().wait()
        self.heard.append(update)

    @property
    def names(self) -> list[str]:
        return [failure.request_id for update in self.heard for failure in update.failures]


def serve(peer: Peer, outbox: Outbox, handle: Callable[[Any], None] = lambda command: None, timeout_s: float = 5.0) -> Any:
    def finish(update: Any) -> None:
        update.draining = True

    return serve_session(peer.commands(), peer.write, outbox, handle, finish, timeout_s)


def new_outbox(**options: Any) -> Outbox:
    return Outbox(decode_pb2.DecodeUpdate, asyncio.get_running_loop(), **options)


def test_posts_are_merged_into_one_update_and_a_leaving_peer_ends_it() -> None:
    async def live() -> None:
        peer, outbox, commands = Peer(), new_outbox(), list[Any]()
        await asyncio.to_thread(lambda: [outbox.post(failure(name)) for name in "abc"])
        task = asyncio.create_task(serve(peer, outbox, commands.append))
        peer.said.put_nowait("hello")
        while not peer.heard:
            await asyncio.sleep(0)
        peer.said.put_nowait(None)
        await asyncio.wait_for(task, 10)
        assert peer.names == ["a", "b", "c"]
        assert len(peer.heard) == 1 and peer.heard[0].draining
        assert commands == ["hello"]
        assert outbox.is_closed
        outbox.post(failure("late"))
        assert not (await outbox.next(0.0)).failures

    asyncio.run(live())


def test_a_silent_peer_is_lost_in_time_even_if_it_does_not_read() -> None:
    async def live() -> None:
        for reads in (True, False):
            began = asyncio.get_running_loop().time()
            outbox = new_outbox()
            outbox.post(failure("a"))
            with pytest.raises(Unavailable, match="nothing heard"):
                await asyncio.wait_for(serve(Peer(reads=reads), outbox, timeout_s=0.05), 10)
            assert asyncio.get_running_loop().time() - began >= 0.05
            assert outbox.is_closed

    asyncio.run(live())


def test_a_peer_that_leaves_too_much_unread_is_cut_off_though_it_talks() -> None:
    async def live() -> None:
        peer, outbox = Peer(reads=False), new_outbox(max_bytes=1000)
        task = asyncio.create_task(serve(peer, outbox))
        for number in range(200):
            peer.said.put_nowait("ping")
            outbox.post(failure(f"request-{number}"))
            await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="too slowly"):
            await asyncio.wait_for(task, 10)

    asyncio.run(live())


def test_what_a_command_raises_ends_the_session() -> None:
    async def live() -> None:
        peer, outbox = Peer(), new_outbox()

        def broken(command: Any) -> None:
            raise ValueError(command)

        peer.said.put_nowait("bad")
        with pytest.raises(ValueError, match="bad"):
            await asyncio.wait_for(serve(peer, outbox, broken), 10)
        assert outbox.is_closed

    asyncio.run(live())


def test_cancelling_it_leaves_no_task_behind() -> None:
    async def live() -> None:
        task = asyncio.create_task(serve(Peer(reads=False), new_outbox()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(live())


def test_the_first_message_has_a_deadline() -> None:
    async def live() -> None:
        peer = Peer()
        assert await first_message(peer.commands(), 0.02) is None
        peer.said.put_nowait("hello")
        assert await first_message(peer.commands(), 2.0) == "hello"
        peer.said.put_nowait(None)
        assert await first_message(peer.commands(), 2.0) is None

    asyncio.run(live())
