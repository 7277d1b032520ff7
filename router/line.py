"""Requests that wait for room on the decode ranks, oldest first.

    with line.place() as place:
        if not line.is_empty:
            place.join()                # behind those who wait already
        await place.turn()              # then ask; and
        place.refused()                 # from the front again, or
        place.granted()

Its front asks: one request while there is no room, and with each grant twice as many, since much may have come free at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

MAX_FRONT = 64


class Line:
    """Owner of who waits, and of who of them may ask."""

    def __init__(self) -> None:
        self._waiting: dict[Place, None] = {}
        self._front = 1

    @property
    def is_empty(self) -> bool:
        return not self._waiting

    @contextmanager
    def place(self) -> Iterator[Place]:
        """For one request; it is given up at the end, whatever happens."""
        place = Place(self)
        try:
            yield place
        finally:
            place.give_up()

    def join(self, place: Place) -> None:
        if place not in self._waiting:
            place.may_ask.clear()
            self._waiting[place] = None
        self._call()

    def leave(self, place: Place) -> None:
        self._waiting.pop(place, None)
        self._call()

    def narrow(self) -> None:
        """There is no room: only the oldest asks."""
        for place in islice(self._waiting, 1, self._front):
            place.may_ask.clear()
        self._front = 1
        self._call()

    def widen(self) -> None:
        """There was room."""
        self._front = min(2 * self._front, MAX_FRONT)

    def disperse(self) -> None:
        """There is no rank to ask: nobody waits for those before him."""
        if self._front < len(self._waiting):
            self._front = len(self._waiting)
            self._call()

    def _call(self) -> None:
        if not self._waiting:
            self._front = 1
        for place in islice(self._waiting, self._front):
            place.may_ask.set()


class Place:
    """A request's, in the line from its `join` or its first refusal on."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self.may_ask = asyncio.Event()
        """Set by the line."""
        self.is_in_line = False

    def join(self) -> None:
        self.is_in_line = True
        self._line.join(self)

    def refused(self) -> None:
        self.join()
        self._line.narrow()

    def granted(self) -> None:
        if self.is_in_line:
            self._line.widen()

    def give_up(self) -> None:
        """It is at the end of the line if it is refused again."""
        self._line.leave(self)

    async def turn(self) -> None:
        """Returns when this request may ask: at once if it is not in the line."""
        if self.is_in_line:
            await self.may_ask.wait()
