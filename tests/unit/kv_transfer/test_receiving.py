from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from core.kv_layout import KVLayout
from core.metrics import new_registry
from core.region import Region
from core.request import Member
from kv_transfer.config import TransferConfig
from kv_transfer.metrics import ReceiverMetrics
from kv_transfer.receiving import KVReceiver
from protos import common_pb2, transfer_pb2
from tests.support.manual_clock import ManualClock

MEMBER = Member(role="decode", replica=0, rank=0, address="d:1", incarnation=7)


def test_pings_that_were_held_up_on_their_way_are_no_news() -> None:
    """A sender that was cut off and then stopped must be taken for silent, although its pings have only just arrived."""
    region, clock = Region(address=0, num_pieces=1, piece_bytes=8), ManualClock(1000.0)
    made = KVReceiver(
        TransferConfig(transport="memory"),
        cast(KVLayout, None),
        region,
        region,
        MEMBER,
        clock,
        ReceiverMetrics(new_registry()),
        lambda event: None,
        cast(Any, pytest.fail),
    )

    async def run() -> None:
        made._loop = asyncio.get_running_loop()
        session = made._begin(common_pb2.Hello(name="prefill/0.0", incarnation=5))

        def hear(sent_at: float) -> float:
            made._take(session, transfer_pb2.SenderMessage(ping=round(sent_at * 1e6)))
            return session.heard_at

        assert hear(3.0) == 1000.0
        clock.advance(0.5)
        assert hear(3.5) == 1000.5
        clock.advance(4.0)
        assert hear(4.0) == 1001.0, "it was under way for 3.5 s"
        assert hear(7.499) == pytest.approx(1004.499)

    asyncio.run(run())
