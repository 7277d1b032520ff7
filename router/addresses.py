"""Ranks at fixed addresses, in place of a controller: each is asked who it is, and again after it was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc.aio

from core.codec import decode_member
from core.errors import BatonError, Mismatch, Unavailable
from core.kv_layout import WIRE_VERSION
from core.log import get_logger
from core.request import Member
from core.rpc import new_channel
from protos import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from router.members import Members

log = get_logger("router")

ASK_INTERVAL_S = 0.5
ANSWER_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Address:
    role: str
    """"prefill" or "decode"."""
    address: str
    """host:port of the rank's gRPC server."""


async def ask(place: Address) -> Member:
    """The rank that answers there. Raises Unavailable, or Mismatch if another role or wire version answers."""
    channel = new_channel(place.address)
    hello = common_pb2.Hello(wire_version=WIRE_VERSION, name="who-is-there")
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            if place.role == "prefill":
                call = prefill_pb2_grpc.PrefillStub(channel).Session()
                await call.write(prefill_pb2.PrefillCommand(hello=hello))
            else:
                call = decode_pb2_grpc.DecodeStub(channel).Session()
                await call.write(decode_pb2.DecodeCommand(hello=hello))
            update = await call.read()
        if update is grpc.aio.EOF:
            raise Unavailable(f"{place.address} closed the session")
        return decode_member(update.hello.member)
    except TimeoutError as error:
        raise Unavailable(f"{place.address} says nothing") from error
    except grpc.aio.AioRpcError as error:
        if error.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.FAILED_PRECONDITION):
            raise Mismatch(f"{place.address} is no {place.role} rank that fits this router: {error.details()}") from error
        raise Unavailable(f"{place.address} does not answer ({error.code().name})") from error
    finally:
        await channel.close()


async def wait_for_ranks(places: Sequence[Address]) -> list[Member]:
    """Returns when each has answered once. Raises Mismatch."""
    waits = [asyncio.create_task(_wait_for(place)) for place in places]
    try:
        return list(await asyncio.gather(*waits))
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def _wait_for(place: Address) -> Member:
    has_told = False
    while True:
        try:
            return await ask(place)
        except Unavailable as error:
            if not has_told:
                log.info("router.waiting", role=place.role, address=place.address, reason=str(error))
            has_told = True
        await asyncio.sleep(ASK_INTERVAL_S)


async def follow_addresses(places: Sequence[Address], members: Members) -> None:
    """For ever: whoever answers at the addresses is a member until another does. A rank that is away keeps its place. Each address is
    asked for itself: one that says nothing takes ANSWER_TIMEOUT_S each time."""
    known: dict[Address, Member] = {}

    async def follow(place: Address) -> None:
        while True:
            connected = {session.member.incarnation for session in members.sessions(place.role) if session.is_connected}
            if place not in known or known[place].incarnation not in connected:
                try:
                    known[place] = await ask(place)
                    members.update(list(known.values()))
                except BatonError as error:
                    log.debug("rank.away", role=place.role, address=place.address, reason=str(error))
            await asyncio.sleep(ASK_INTERVAL_S)

    await asyncio.gather(*(follow(place) for place in places))
