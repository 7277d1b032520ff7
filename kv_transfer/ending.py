"""The question of a receiver whose session with a sender broke: does that still write, or is it over, or dead?

    answer = await ask(origin, timeout_s)     # one of Answer; raises nothing

A stopped process refuses no connection: the kernel accepts it, and nobody answers. A refusal comes from the kernel of a machine on which
nobody listens there any more, and a prefill rank listens until its transport is closed.
"""

from __future__ import annotations

import asyncio
import enum

import grpc.aio

from core.rpc import new_channel
from kv_transfer.receiver import Origin
from protos import transfer_pb2, transfer_pb2_grpc


class Answer(enum.Enum):
    OVER = "over"
    """That life of the sender has none of the session's writes under way, and begins none."""
    UNDER_WAY = "under_way"
    ANOTHER_LIFE = "another_life"
    REFUSED = "refused"
    SILENCE = "silence"
    """It, or the way there, may be stopped or gone."""

    def is_proof(self, origin: Origin) -> bool:
        """Whether the session writes nothing any more. What is heard at an address says something of a life that has answered there."""
        return self is Answer.OVER or (self in (Answer.REFUSED, Answer.ANOTHER_LIFE) and origin.was_reached)


async def ask(origin: Origin, timeout_s: float) -> Answer:
    """The sender gives up the session if it still has it; link "" is none, and only asks who is there."""
    host, _, port = origin.address.rpartition(":")
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.close()
            await writer.wait_closed()
            channel = new_channel(origin.address)
            try:
                question = transfer_pb2.EndRequest(incarnation=origin.incarnation, link=origin.link)
                reply = await transfer_pb2_grpc.EndingStub(channel).End(question)
            finally:
                await channel.close()
    except ConnectionRefusedError:
        return Answer.REFUSED
    except (OSError, ValueError, grpc.aio.AioRpcError):  # ValueError: no address at all
        return Answer.SILENCE
    if reply.incarnation != origin.incarnation:
        return Answer.ANOTHER_LIFE
    return Answer.OVER if reply.is_over else Answer.UNDER_WAY
