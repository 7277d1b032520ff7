"""Which prefill and which decode rank a request goes to. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.errors import Mismatch, Unavailable
from core.kv_layout import PAGE_TOKENS
from core.request import Load, Member, MemberKey, Request


@dataclass(frozen=True, slots=True)
class Candidate:
    """A ready rank as placement sees it."""

    member: Member
    load: Load
    """As the rank last reported."""
    in_flight_requests: int
    in_flight_tokens: int
    """What this router has there, whether the rank's report counts it yet or not."""
    unanswered_requests: int = 0
    unanswered_tokens: int = 0
    """Of that, what the rank has not answered yet: its report does not count it."""
    kept_share: float = 0.0
    """Of the prompt's pages, those that the rank may still hold from an earlier turn; 0 to 1."""


def place_decode(request: Request, decodes: Sequence[Candidate], prefills: Sequence[Member], avoid: Iterable[MemberKey] = ()) -> Member:
    """Among the decode ranks with the KV layout of a prefill rank the one that has the least to do: the least that the request adds to the
    squares of the shares of slots and of pages in use. A short request goes where few sequences are, a long one where few pages are taken,
    and both stay even; a rank that holds the whole prompt may have one sequence more than others.

    What other routers have there is known from reports alone, which lag. While many requests come at once, all routers would see the same
    rank behind and send it everything, so the more questions of this router are unanswered, the less the others' part counts: each
    router then spreads its own requests evenly, which makes the sum even, too.

    The ranks of a group step together, so the mean of a rank's group counts as much as the rank itself. A rank without room for the
    request comes after all that have it, and one that never has it after all others. `avoid`: (name, incarnation) of ranks that failed this
    request or refused it; used only when there is no other. Among equals the first one. Raises Unavailable when a role has no rank,
    Mismatch when no two fit each other.
    """
    for role, found in (("prefill", prefills), ("decode", decodes)):
        if not found:
            raise Unavailable(f"no {role} rank is ready")
    avoided, num_pages = set(avoid), -(-request.max_total_tokens // PAGE_TOKENS)
    for usable in ([member for member in prefills if member.key not in avoided], prefills):
        layouts = {member.fingerprint for member in usable}
        fitting = [candidate for candidate in decodes if candidate.member.fingerprint in layouts]
        if fitting:
            trust = 1 / (1 + sum(candidate.unanswered_requests for candidate in fitting))
            loads = [decode_load(candidate, num_pages, trust) for candidate in fitting]
            return _least(fitting, loads, num_pages, avoided)
    raise Mismatch(
        f"no prefill rank has the KV layout of a decode rank: {prefills[0].name} has {prefills[0].fingerprint}, "
        f"{decodes[0].member.name} has {decodes[0].member.fingerprint}"
    )


def place_prefill(request: Request, prefills: Sequence[Candidate], fingerprint: str, avoid: Iterable[MemberKey] = ()) -> Member:
    """Among the prefill ranks with this KV layout, that of the decode rank, the one with the fewest prompt tokens to compute before this
    one's turn. Groups, room and `avoid` count as for `place_decode`. Raises Unavailable when none has it."""
    fitting = [candidate for candidate in prefills if candidate.member.fingerprint == fingerprint]
    if not fitting:
        raise Unavailable(f"no prefill rank with the KV layout {fingerprint} is ready any more")
    loads = [prefill_load(candidate) for candidate in fitting]
    return _least(fitting, loads, -(-len(request.token_ids) // PAGE_TOKENS), set(avoid))


def prefill_load(rank: Candidate) -> float:
    """Prompt tokens; each request beyond them counts as one more."""
    return max(rank.load.waiting_tokens, rank.in_flight_tokens) + rank.load.num_running + rank.load.num_waiting


def decode_load(rank: Candidate, num_pages: int, trust: float) -> float:
    """What one more sequence of so many pages costs there. `trust`, 0 to 1: how much a sequence of another router counts. Nobody says whose
    the pages are: sequences are taken to have as many each."""
    load = rank.load
    slots_total, pages_total = max(load.slots_total, 1), max(load.pages_total, 1)
    reported, answered = load.num_running + load.num_waiting, rank.in_flight_requests - rank.unanswered_requests
    others = max(reported - answered, 0)
    requests = rank.in_flight_requests + trust * others
    pages = (load.pages_total - load.pages_free) * (1 - (1 - trust) * others / max(reported, 1))
    pages = max(pages, (rank.in_flight_tokens - rank.unanswered_tokens) // PAGE_TOKENS) + rank.unanswered_tokens // PAGE_TOKENS
    return (requests - rank.kept_share) / slots_total**2 + pages * num_pages / pages_total**2


def _least(ranks: Sequence[Candidate], loads: Sequence[float], num_pages: int, avoided: set[MemberKey]) -> Member:
    groups: dict[int, list[float]] = {}
    for rank, its_load in zip(ranks, loads, strict=True):
        groups.setdefault(rank.member.replica, []).append(its_load)

    def cost(place: int) -> tuple[bool, bool, bool, float]:
        member, load, group = ranks[place].member, ranks[place].load, groups[ranks[place].member.replica]
        is_too_small = 0 < load.pages_total < num_pages
        is_full = load.pages_total > 0 and (load.pages_free < num_pages or load.slots_free == 0)
        return is_too_small, member.key in avoided, is_full, loads[place] + sum(group) / len(group)

    return ranks[min(range(len(ranks)), key=cost)].member
