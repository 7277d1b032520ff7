"""What a receiver hears of a sender whose session it has lost, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from core.clock import SystemClock
from core.kv_layout import KVLayout
from core.metrics import new_registry
from core.region import Region
from core.request import Member, Reservation
from core.rpc import Listener
from kv_transfer.config import TransferConfig
from kv_transfer.ending import Answer, ask
from kv_transfer.metrics import SenderMetrics
from kv_transfer.receiver import Origin
from kv_transfer.sending import KVSender

REGION = Region(address=0, num_pieces=1, piece_bytes=8)


def reached(address: str) -> Origin:
    return Origin(address, 5, "decode/0.0#7/1", was_reached=True)


@contextlib.asynccontextmanager
async def listening_sender() -> AsyncIterator[tuple[KVSender, Origin]]:
    listener = Listener("127.0.0.1", 0)
    member = Member(role="prefill", replica=0, rank=0, address=f"127.0.0.1:{listener.port}", incarnation=5)
    config, metrics, never = TransferConfig(transport="memory"), SenderMetrics(new_registry()), cast(Any, pytest.fail)
    sender = KVSender(config, cast(KVLayout, None), REGION, REGION, member, SystemClock(), metrics, lambda event: None, never)
    await sender.start()
    sender.add_to(listener.server)
    await listener.start()
    try:
        yield sender, reached(member.address)
    finally:
        await sender.close()
        await listener.stop(0)


def asked(origin: Origin, timeout_s: float = 5.0) -> Answer:
    return asyncio.run(ask(origin, timeout_s))


def test_a_sender_says_that_it_is_over_with_a_session_that_it_does_not_have() -> None:
    async def run() -> None:
        async with listening_sender() as (_, origin):
            assert await ask(origin, 5.0) is Answer.OVER

    asyncio.run(run())


def test_a_sender_that_is_asked_gives_the_session_up_and_says_so_when_its_writes_are_out() -> None:
    async def run() -> None:
        async with listening_sender() as (sender, origin):
            decode = Member(role="decode", replica=0, rank=0, address="127.0.0.1:1", incarnation=7)
            state = sender._state
            state.open("r", origin.link, Reservation(request_id="r", decode=decode, epoch=1, page_ids=(0,), slot_id=0, lease_s=9.0), 0.0)
            state.vouched(origin.link, SystemClock().now())
            state.live(origin.link, 1)
            state.push("r", 0, [0])
            post = state.next_post()
            assert post is not None
            state.posted(post, 1, SystemClock().now())
            sender._drop = lambda drop: None  # type: ignore[method-assign]  # this link has no session and no connection
            assert await ask(origin, 5.0) is Answer.UNDER_WAY
            assert not state.is_usable(origin.link), "and it begins no other write"
            state.write_finished("r", 1, True, SystemClock().now())
            assert await ask(origin, 5.0) is Answer.OVER

    asyncio.run(run())


def test_another_life_at_the_address_proves_the_one_that_is_meant_dead() -> None:
    async def run() -> None:
        async with listening_sender() as (_, origin):
            answer = await ask(dataclasses.replace(origin, incarnation=4), 5.0)
            assert answer is Answer.ANOTHER_LIFE and answer.is_proof(origin)

    asyncio.run(run())


def test_a_dead_process_refuses_and_that_proves_it() -> None:
    with socket.socket() as gone:
        gone.bind(("127.0.0.1", 0))
        origin = reached(f"127.0.0.1:{gone.getsockname()[1]}")
    answer = asked(origin)
    assert answer is Answer.REFUSED and answer.is_proof(origin)


@pytest.mark.parametrize("answer", [Answer.REFUSED, Answer.ANOTHER_LIFE])
def test_an_address_at_which_the_sender_never_answered_proves_nothing(answer: Answer) -> None:
    """It may be one that means another machine to its receiver, as 0.0.0.0 does."""
    unknown = dataclasses.replace(reached("0.0.0.0:1"), was_reached=False)
    assert not answer.is_proof(unknown) and answer.is_proof(reached("10.0.0.1:1"))
    assert Answer.OVER.is_proof(unknown)


def test_a_process_that_is_stopped_accepts_and_says_nothing_which_proves_nothing() -> None:
    """The kernel takes the connection: as with a listening socket that nobody accepts from."""
    with socket.socket() as stopped:
        stopped.bind(("127.0.0.1", 0))
        stopped.listen()
        origin = reached(f"127.0.0.1:{stopped.getsockname()[1]}")
        answer = asked(origin, 0.2)
    assert answer is Answer.SILENCE and not answer.is_proof(origin)


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1:none"])
def test_an_address_that_is_none_says_nothing(address: str) -> None:
    assert asked(reached(address)) is Answer.SILENCE


def test_no_writes_are_left_when_the_port_is_free() -> None:
    """A receiver takes a refusal for the end of all writes, so a rank that ends closes its sender before its port. Meanwhile it answers."""

    async def run() -> None:
        async with listening_sender() as (sender, origin):
            is_ending = threading.Event()
            sender._thread.put(lambda: cast(None, is_ending.wait(20)))
            closing = asyncio.create_task(sender.close())
            await asyncio.sleep(0)
            asking = asyncio.create_task(ask(origin, 10.0))
            done, _ = await asyncio.wait((closing, asking), timeout=0.02)
            assert not done, "its thread has something to do, perhaps to write"
            is_ending.set()
            assert await asking is Answer.OVER, "its thread has ended; its port has not"
            await closing
            assert await ask(origin, 10.0) is Answer.OVER

    asyncio.run(run())
