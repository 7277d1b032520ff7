"""The ranks that this router process knows, each with its session."""

from __future__ import annotations

import asyncio
import zlib

import grpc.aio

from core.clock import new_incarnation
from core.codec import decode_member
from core.log import get_logger
from core.request import Member, MemberKey
from core.rpc import new_channel, token_metadata
from protos import control_pb2, control_pb2_grpc
from router.session import RankSession

log = get_logger("router")


class Members:
    """Owner of the sessions."""

    def __init__(self, liveness_timeout_s: float, router_name: str = "") -> None:
        self.router_name = router_name or f"router-{new_incarnation():x}"
        self._timeout_s = liveness_timeout_s
        self._sessions: dict[MemberKey, RankSession] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def sessions(self, role: str) -> list[RankSession]:
        """A copy; may be called from any thread."""
        return [session for session in list(self._sessions.values()) if session.member.role == role]

    def ready(self, role: str) -> list[RankSession]:
        return [session for session in self.sessions(role) if session.is_ready]

    def update(self, members: list[Member]) -> None:
        """Make the sessions fit the list: a new incarnation is a new member, one that is not listed any more is let go."""
        listed = {member.key: member for member in members}
        for key, member in listed.items():
            if key not in self._sessions:
                self._sessions[key] = RankSession(member, self.router_name, self._timeout_s)
            elif member.state == "draining":
                self._sessions[key].is_draining = True
        # In an order of this router's own: routers, which do not know of each other's requests, would all begin with the same rank.
        self._sessions = dict(sorted(self._sessions.items(), key=lambda item: zlib.crc32(f"{self.router_name} {item[0][0]}".encode())))
        for key in [key for key in self._sessions if key not in listed]:
            task = asyncio.create_task(self._sessions.pop(key).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        self.update([])
        await asyncio.gather(*self._closing)


async def watch_controller(address: str, token: str, members: Members) -> None:
    """Follow the controller's list for ever. While it is away, the last list stays in force."""
    away = False
    while True:
        channel = new_channel(address)
        try:
            stub = control_pb2_grpc.ControlStub(channel)
            request = control_pb2.WatchRequest(name=members.router_name)
            async for update in stub.Watch(request, metadata=token_metadata(token)):
                away = False
                members.update([decode_member(member) for member in update.members])
        except grpc.aio.AioRpcError as error:
            if not away:
                log.warning("controller.away", address=address, reason=error.code().name)
            away = True
        finally:
            await channel.close()
        await asyncio.sleep(0.5)
