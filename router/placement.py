"""Which prefill and which decode rank a request goes to. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.errors import Mismatch, Unavailable
from core.kv_layout import PAGE_TOKENS
from core.request import Load, Member, Request


@dataclass(frozen=True, slots=True)
class Candidate:
    """A ready rank as placement sees it."""

    member: Member
    load: Load
    """As the rank last reported."""
    in_flight_requests: int
    in_flight_tokens: int
    """What this router has there, whether the rank's report counts it yet or not."""


def place(
    request: Request, prefills: Sequence[Candidate], decodes: Sequence[Candidate], avoid: Iterable[tuple[str, int]] = ()
) -> tuple[Member, Member]:
    """The least loaded pair with equal KV layouts.

    `avoid`: (name, incarnation) of ranks that failed this request or refused it; used only when there is no other. Raises Unavailable
    when a role has no rank, Mismatch when no two fit each other.
    """
    for role, found in (("prefill", prefills), ("decode", decodes)):
        if not found:
            raise Unavailable(f"no {role} rank is ready")
    avoided = set(avoid)

    def is_avoided(candidate: Candidate) -> bool:
        return (candidate.member.name, candidate.member.incarnation) in avoided

    def prefill_cost(c: Candidate) -> tuple[bool, int, int]:
        return is_avoided(c), max(c.load.waiting_tokens, c.in_flight_tokens), c.load.num_running + c.load.num_waiting

    def decode_cost(c: Candidate) -> tuple[bool, bool, float, int]:
        pages = -(-request.max_total_tokens // PAGE_TOKENS)
        is_full = c.load.pages_total > 0 and (c.load.pages_free < pages or c.load.slots_free == 0)
        requests = max(c.load.num_running + c.load.num_waiting, c.in_flight_requests)
        used = 1 - c.load.pages_free / c.load.pages_total if c.load.pages_total else 0.0
        return is_avoided(c), is_full, requests + used, c.member.replica

    fingerprints = {candidate.member.fingerprint for candidate in decodes}
    fitting = [candidate for candidate in prefills if candidate.member.fingerprint in fingerprints]
    if not fitting:
        raise Mismatch(
            f"no prefill rank has the KV layout of a decode rank: {prefills[0].member.name} has {prefills[0].member.fingerprint}, "
            f"{decodes[0].member.name} has {decodes[0].member.fingerprint}"
        )
    prefill = min(fitting, key=prefill_cost).member
    decode = min((c for c in decodes if c.member.fingerprint == prefill.fingerprint), key=decode_cost).member
    return prefill, decode
