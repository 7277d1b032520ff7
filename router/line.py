"""Requests that wait for room on the decode ranks, oldest first.

    with line.place(arrived) as place:
        if len(line):
            place.join()                # behind those who came before it
        await place.turn()              # then ask, but none of place.forbidden(); and
        place.refused([rank, ...])      # again from turn on, or
        place.granted()

Its front asks: the oldest while there is no room, and with each grant twice as many, since much may have come free at once. An oldest one
that is refused again and again is larger than others: some may pass it. After a while it claims a rank, which makes room for it while the
others go elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from core.clock import Clock
from core.request import MemberKey

MAX_FRONT = 64

PASSED_AFTER_S, PASSING_FRONT = 0.5, 4
"""When the oldest has been so for so long, so many may ask."""

CLAIMS_AFTER_S = 5.0


class Line:
    """Owner of who waits, who of them may ask, and who has claimed a rank."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: dict[Place, None] = {}
        """By arrival."""
        self._front = 1
        self._oldest: Place | None = None
        self._oldest_since = 0.0
        self._claimed: MemberKey | None = None
        """By the oldest."""

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @contextmanager
    def place(self, arrived: float) -> Iterator[Place]:
        """For one request that came at that time; it is given up at the end, whatever happens."""
        place = Place(self, arrived)
        try:
            yield place
        finally:
            place.give_up()

    def join(self, place: Place) -> None:
        if place not in self._waiting:
            place.may_ask.clear()
            is_last = not self._waiting or next(reversed(self._waiting)).arrived <= place.arrived
            self._waiting[place] = None
            if not is_last:  # it has lost the rank that it had
                self._waiting = dict.fromkeys(sorted(self._waiting, key=lambda waiting: waiting.arrived))
                for pushed_back in islice(self._waiting, self._front, self._front + 1):
                    pushed_back.may_ask.clear()
        self._call()

    def leave(self, place: Place) -> None:
        """Who is not in the line waits for nobody; it may be asking, and others may have narrowed the front meanwhile. If it comes back it
        is the last."""
        self._waiting.pop(place, None)
        place.arrived = self._clock.now()
        place.may_ask.set()
        self._call()

    def narrow(self, place: Place, refused_by: Sequence[MemberKey]) -> None:
        """There is no room for this one: only the oldest ask."""
        waited_s = self._clock.now() - self._oldest_since
        front = PASSING_FRONT if waited_s > PASSED_AFTER_S else 1
        for other in islice(self._waiting, front, self._front):
            other.may_ask.clear()
        self._front = front
        if place is self._oldest and waited_s > CLAIMS_AFTER_S and self._claimed not in refused_by:
            self._claimed = refused_by[0]
        self._call()

    def widen(self) -> None:
        """There was room."""
        self._front = min(2 * self._front, MAX_FRONT)

    def disperse(self) -> None:
        """There is no rank to ask: nobody waits for those before him."""
        if self._front < len(self._waiting):
            self._front = len(self._waiting)
            self._call()

    def forbidden(self, place: Place) -> list[MemberKey]:
        return [self._claimed] if self._claimed is not None and place is not self._oldest else []

    def _call(self) -> None:
        oldest = next(iter(self._waiting), None)
        if oldest is not self._oldest:
            self._oldest, self._oldest_since, self._claimed = oldest, self._clock.now(), None
        if oldest is None:
            self._front = 1
        for place in islice(self._waiting, self._front):
            place.may_ask.set()


class Place:
    """A request's, in the line from its `join` or its first refusal on."""

    def __init__(self, line: Line, arrived: float) -> None:
        self._line = line
        self.arrived = arrived
        """Whose was earlier is before it in the line."""
        self.may_ask = asyncio.Event()
        """Set by the line."""
        self.is_in_line = False

    def join(self) -> None:
        self.is_in_line = True
        self._line.join(self)

    def refused(self, ranks: Sequence[MemberKey]) -> None:
        """By all of them, the one that suits it best first."""
        self.join()
        self._line.narrow(self, ranks)

    def granted(self) -> None:
        if self.is_in_line:
            self._line.widen()

    def give_up(self) -> None:
        """It is at the end of the line if it is refused again."""
        self._line.leave(self)

    def forbidden(self) -> list[MemberKey]:
        """Claimed by another."""
        return self._line.forbidden(self)

    async def turn(self) -> None:
        """Returns when this request may ask: at once if it is not in the line."""
        if self.is_in_line:
            await self.may_ask.wait()
