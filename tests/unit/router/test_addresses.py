"""Ranks at fixed addresses."""

from __future__ import annotations

import asyncio

import pytest

from core.request import Member
from router.addresses import Address, follow_addresses
from router.members import Members


def test_a_rank_that_says_nothing_does_not_hold_up_finding_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    silent, there = Address("prefill", "127.0.0.1:1"), Address("decode", "127.0.0.1:2")
    asked = list[Address]()

    async def ask(place: Address) -> Member:
        asked.append(place)
        if place == silent:
            await asyncio.Event().wait()
        return Member(role=place.role, replica=0, rank=0, address=place.address, incarnation=len(asked))

    async def run() -> None:
        members = Members(1.0, "r")
        following = asyncio.create_task(follow_addresses([silent, there], members))
        async with asyncio.timeout(10):
            while not members.sessions("decode"):
                await asyncio.sleep(0.001)
        assert asked[0] == silent
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await members.close()

    monkeypatch.setattr("router.addresses.ask", ask)
    asyncio.run(run())
