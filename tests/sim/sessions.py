"""Sessions over `network.Link` in place of gRPC streams: a router's with a rank, a prefill rank's with a decode rank."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any, cast

from core.errors import BatonError, MemberLost
from core.request import Member
from kv_transfer.session import Speaker
from protos import common_pb2, transfer_pb2
from router.session import RankSession
from tests.sim.network import End, Link
from tests.sim.ranks import DecodeRank, PrefillRank, RouterProcess
from tests.sim.threads import SimOutbox, SimThread

PING_S = 0.4

REACHED = 0.9
"""How likely a sender has answered its receiver's first question."""


class SimRankSession(RankSession):
    """A router's session with a rank over a `Link`; how it connects again, and what it does with messages, is the real code."""

    def __init__(self, member: Member, router_name: str, liveness_timeout_s: float) -> None:
        router = SimThread.current.current
        assert isinstance(router, RouterProcess)
        self._router = router
        super().__init__(member, router_name, liveness_timeout_s)

    async def _connect_once(self) -> str:
        """One stream, from hello to its end."""
        router = self._router
        await asyncio.sleep(0.005)
        rank = router.sim.at_address(self.member.address)
        if not isinstance(rank, (PrefillRank, DecodeRank)) or not rank.is_running or router.sim.is_cut(router, rank):
            await asyncio.sleep(0.1)
            return "no answer"
        if rank.member.incarnation != self.member.incarnation:
            return "another incarnation answers at its address"
        ended: asyncio.Future[str] = router.loop.create_future()
        router.sim.current = rank
        outbox: Any = SimOutbox(rank.update_kind, None)

        def lost(reason: str) -> None:
            if not ended.done():
                ended.set_result(reason)

        def closed(reason: str) -> None:
            outbox.is_closed = True
            rank.engine.session_closed(outbox)

        mine = End(router, self._dispatch, lost)
        theirs = End(rank, lambda command: rank.service.handle(command, outbox), closed)
        link = Link(router.sim, mine, theirs)
        outbox.connect(link, theirs, rank.service.sessions.finish)
        outbox.post(rank.update_kind())
        self._outgoing = cast(Any, Outgoing(lambda command: link.send(mine, command)))
        self.is_connected = True
        try:
            return await ended
        finally:
            link.end(router, "the router closed the session")


class Outgoing:
    """In place of a session's queue: what is put leaves at once."""

    def __init__(self, send: Callable[[Any], None]) -> None:
        self.put_nowait = send


class SimPeerSession:
    """In place of `PeerSession`: hello both ways, pings, messages, until either end is lost."""

    def __init__(self, link: str, peer: Member, speaker: Speaker, owner: Any) -> None:
        process = SimThread.current.current
        assert isinstance(process, PrefillRank)
        self._name, self._peer, self._owner, self._rank = link, peer, owner, process
        self.outgoing: Any = Outgoing(self._send)
        self.task: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[BatonError] = process.loop.create_future()
        self._link: Link | None = None
        self._unsent: list[Any] | None = []
        """What is said before the session is there."""
        self._end = End(process, self._take, self._lost)

    def stop(self) -> None:
        self._lost("it was stopped")
        if self._link is not None:
            self._link.end(self._rank, "the sender ended the session")

    async def run(self) -> None:
        rank = self._rank
        delay = rank.sim.times.liveness_s if rank.sim.is_cut_off(rank, self._peer) else 0.005
        rank.later(delay, self._greet)
        error = await self._ended
        if rank.is_alive:
            rank.later(0.0, lambda: self._owner.session_ended(self._name, error))

    def _greet(self) -> None:
        receiver = self._rank.sim.at_address(self._peer.address)
        if self._ended.done():
            return
        if not isinstance(receiver, DecodeRank) or not receiver.is_running or self._rank.sim.is_cut(self._rank, receiver):
            self._lost("no answer")
            return
        if receiver.member.incarnation != self._peer.incarnation:
            self._lost("another incarnation")
            return
        sent_at = self._rank.now()
        member = self._rank.member
        hello = common_pb2.Hello(name=member.name, incarnation=member.incarnation)
        self._rank.sim.current = receiver
        session = receiver.receiver._begin(transfer_pb2.SenderHello(hello=hello, address=member.address, link=self._name))
        if self._rank.sim.rng.random() < REACHED:
            session.origin = dataclasses.replace(session.origin, was_reached=True)
        self._rank.sim.current = self._rank
        outbox = cast(SimOutbox, session.outbox)

        def heard(message: Any) -> None:
            receiver.receiver._take(session, message)
            if message.ping:
                outbox.post(transfer_pb2.ReceiverMessage())

        theirs = End(receiver, heard, lambda reason: receiver.receiver._end(session, reason))
        self._link = Link(self._rank.sim, self._end, theirs)
        outbox.connect(self._link, theirs, lambda update: receiver.receiver._finish(session, update))
        answer = receiver.receiver._hello()
        self._link.send(theirs, lambda: self._connect(answer, sent_at))

    def _take(self, message: Any) -> None:
        if callable(message):
            message()
        else:
            self._owner.session_heard(self._name, message)

    def _connect(self, hello: Any, sent_at: float) -> None:
        def connected(future: Any) -> None:
            if future.exception() is not None:
                self._lost(str(future.exception()))
                assert self._link is not None
                self._link.end(self._rank, "cannot connect")
                return
            self._owner.session_heard(self._name, transfer_pb2.ReceiverMessage(pong=round(sent_at * 1e6)))
            unsent, self._unsent = self._unsent or [], None
            for message in unsent:
                self._send(message)
            self._ping()

        self._owner.session_connect(self._name, hello).add_done_callback(connected)

    def _ping(self) -> None:
        if self._end.is_open:
            self._send(transfer_pb2.SenderMessage())
            self._rank.later(PING_S, self._ping)

    def _send(self, message: Any) -> None:
        if self._unsent is not None:
            self._unsent.append(message)
        elif self._link is not None:
            message.ping = round(self._rank.now() * 1e6)
            self._link.send(self._end, message)

    def _lost(self, reason: str) -> None:
        if not self._ended.done():
            self._ended.set_result(MemberLost(f"{self._peer.name} is lost: {reason}"))
