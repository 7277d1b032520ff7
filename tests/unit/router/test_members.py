"""The ranks that a router knows."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter

from core.request import Member
from router.members import Members
from router.metrics import RankCollector


def test_routers_do_not_all_begin_with_the_same_rank() -> None:
    """Each takes the first of equally loaded ranks, and does not know what the others have just placed there."""
    ranks = [Member(role="prefill", replica=0, rank=rank, address=f"127.0.0.1:{rank + 1}", incarnation=1) for rank in range(4)]

    async def first(name: str) -> str:
        members = Members(1.0, name)
        members.update(ranks[:2])
        members.update(ranks)
        found = [session.member.name for session in members.sessions("prefill")]
        assert sorted(found) == sorted(rank.name for rank in ranks)
        await members.close()
        return found[0]

    async def run() -> Counter[str]:
        return Counter([await first(f"router-{number}") for number in range(64)])

    counts = asyncio.run(run())
    assert len(counts) == 4 and max(counts.values()) <= 32, counts


def test_a_role_without_ranks_is_counted_as_none_and_a_draining_rank_is_there_but_not_ready() -> None:
    async def page(ranks: list[Member]) -> dict[tuple[str, str], float]:
        members = Members(1.0, "r")
        members.update(ranks)
        for session in members.sessions("decode"):
            session.is_connected = True
        samples = [sample for family in RankCollector(members).collect() for sample in family.samples]
        await members.close()
        found = ("baton_router_ranks_ready", "baton_rank_up")
        return {(sample.name, sample.labels["role"]): sample.value for sample in samples if sample.name in found}

    draining = Member(role="decode", replica=0, rank=0, address="127.0.0.1:1", incarnation=1, state="draining")
    none = {("baton_router_ranks_ready", "prefill"): 0.0, ("baton_router_ranks_ready", "decode"): 0.0}
    assert asyncio.run(page([])) == none
    assert asyncio.run(page([draining])) == none | {("baton_rank_up", "decode"): 1.0}
    ready = dataclasses.replace(draining, state="ready")
    assert asyncio.run(page([ready])) == none | {("baton_router_ranks_ready", "decode"): 1.0, ("baton_rank_up", "decode"): 1.0}
