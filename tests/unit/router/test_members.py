"""The ranks that a router knows."""

from __future__ import annotations

import asyncio
from collections import Counter

from core.request import Member
from router.members import Members


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
