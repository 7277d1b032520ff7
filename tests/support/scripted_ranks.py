"""Ranks in memory that answer a relay at once, as told: for tests of one request's way through them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, cast

from core.clock import SystemClock
from core.errors import BatonError, MemberLost, Overloaded
from core.request import FinishReason, Load, Member, Request, Reservation, SamplingParams, Tokens
from router.config import RouterConfig
from router.members import Members
from router.relay import Journey, Relay
from router.session import Decoded, Event, Failed, FirstToken, HandedOff, Reserved

PROMPT = (5, 6, 7)


MAX_TOKENS = 6


def token_at(position: int) -> int:
    return 100 + position


class FakeRank:
    """A session whose rank answers at once. `lose_after`: the decode rank is lost after so many tokens, once."""

    def __init__(self, role: str, replica: int = 0, lose_after: int = 10**6) -> None:
        self.member = Member(role=role, replica=replica, rank=0, address="a:1", incarnation=replica + 1, fingerprint="f")
        self.load = Load(pages_free=9, pages_total=9, slots_free=9, slots_total=9)
        self.in_flight: dict[str, int] = {}
        self.unanswered: dict[str, int] = {}
        self.listeners: dict[str, Callable[[Event], None]] = {}
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.lose_after, self.is_silent, self.is_full = lose_after, False, False
        self.error: BatonError = MemberLost("gone")

    def listen(self, request_id: str, num_tokens: int, listener: Callable[[Event], None]) -> None:
        self.listeners[request_id], self.in_flight[request_id] = listener, num_tokens

    def forget(self, request_id: str) -> None:
        self.listeners.pop(request_id, None)
        self.in_flight.pop(request_id, None)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def reserve(self, request: Request) -> None:
        self.requests.append(request)
        if self.is_full:
            self.listeners[request.request_id](Failed("decode", Overloaded("full")))
            return
        granted = Reservation(request_id=request.request_id, decode=self.member, epoch=1, page_ids=(0,), slot_id=0, lease_s=5.0)
        self.listeners[request.request_id](Reserved(granted))


class FakePrefill(FakeRank):
    def __init__(self, decodes: list[FakeRank], replica: int = 0) -> None:
        super().__init__("prefill", replica)
        self.decodes = decodes
        self.handed_on: list[tuple[str, Reservation]] = []

    def run(self, request: Request, reservation: Reservation) -> None:
        """Decode's tokens are told before the first one, as they may be over two streams."""
        self.requests.append(request)
        decode = next(d for d in self.decodes if d.member == reservation.decode)
        if not decode.is_silent:
            self.produce(decode, request, reservation.request_id)
            self.tell_first(request.request_id, len(request.token_ids))
            self.lose(decode, request, reservation.request_id)

    def hand_on(self, request_id: str, reservation: Reservation) -> None:
        self.handed_on.append((request_id, reservation))
        request = next(request for request in self.requests if request.request_id == request_id)
        decode = next(d for d in self.decodes if d.member == reservation.decode)
        if not decode.is_silent:
            self.produce(decode, request, reservation.request_id)
            self.listeners[request_id](HandedOff(reservation.request_id, {}))
            self.lose(decode, request, reservation.request_id)

    def produce(self, decode: FakeRank, request: Request, rid: str) -> None:
        start = len(request.token_ids)
        last = request.prompt_len + request.sampling.max_tokens - 1
        for position in range(start + 1, min(last, start + decode.lose_after) + 1):
            finish = FinishReason.LENGTH if position == last else None
            decode.listeners[rid](Decoded(Tokens(request_id=rid, token_ids=(token_at(position),), finish_reason=finish)))

    def lose(self, decode: FakeRank, request: Request, rid: str) -> None:
        if len(request.token_ids) + decode.lose_after < request.prompt_len + request.sampling.max_tokens - 1:
            decode.listeners[rid](Failed("decode", decode.error))

    def tell_first(self, rid: str, position: int) -> None:
        self.listeners[rid](FirstToken(Tokens(request_id=rid, token_ids=(token_at(position),)), {}))
        self.listeners[rid](HandedOff(rid, {}))


class FakeMembers:
    def __init__(self, ranks: list[FakeRank]) -> None:
        self.ranks = ranks

    def ready(self, role: str) -> list[FakeRank]:
        return [rank for rank in self.ranks if rank.member.role == role]


def new_relay(ranks: list[FakeRank], **config: Any) -> Relay:
    return Relay(cast(Members, FakeMembers(ranks)), RouterConfig(**config), SystemClock())


def new_request() -> Request:
    return Request(request_id="r", token_ids=PROMPT, prompt_len=len(PROMPT), sampling=SamplingParams(max_tokens=MAX_TOKENS, seed=4))


def new_journey() -> Journey:
    return Journey("r", len(PROMPT), SystemClock().now())


async def until(claim: Callable[[], bool]) -> None:
    """Let everything else go on until it is so."""
    async with asyncio.timeout(10):
        while not claim():
            await asyncio.sleep(0)


async def tokens_of(relay: Relay, journey: Journey | None = None) -> list[int]:
    async with aclosing(relay.generate(new_request(), journey or new_journey())) as outputs:
        return [token async for output in outputs for token in output.token_ids]


EXPECTED = [token_at(position) for position in range(len(PROMPT), len(PROMPT) + MAX_TOKENS)]
