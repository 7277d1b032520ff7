"""Ranks that attend together: one leads, and the runners of the others do what its runner does (`parallel/heads.py` has the drawing).

    leading rank     loop -> LeadingRunner.launch ---- order ----.      its loop has requests, reservations, transfers
                                  |                              v
                              ModelRunner           Following.step -> ModelRunner         tokens are drawn there, too
                                  '------ heads, layer by layer ------'

An order says what has happened since the last one: slots cleared, pages that came by transfer, steps collected; and what to launch. The
sequences of the step before are known to both sides, any other one is sent whole. All draw tokens, which keeps what penalties need, and
take the leader's (`HeadShare.led`): an order says how many each sequence has, and the last.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from core.codec import decode_request, encode_request
from core.errors import InternalError
from core.inbox import InboxThread
from core.kv_layout import KVLayout
from core.log import get_logger
from core.request import Load
from core.session import Outbox
from engine.batch import Chunk
from engine.cache.arena import Arena
from engine.parallel.heads import HeadShare
from engine.parallel.lockstep import Steps
from engine.runner import ChunkResult, Launched, Runner
from engine.sequence import Sequence
from protos import group_pb2

if TYPE_CHECKING:
    from engine.rank_engine import RankEngine

log = get_logger("following")

IDLE_S = 0.5
PAGES_AT_ONCE = 64
"""Copied in one message."""


class LeadingRunner:
    """A Runner that has the others follow."""

    def __init__(self, runner: Runner, heads: HeadShare) -> None:
        self._runner, self._heads = runner, heads
        self.layout: KVLayout = runner.layout
        self.arena: Arena = runner.arena
        self.vocab_size, self.max_model_len = runner.vocab_size, runner.max_model_len
        self._order = group_pb2.Order()
        """To be told with the next launch."""
        self._known: list[tuple[Sequence, int]] = []
        """Of the order before: sequences, and how many of their pages were told."""

    def clear_slot(self, slot_id: int) -> None:
        self._order.cleared.append(slot_id)
        self._runner.clear_slot(slot_id)

    def arrived(self, page_ids: tuple[int, ...], slot_id: int) -> None:
        self._order.arrivals.add(page_ids=page_ids, slot_id=slot_id)

    def launch(self, chunks: list[Chunk], budget: int = 0) -> Launched:
        order, self._order = self._order, group_pb2.Order()
        order.parts.extend(self._parts(chunks))
        order.budget = budget
        self._heads.tell(order.SerializeToString())
        for arrival in order.arrivals:
            _copy(self._heads, self.arena, arrival)
        self._known = [(chunk.sequence, len(chunk.sequence.page_ids)) for chunk in chunks]
        return self._runner.launch(chunks, budget)

    def may_lead(self, launched: Launched) -> bool:
        return self._runner.may_lead(launched)

    def collect(self, launched: Launched) -> list[ChunkResult]:
        self._order.num_collected += 1
        return self._runner.collect(launched)

    def step(self, chunks: list[Chunk], budget: int = 0) -> list[ChunkResult]:
        return self.collect(self.launch(chunks, budget))

    def _parts(self, chunks: list[Chunk]) -> Iterator[group_pb2.Part]:
        places = {id(sequence): place for place, (sequence, _) in enumerate(self._known)}
        for chunk in chunks:
            sequence = chunk.sequence
            place = places.get(id(sequence))
            yield group_pb2.Part(
                whole=_whole(sequence) if place is None else None,
                place=place,
                page_ids=sequence.page_ids if place is None else sequence.page_ids[self._known[place][1] :],
                num_tokens=len(sequence.token_ids),
                last_token=sequence.token_ids[-1],
                length=chunk.length,
                logits=chunk.logits,
            )


class Following:
    """The other side."""

    def __init__(self, runner: Runner, heads: HeadShare) -> None:
        self._runner, self._heads = runner, heads
        self.leader = heads.leader
        self._flights: deque[Launched] = deque()
        self._known: list[Sequence] = []

    def step(self) -> None:
        """What the leader's next `launch` does, and what came before it. Raises GroupLost, and InternalError if the leader has other
        tokens in a sequence."""
        order = group_pb2.Order.FromString(self._heads.hear())
        for _ in range(order.num_collected):
            self._runner.collect(self._flights.popleft())
        for slot_id in order.cleared:
            self._runner.clear_slot(slot_id)
        for arrival in order.arrivals:
            _copy(self._heads, self._runner.arena, arrival)
        chunks = [self._chunk(part) for part in order.parts]
        self._known = [chunk.sequence for chunk in chunks]
        self._flights.append(self._runner.launch(chunks, order.budget))

    def _chunk(self, part: group_pb2.Part) -> Chunk:
        sequence = _sequence(part.whole) if part.HasField("whole") else self._known[part.place]
        sequence.page_ids += part.page_ids
        if (len(sequence.token_ids), sequence.token_ids[-1]) != (part.num_tokens, part.last_token):
            raise InternalError(
                f"{sequence.request_id} has {len(sequence.token_ids)} tokens here, the last {sequence.token_ids[-1]}, and "
                f"{part.num_tokens}, the last {part.last_token}, on {self.leader}, which computes the same"
            )
        return Chunk(sequence, part.length, part.logits)


def _whole(sequence: Sequence) -> group_pb2.Whole:
    """Without its pages."""
    return group_pb2.Whole(
        request=encode_request(sequence.request),
        token_ids=sequence.token_ids[len(sequence.request.token_ids) :],
        num_computed=sequence.num_computed,
        slot_id=sequence.slot_id,
    )


def _sequence(whole: group_pb2.Whole) -> Sequence:
    sequence = Sequence.from_request(decode_request(whole.request))
    sequence.token_ids += whole.token_ids
    sequence.num_computed, sequence.slot_id = whole.num_computed, whole.slot_id
    return sequence


def _copy(heads: HeadShare, arena: Arena, arrival: group_pb2.Arrival) -> None:
    """The leader's pages and slot into the others'."""
    for first in range(0, len(arrival.page_ids), PAGES_AT_ONCE):
        ids = torch.tensor(arrival.page_ids[first : first + PAGES_AT_ONCE], device=arena.pages.device)
        rows = arena.pages[ids]
        heads.copy(rows)
        if heads.rank:
            arena.pages[ids] = rows
    heads.copy(arena.slots[arrival.slot_id])


class FollowingLoop:
    """The engine thread of a rank that follows; in place of that of its role. It has no requests of its own."""

    def __init__(self, following: Following, steps: Steps, on_death: Callable[[str], None]) -> None:
        """`on_death(reason)` is called when the loop cannot go on. `steps` is the caller's to close, before `stop`."""
        self._following, self._steps, self._on_death = following, steps, on_death
        self.thread = InboxThread("following-loop", self._turn, self._died)
        self.load = Load()
        self.is_draining = False
        self.is_idle = True

    def start(self) -> None:
        self._steps.start(lambda: self.thread.put(lambda: None), self._on_death)
        self.thread.start()

    def stop(self) -> None:
        """Returns when the thread has ended."""
        self.thread.end()
        self.thread.join()

    def session_closed(self, outbox: Outbox) -> None:
        """There are none."""

    def _turn(self) -> float:
        if self._steps.agreed(0) is None:
            return IDLE_S
        self._steps.begin(0)
        try:
            self._following.step()
        except Exception:
            if self._steps.is_ending:
                return IDLE_S
            raise
        return 0.0

    def _died(self, error: Exception) -> None:
        log.exception("following.died", error=repr(error))
        self._on_death(repr(error))


def run_following(
    engine: RankEngine, following: Following, parts: contextlib.AsyncExitStack, on_death: Callable[[str], None]
) -> FollowingLoop:
    """Start the loop of a rank that follows; `parts` ends it."""
    loop = FollowingLoop(following, engine.steps, on_death)
    loop.start()
    parts.push_async_callback(asyncio.to_thread, loop.stop)
    engine.start()
    parts.push_async_callback(asyncio.to_thread, engine.leave)
    return loop
