"""Where a request goes: a prefill rank, and pages on a decode rank that has granted them. When all are full, requests wait in line here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from core.clock import Clock
from core.errors import DeadlineExceeded, NoMembers, Overloaded, Unavailable
from core.request import MemberKey, Request, Reservation
from router.config import RouterConfig
from router.line import Line, Place
from router.members import Members
from router.placement import Candidate, place_decode, place_prefill
from router.prefix_index import PrefixIndex
from router.session import Event, Failed, RankSession, Reserved

PLACE_POLL_S = 0.05
"""How often ranks are looked for while a role has none."""

FULL_POLL_S = 0.02
"""How often the first in line asks the decode ranks for room; less often with a long prompt, see `full_poll_s`."""

ASKING_S_PER_TOKEN = 1e-6
"""The prompt goes with the question, and router and rank take some 0.1 us for each of its tokens."""

SLOW_ANSWER_S = 1.0
"""Who waits for an answer for so long keeps nobody behind him in line from asking."""

KEPT_S = 2.0
"""How long pages are kept on a prefill rank while all decode ranks are full. Theirs may be full of requests that wait for just these
pages, so this must end."""

Events = asyncio.Queue[tuple[str, Event | None]]
"""With what the rank that told it knows the request as. None: the request's time is up."""


class Reserver:
    """Owner of the line of requests that wait for room, and of what is known about which decode rank holds which prefix."""

    def __init__(self, members: Members, config: RouterConfig, clock: Clock) -> None:
        self._members, self._config, self._clock = members, config, clock
        self.line = Line(clock)
        self._prefixes = PrefixIndex()

    def note_end(self, request: Request, decode: RankSession) -> None:
        """The request has ended there: its prefix may still be in that rank's memory."""
        self._prefixes.note(request.token_ids, decode.member.key)

    async def reserve(
        self,
        request: Request,
        events: Events,
        avoid: list[MemberKey],
        arrived: float,
        deadline: float,
        keeper: RankSession | None = None,
    ) -> tuple[RankSession, RankSession, Reservation]:
        """Pages on a decode rank, and a prefill rank to fill them (`keeper`, which has computed it already). When all decode ranks are
        full, and while others wait, waits in line for room, behind those that came before `arrived`; a keeper's request goes first and
        waits for KEPT_S at most. Whatever the decode rank says afterwards is put into `events`. `avoid`: ranks that failed this request,
        to which a decode rank that does not grant is added unless it is only full. Raises NoMembers, Mismatch, Unavailable,
        DeadlineExceeded, with a keeper Overloaded, and what the decode rank refuses with."""
        kept_until, found = self._clock.now() + KEPT_S, self._prefixes.find(request.token_ids)
        shares = {} if found is None else {found[0]: found[1]}
        full, pause_s = list[MemberKey](), 0.0
        with self.line.place(arrived) as place:
            if keeper is None and len(self.line):
                place.join()
            while True:
                if pause_s or place.is_in_line:
                    await self._wait_in_line(place, pause_s, deadline)
                    pause_s = 0.0
                forbidden = place.forbidden() if keeper is None else []
                decode = await self._find_decode(request, shares, [*avoid, *full, *forbidden], deadline, keeper)
                if decode.member.key in (*full, *forbidden):  # no fitting rank is left to ask
                    if keeper is None:
                        place.refused(full or forbidden)
                    elif self._clock.now() > kept_until:
                        raise Overloaded(f"no decode rank has room for what {keeper.member.name} keeps")
                    full.clear()
                    pause_s = full_poll_s(len(request.token_ids))
                    continue
                held_up = asyncio.get_running_loop().call_later(SLOW_ANSWER_S, place.give_up)
                try:
                    reservation = await self._ask(decode, request, events)
                except Overloaded:
                    full.append(decode.member.key)
                    continue
                except BaseException:
                    avoid.append(decode.member.key)
                    raise
                finally:
                    held_up.cancel()
                place.granted()
                try:
                    return keeper or self._find_prefill(request, decode, avoid), decode, reservation
                except Unavailable:  # the decode rank is well
                    decode.forget(request.request_id)
                    decode.cancel(request.request_id)
                    raise

    async def _ask(self, decode: RankSession, request: Request, events: Events) -> Reservation:
        """What the rank grants. Raises Overloaded if it has no room, and what else it says; Unavailable if it says nothing in time."""
        answer: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        decode.listen(request.request_id, len(request.token_ids), into(events, request.request_id, answer))
        try:
            decode.reserve(request)
            async with asyncio.timeout(self._config.reserve_timeout_s):
                event = await answer
            if isinstance(event, Failed):
                raise event.error
            assert isinstance(event, Reserved), f"{event}"
            return event.reservation
        except BaseException as error:
            decode.forget(request.request_id)
            if not isinstance(error, Overloaded):
                decode.cancel(request.request_id)
            if isinstance(error, TimeoutError):
                raise Unavailable(f"{decode.member.name} did not answer a reservation") from error
            raise

    async def _wait_in_line(self, place: Place, pause_s: float, deadline: float) -> None:
        """Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(max(deadline - self._clock.now(), 0.0)):
                await asyncio.sleep(pause_s)
                await place.turn()
        except TimeoutError as error:
            raise DeadlineExceeded(f"no decode rank had room within {self._config.request_timeout_s:g} s") from error

    async def _find_decode(
        self,
        request: Request,
        shares: dict[MemberKey, float],
        avoid: list[MemberKey],
        deadline: float,
        keeper: RankSession | None,
    ) -> RankSession:
        """Waits a configured time for ranks to be there. Raises NoMembers or Mismatch."""
        give_up = min(self._clock.now() + self._config.wait_for_members_s, deadline)
        while True:
            prefills = self._members.ready("prefill") if keeper is None else [keeper]
            found = self._members.ready("decode")
            try:
                chosen = place_decode(request, [_candidate(s, shares) for s in found], [s.member for s in prefills], avoid)
            except Unavailable as error:
                if self._clock.now() >= give_up:
                    raise NoMembers(str(error)) from error
                self.line.disperse()
                await asyncio.sleep(PLACE_POLL_S)
            else:
                return next(session for session in found if session.member is chosen)

    def _find_prefill(self, request: Request, decode: RankSession, avoid: list[MemberKey]) -> RankSession:
        """Not before pages are granted: requests that ask for theirs at the same time see equal loads. Raises Unavailable."""
        found = self._members.ready("prefill")
        chosen = place_prefill(request, [_candidate(s, {}) for s in found], decode.member.fingerprint, avoid)
        return next(session for session in found if session.member is chosen)


def full_poll_s(num_tokens: int) -> float:
    """Pause between two questions for room for so many tokens: asking takes a tenth of the time at most."""
    return max(FULL_POLL_S, num_tokens * ASKING_S_PER_TOKEN)


def into(events: Events, name: str, answer: asyncio.Future[Event] | None = None) -> Callable[[Event], None]:
    """A listener that puts events into the queue; the first one into `answer`, if there is one that is waited for."""

    def listener(event: Event) -> None:
        if answer is not None and not answer.done():
            answer.set_result(event)
        else:
            events.put_nowait((name, event))

    return listener


def _candidate(session: RankSession, shares: dict[MemberKey, float]) -> Candidate:
    in_flight, unanswered = session.in_flight, session.unanswered
    share = shares.get(session.member.key, 0.0) if shares else 0.0
    counts = len(in_flight), sum(in_flight.values()), len(unanswered), sum(unanswered.values())
    return Candidate(session.member, session.load, *counts, share)
