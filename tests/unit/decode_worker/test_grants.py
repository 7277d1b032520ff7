"""What a decode rank says of itself with a grant counts the grant: many more requests may come before its next step ends."""

from __future__ import annotations

import asyncio
from typing import Any

from core.request import Load
from core.session import Outbox
from protos import decode_pb2
from tests.unit.decode_worker.test_lost_rows import DecodeRank, event_loop, request_of

__all__ = ["event_loop"]  # a fixture


def test_a_grant_is_counted_by_the_load_that_goes_with_it(event_loop: asyncio.AbstractEventLoop) -> None:
    rank, told = DecodeRank(event_loop, overlap=False), list[tuple[str, Load]]()

    class Noting(Outbox):
        def post(self, part: Any) -> None:
            told.extend((reserved.request_id, rank.loop.load) for reserved in part.reserved)

    outbox = Noting(decode_pb2.DecodeUpdate, event_loop)
    for name in ("a", "b"):
        rank.loop._reserve(request_of(name), outbox)
    assert [(name, load.num_waiting, load.slots_total - load.slots_free) for name, load in told] == [("a", 1, 1), ("b", 2, 2)]
