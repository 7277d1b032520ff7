"""Ranks and routers of the simulation: the real loops, senders, receivers, services and relays, each in a `Process`.

What is not real: threads (`SimThread` takes their turns in virtual time), streams (`SimOutbox`, `SimRankSession`, `SimPeerSession` over
`network.Link`), the transport (`wire.SimTransport`), the engine (`null_engine`), HTTP and text.
"""

from __future__ import annotations

import concurrent.futures
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from core.region import Region
from core.request import Member
from decode_worker.config import DecodeConfig
from decode_worker.loop import DecodeLoop
from decode_worker.reservations import State
from decode_worker.server import DecodeService
from engine.parallel.lockstep import SoloSteps
from kv_transfer.ending import Answer
from kv_transfer.receiver import Ask
from kv_transfer.receiving import ASK_TIMEOUT_S, TICK_S, KVReceiver
from kv_transfer.sender import Post
from kv_transfer.sending import KVSender
from kv_transfer.transport import Write
from prefill_worker.config import PrefillConfig
from prefill_worker.loop import PrefillLoop
from prefill_worker.server import PrefillService
from protos import decode_pb2, prefill_pb2
from router.config import RouterConfig
from router.members import Members
from router.relay import Relay
from router.service import Service
from tests.sim.network import Process
from tests.sim.null_engine import PAGE_TOKENS, SimRunner
from tests.sim.threads import NOTHING, SimThread
from tests.sim.wire import Host, SimTransport, Tag, TaggedWrite

if TYPE_CHECKING:
    from tests.sim.world import World

LATE_S = 1.5
"""A thread that waits looks at deadlines this often at least, a stopped process soon after it goes on."""


class Rank(Host):
    """A process of either role, with the memory of its runner."""

    def __init__(self, world: World, role: str, replica: int, address: str, incarnation: int, num_pages: int, num_slots: int) -> None:
        super().__init__(world, f"{role}{replica}" + "'" * (incarnation % 10))
        self.sim = world
        self.member = Member(
            role=role, replica=replica, rank=0, address=address, incarnation=incarnation, fingerprint="f", max_model_len=1000
        )
        overlap = role == "decode" and world.decode_overlaps
        self.runner = SimRunner(num_pages, num_slots, step_s=0.04 if role == "prefill" else 0.03, overlap=overlap)
        self.transport = SimTransport(world.wire, self)
        self.regions = Region(address=0, num_pieces=num_pages, piece_bytes=100), Region(address=0, num_pieces=num_slots, piece_bytes=40)
        self.is_draining = False
        self.threads: list[SimThread] = []

    def _watch(self, owner: Any, quiet_until: Callable[[], float], check: Callable[[], None] = lambda: None) -> SimThread:
        """The thread of a loop, a sender or a receiver takes no turns that do nothing, and what it owns is checked after the others."""
        thread: SimThread = owner._thread
        thread.quiet_until, thread.check = quiet_until, check
        self.threads.append(thread)
        return thread

    def jump(self, seconds: float) -> None:
        """The clock jumps ahead, and what is due comes sooner."""
        self.clock_offset += seconds
        for thread in self.threads:
            thread.poll()

    async def start(self) -> None:
        raise NotImplementedError

    @property
    def is_idle(self) -> bool:
        raise NotImplementedError

    def _on_death(self, reason: str) -> None:
        raise AssertionError(f"{self.name} died: {reason}")


class PrefillRank(Rank):
    def __init__(self, world: World, replica: int, address: str, incarnation: int, config: PrefillConfig) -> None:
        super().__init__(world, "prefill", replica, address, incarnation, config.num_pages, config.num_slots)
        world.current = self
        clock: Any = self
        self.engine = PrefillLoop(cast(Any, self.runner), config, NOTHING, SoloSteps(config.chunk_tokens), clock, self._on_death)
        event = self.engine.transfer_event
        self.sender = SimKVSender(
            world.times.transfer, self.runner.layout, *self.regions, self.member, clock, NOTHING, event, self._on_death
        )
        self.service = PrefillService(self.engine, self.member, world.times.liveness_s)
        self._watch(self.engine, self._engine_quiet_until, self._check)
        self._watch(self.sender, self._sender_quiet_until)
        self.update_kind: Any = prefill_pb2.PrefillUpdate

    async def start(self) -> None:
        await self.sender.start()
        self.engine.start(self.sender)

    @property
    def is_idle(self) -> bool:
        return self.engine.is_idle and not self.sender.num_open

    def _check(self) -> None:
        self.engine._pages.check_integrity()
        self.engine._slots.check_integrity()

    def _engine_quiet_until(self) -> float:
        return 0.0 if self.engine._jobs else math.inf

    def _sender_quiet_until(self) -> float:
        """What could be written has been. Until something that was is out, there are only the fence and, with hand-offs, the ticks."""
        transport, state, fence = self.transport, self.sender._state, math.inf
        if transport.flights or transport._finished:
            return 0.0
        for link in state._links.values():
            if link.lost is not None:
                return 0.0
            fence = min(fence, link.vouched_at + self.sim.times.liveness_s)
        return min(fence, self.sender._next_tick) if state._hand_offs else fence

    def read(self, tag: Tag, kind: str, piece: int) -> int | None:
        job = self.engine._hand_offs._open.get(tag.request_id)
        assert job is not None, f"{self.name} still reads {kind} {piece} of {tag.request_id}, which it has forgotten"
        allocator = self.engine._pages if kind == "page" else self.engine._slots
        assert piece in allocator.owned_by(job.request_id), f"{self.name} reads {kind} {piece}, which is not {tag.request_id}'s"
        return (self.runner.pages if kind == "page" else self.runner.slots)[piece]

    def check_link(self, peer: str) -> None:
        silent_s = self.now() - self.sender._state._links[peer].vouched_at
        assert silent_s <= self.sim.times.liveness_s + self.sim.times.wire_s, (
            f"{self.name} writes to {peer}, which it has not heard of for {silent_s:.1f} s"
        )


class DecodeRank(Rank):
    def __init__(self, world: World, replica: int, address: str, incarnation: int, config: DecodeConfig) -> None:
        super().__init__(world, "decode", replica, address, incarnation, config.num_pages, config.num_slots)
        world.current = self
        clock: Any = self
        steps = SoloSteps(config.most_running)
        transfer = world.times.transfer
        self.engine = DecodeLoop(cast(Any, self.runner), config, transfer.lease_s, NOTHING, self.member, steps, clock, self._on_death)
        event = self.engine.transfer_event
        self.receiver = SimKVReceiver(
            transfer, cast(Any, self.runner.layout), *self.regions, self.member, clock, NOTHING, event, self._on_death
        )
        self.service = DecodeService(self.engine, self.member, world.times.liveness_s)
        self._watch(self.engine, self._engine_quiet_until, self._check)
        self.transport.told = self._watch(self.receiver, self._receiver_quiet_until).poll
        self.update_kind: Any = decode_pb2.DecodeUpdate

    async def start(self) -> None:
        await self.receiver.start()
        self.engine.start(self.receiver)

    @property
    def is_idle(self) -> bool:
        return self.engine.is_idle and not self.receiver._state.num_open

    def _check(self) -> None:
        reservations, flight = self.engine._reservations, self.engine._flight
        reservations.check_integrity()
        for chunk in flight.launched.chunks if flight is not None else ():
            needed, name = chunk.sequence.page_ids[: -(-chunk.end // PAGE_TOKENS)], chunk.sequence.request_id
            is_its_own = len(needed) * PAGE_TOKENS >= chunk.end and set(needed) <= set(reservations.pages.owned_by(name))
            assert is_its_own, f"{self.name} computes token {chunk.end} of {name} in pages {needed}, which are not its own any more"
        overdue = self.now() - LATE_S
        for held in reservations._held.values():
            if held.lease_until <= overdue and self.resumed_at <= overdue:
                is_waiting = held.state in (State.RESERVED, State.RECEIVING)
                assert not is_waiting, f"{held.request.request_id} holds pages of {self.name} beyond its lease"

    def _engine_quiet_until(self) -> float:
        if self.engine._running or self.engine._flight is not None:
            return 0.0
        until = math.inf
        for held in self.engine._reservations._held.values():
            until = min(until, held.lease_until, held.deadline)
        return until

    def _receiver_quiet_until(self) -> float:
        """Deadlines are looked at in ticks."""
        state, tick, due = self.receiver._state, self.receiver._next_tick, math.inf
        for found in state._epochs.values():
            due = min(due, found.answer_by or math.inf, found.quiet_at or math.inf)
        for doubt in state._doubts.values():
            due = min(due, doubt.ask_at or math.inf)
        return tick + max(math.ceil((due - tick) / TICK_S), 0) * TICK_S if due < math.inf else math.inf

    def land(self, tag: Tag, kind: str, piece: int, content: int | None) -> None:
        """Bytes arrive, whoever owns the place by now: that is the rule that matters most."""
        reservations = self.engine._reservations
        allocator = reservations.pages if kind == "page" else reservations.slots
        owner = next((owner for owner in allocator.owners() if piece in allocator.owned_by(owner)), "nobody")
        held = reservations.get(tag.request_id)
        is_its_own = owner == f"quarantine/{tag.epoch}" or (owner == tag.request_id and held is not None and held.epoch == tag.epoch)
        assert is_its_own, f"a write of {tag.request_id} (epoch {tag.epoch}) landed in {kind} {piece} of {owner} at {self.name}"
        is_awaited = held is None or held.state in (State.RESERVED, State.RECEIVING)
        assert is_awaited, f"a write of {tag.request_id} landed in a sequence that runs"
        (self.runner.pages if kind == "page" else self.runner.slots)[piece] = content


class SimKVSender(KVSender):
    def _as_write(self, post: Post) -> Write:
        write = super()._as_write(post)
        hand_off = self._state.hand_off(post.request_id)
        assert hand_off is not None
        if post.order is not None:
            SimThread.current.num_kept_pages += hand_off.reservation.num_kept_pages
        return TaggedWrite(write.pages, write.slot, write.notification, Tag(post.request_id, hand_off.reservation.epoch))


class SimKVReceiver(KVReceiver):
    def _ask(self, action: Ask) -> None:
        """`ending.ask`: a dead process refuses, one that is stopped or cut off says nothing until it is too late."""
        rank = cast(DecodeRank, self._clock)
        target, world = rank.sim.ranks[action.origin.address], rank.sim
        is_asking = True

        def answer(found: Answer) -> None:
            nonlocal is_asking
            if is_asking:
                is_asking = False
                self._answered(action, found)

        def way_back(found: Answer) -> None:
            if not world.is_cut(rank, target):
                rank.later(world.travel_s(), answer, found)

        def ended(future: concurrent.futures.Future[bool]) -> None:
            way_back(Answer.OVER if future.result() else Answer.UNDER_WAY)

        def asked() -> None:
            assert isinstance(target, PrefillRank)
            if target.member.incarnation != action.origin.incarnation:
                way_back(Answer.ANOTHER_LIFE)
            else:
                target.sender.end(action.origin.link).add_done_callback(ended)

        rank.later(ASK_TIMEOUT_S, answer, Answer.SILENCE)
        if not world.is_cut(rank, target):
            if target.is_alive:
                target.later(world.travel_s(), asked)
            else:
                way_back(Answer.REFUSED)


class RouterProcess(Process):
    """Admission, placement, relay and sessions of one router."""

    def __init__(self, world: World, name: str, config: RouterConfig) -> None:
        super().__init__(world, name)
        self.sim = world
        self.members = Members(world.times.liveness_s, name.replace("router", "router-"))
        self.relay = Relay(self.members, config, cast(Any, self))
        self.service = Service(config, "sim", 1000, cast(Any, None), self.relay, NOTHING, cast(Any, self))

    def update(self, members: list[Member]) -> None:
        self.world.current = self
        self.members.update(members)
