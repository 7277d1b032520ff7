"""Placement, admission and sampling fields: pure decisions."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import random
from collections.abc import Callable
from typing import Any

import pytest

from core.errors import InvalidRequest, Mismatch, Unavailable
from core.kv_layout import PAGE_TOKENS
from core.request import Load, Member, Request, SamplingParams
from router.placement import Candidate, place_decode, place_prefill
from router.sampling import sampling_params

REQUEST = Request(request_id="r", token_ids=(1,) * 300, prompt_len=300, sampling=SamplingParams(max_tokens=100))


def candidate(role: str, replica: int, fingerprint: str = "f", tokens: int = 0, requests: int = 0, rank: int = 0, **load: int) -> Candidate:
    member = Member(role=role, replica=replica, rank=rank, address="a:1", incarnation=replica + 1, fingerprint=fingerprint)
    return Candidate(member, Load(**{"pages_free": 100, "pages_total": 100, "slots_free": 8, "slots_total": 8, **load}), requests, tokens)


PREFILL = Member(role="prefill", replica=0, rank=0, address="a:1", incarnation=1, fingerprint="f")


class Burst:
    """Routers that place requests on the same decode ranks, and know of each other only what the ranks report with their answers."""

    def __init__(self, rng: random.Random, routers: int, ranks: int) -> None:
        self.held = [0] * ranks
        self._rng, self._events = rng, list[tuple[float, int, Callable[[float], None]]]()
        self._placed = [[0] * ranks for _ in range(routers)]
        self._answered = [[0] * ranks for _ in range(routers)]
        self._reported = [[0] * ranks for _ in range(routers)]
        self._busy_until = [[0.0] * (2 * ranks) for _ in range(routers)]  # streams to the ranks, and from them
        self._orders = [rng.sample(range(ranks), ranks) for _ in range(routers)]

    def run(self, requests: int, seconds: float) -> None:
        for _ in range(requests):
            router = self._rng.randrange(len(self._placed))
            self._at(self._rng.uniform(0.0, seconds), functools.partial(self._place, router))
        while self._events:
            at, _, event = heapq.heappop(self._events)
            event(at)

    def _at(self, at: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at, self._rng.getrandbits(60), event))

    def _send(self, now: float, router: int, stream: int, event: Callable[[float], None]) -> None:
        """Streams keep the order."""
        at = self._busy_until[router][stream] = max(self._busy_until[router][stream], now + self._rng.uniform(0.001, 0.008))
        self._at(at, event)

    def _place(self, router: int, now: float) -> None:
        seen = []
        for rank in self._orders[router]:
            placed, reported = self._placed[router][rank], self._reported[router][rank]
            one = candidate("decode", rank, requests=placed, num_running=reported, slots_total=300, slots_free=300 - reported)
            seen.append(dataclasses.replace(one, unanswered_requests=placed - self._answered[router][rank]))
        rank = place_decode(REQUEST, seen, [PREFILL]).replica
        self._placed[router][rank] += 1
        self._send(now, router, rank, functools.partial(self._reserve, router, rank))

    def _reserve(self, router: int, rank: int, now: float) -> None:
        self.held[rank] += 1
        self._send(now, router, len(self.held) + rank, functools.partial(self._answer, router, rank, self.held[rank]))

    def _answer(self, router: int, rank: int, reported: int, now: float) -> None:
        self._answered[router][rank] += 1
        self._reported[router][rank] = reported


class TestPlacement:
    def test_the_least_loaded_of_each_role(self) -> None:
        prefills = [candidate("prefill", 0, waiting_tokens=900), candidate("prefill", 1, waiting_tokens=10)]
        decodes = [candidate("decode", 0, num_running=7), candidate("decode", 1, num_running=3)]
        assert place_prefill(REQUEST, prefills, "f").replica == place_decode(REQUEST, decodes, [PREFILL]).replica == 1

    def test_requests_placed_since_the_last_report_count(self) -> None:
        prefills = [candidate("prefill", 0, tokens=5000), candidate("prefill", 1, tokens=100)]
        decodes = [candidate("decode", 0, requests=9), candidate("decode", 1, requests=1)]
        assert place_prefill(REQUEST, prefills, "f").replica == place_decode(REQUEST, decodes, [PREFILL]).replica == 1

    def test_a_full_rank_comes_last(self) -> None:
        decodes = [candidate("decode", 0, pages_free=1), candidate("decode", 1, num_running=6)]
        assert place_decode(REQUEST, decodes, [PREFILL]).replica == 1

    def test_a_rank_that_never_has_room_comes_after_those_that_are_full_or_failed(self) -> None:
        """It would refuse the request for good, as one that fits nowhere. Ranks may differ: num_pages 0, or a change by `baton apply`."""
        ranks = [candidate("decode", 0, pages_free=1, pages_total=1), candidate("decode", 1, pages_free=1, slots_free=0)]
        for avoid in ([], [("decode/1.0", 2)]):
            assert place_decode(REQUEST, ranks, [PREFILL], avoid).replica == 1
            assert place_prefill(REQUEST, ranks, "f", avoid).replica == 1
        assert place_decode(REQUEST, ranks[:1], [PREFILL]).replica == 0

    def test_a_rank_that_holds_the_prompt_may_have_one_sequence_more_and_no_two(self) -> None:
        holds = dataclasses.replace(candidate("decode", 1, requests=3), kept_share=0.9)
        for requests, chosen in ((3, 1), (2, 0)):
            decodes = [candidate("decode", 0, requests=requests), holds]
            assert place_decode(REQUEST, decodes, [PREFILL]).replica == chosen
        nearly = dataclasses.replace(candidate("decode", 1, requests=3), kept_share=1.0)
        assert place_decode(REQUEST, [candidate("decode", 0, requests=2, num_running=3), nearly], [PREFILL]).replica == 1

    def test_an_avoided_rank_is_used_only_if_there_is_no_other(self) -> None:
        decodes = [candidate("decode", 0), candidate("decode", 1, num_running=6)]
        assert place_decode(REQUEST, decodes, [PREFILL], [("decode/0.0", 1)]).replica == 1
        assert place_decode(REQUEST, decodes[:1], [PREFILL], [("decode/0.0", 1)]).replica == 0

    def test_only_equal_layouts_are_paired_and_a_misfit_is_named(self) -> None:
        prefills = [candidate("prefill", 0, "old"), candidate("prefill", 1, "new", waiting_tokens=10**6)]
        assert place_prefill(REQUEST, prefills, "new").replica == 1
        with pytest.raises(Unavailable, match="layout newer"):
            place_prefill(REQUEST, prefills, "newer")
        old, new = (candidate.member for candidate in prefills)
        decodes = [candidate("decode", 0, "new", num_running=6), candidate("decode", 1, "old")]
        assert [place_decode(REQUEST, decodes, [one]).replica for one in (old, new)] == [1, 0]
        with pytest.raises(Mismatch, match=r"prefill/0\.0 has old.*decode/0\.0 has new"):
            place_decode(REQUEST, decodes[:1], [old])

    def test_a_layout_whose_prefill_ranks_failed_the_request_is_used_only_if_there_is_no_other(self) -> None:
        decodes = [candidate("decode", 0, "old"), candidate("decode", 1, "new", num_running=6)]
        prefills = [candidate("prefill", 0, "old").member, candidate("prefill", 1, "new").member]
        assert place_decode(REQUEST, decodes, prefills).replica == 0
        assert place_decode(REQUEST, decodes, prefills, [("prefill/0.0", 1)]).replica == 1
        assert place_decode(REQUEST, decodes[:1], prefills, [("prefill/0.0", 1)]).replica == 0

    def test_a_short_request_goes_where_few_sequences_are_and_a_long_one_where_few_pages_are_taken(self) -> None:
        decodes = [candidate("decode", 0, num_running=2, pages_free=30), candidate("decode", 1, num_running=4, pages_free=92)]
        sampling = SamplingParams(max_tokens=20 * PAGE_TOKENS)
        long = Request(request_id="r", token_ids=(1,) * 300, prompt_len=300, sampling=sampling)
        short = Request(request_id="r", token_ids=(1,), prompt_len=1, sampling=SamplingParams(max_tokens=1))
        assert [place_decode(one, decodes, [PREFILL]).replica for one in (short, long)] == [0, 1]

    def test_a_prefill_rank_without_room_comes_last(self) -> None:
        prefills = [candidate("prefill", 0, pages_free=1), candidate("prefill", 1, waiting_tokens=5000)]
        assert place_prefill(REQUEST, prefills, "f").replica == 1

    def test_among_ranks_as_busy_the_idler_group_is_chosen(self) -> None:
        decodes = [candidate("decode", group, rank=rank, num_running=2 * rank * (group == 0)) for group in (0, 1) for rank in (0, 1)]
        assert place_decode(REQUEST, decodes, [PREFILL]).name == "decode/1.0"
        prefills = [candidate("prefill", group, rank=rank, waiting_tokens=900 * rank * (group == 0)) for group in (0, 1) for rank in (0, 1)]
        assert place_prefill(REQUEST, prefills, "f").name == "prefill/1.0"

    def test_ranks_of_groups_stay_even_under_mixed_lengths(self, rng: random.Random) -> None:
        """Two groups of four ranks; a fifth of the requests is 50 times as long as the others. A step lasts as long as its fullest rank:
        both its sequences and its pages must be near the mean."""
        names = [(group, rank) for group in (0, 1) for rank in range(4)]
        held: dict[tuple[int, int], list[tuple[int, int]]] = {name: [] for name in names}  # (step of its end, pages)
        sequences, pages = [], []
        for step in range(4000):
            for running in held.values():
                running[:] = [one for one in running if one[0] > step]
            decodes = [
                candidate(
                    "decode",
                    group,
                    rank=rank,
                    num_running=len(held[group, rank]),
                    pages_free=4000 - sum(size for _, size in held[group, rank]),
                    pages_total=4000,
                    slots_free=64 - len(held[group, rank]),
                    slots_total=64,
                )
                for group, rank in names
            ]
            num_pages = 4 if rng.random() < 0.8 else 200
            request = dataclasses.replace(REQUEST, sampling=SamplingParams(max_tokens=num_pages * PAGE_TOKENS - REQUEST.prompt_len))
            chosen = place_decode(request, decodes, [PREFILL])
            held[chosen.replica, chosen.rank].append((step + rng.randint(50, 350), num_pages))
            if step >= 500:
                sequences.append([len(running) for running in held.values()])
                pages.append([sum(size for _, size in running) for running in held.values()])

        def imbalance(loads: list[list[int]]) -> float:
            return sum(max(one) * len(one) / sum(one) for one in loads) / len(loads)

        print(f"sequences {imbalance(sequences):.2f}, pages {imbalance(pages):.2f}")
        assert imbalance(sequences) < 1.1 and imbalance(pages) < 1.2

    @pytest.mark.parametrize(("routers", "ranks", "most_apart"), [(1, 2, 1), (4, 2, 8), (4, 8, 8)])
    def test_routers_that_do_not_know_of_each_other_spread_a_burst_evenly(
        self, rng: random.Random, routers: int, ranks: int, most_apart: int
    ) -> None:
        """256 requests within 55 ms. A question, and the answer with which the rank reports its load, take 1 to 8 ms each way. On four GPUs
        routers that took what two ranks report at its word gave them 158 and 98."""
        burst = Burst(rng, routers, ranks)
        burst.run(256, 0.055)
        print(f"{routers} routers: {burst.held}")
        assert sum(burst.held) == 256
        assert max(burst.held) - min(burst.held) <= most_apart

    def test_what_others_have_there_counts_once_the_answers_are_in(self) -> None:
        """Six requests of this router on the first rank; four on the second, and twelve of others."""
        for unanswered, chosen in ((0, 0), (6, 1)):
            first = candidate("decode", 0, requests=6, num_running=6 - unanswered)
            decodes = [dataclasses.replace(first, unanswered_requests=unanswered), candidate("decode", 1, requests=4, num_running=16)]
            assert place_decode(REQUEST, decodes, [PREFILL]).replica == chosen

    def test_own_pages_count_in_full_while_answers_are_awaited(self) -> None:
        """Twenty of this router's sequences on each rank; those on the first have grown to 80 of 100 pages."""
        slots = {"num_running": 20, "slots_total": 300, "slots_free": 280}
        decodes = [candidate("decode", rank, tokens=5120, requests=20, pages_free=free, **slots) for rank, free in ((0, 20), (1, 96))]
        for unanswered in (0, 10):
            waiting = {"unanswered_requests": unanswered, "unanswered_tokens": 300 * unanswered}
            more = dataclasses.replace(decodes[1], in_flight_requests=20 + unanswered, in_flight_tokens=5120 + 300 * unanswered, **waiting)
            assert place_decode(REQUEST, [decodes[0], more], [PREFILL]).replica == 1

    def test_a_missing_role_is_named(self) -> None:
        with pytest.raises(Unavailable, match="decode"):
            place_decode(REQUEST, [], [PREFILL])
        with pytest.raises(Unavailable, match="prefill"):
            place_decode(REQUEST, [candidate("decode", 0)], [])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": True}, "min_p"),
        ({"seed": 2**65}, "seed"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"stop_token_ids": [1000]}, "stop_token_ids"),
    ],
)
def test_a_bad_sampling_field_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match=param) as caught:
        sampling_params(body, max_tokens=1, num_logprobs=None, num_prompt_logprobs=None, vocab_size=1000)
    assert caught.value.param == param


def test_good_sampling_fields_arrive() -> None:
    body = {"temperature": 0.5, "top_k": -1, "seed": -1, "logit_bias": {"7": -2}}
    params = sampling_params(body, max_tokens=9, num_logprobs=2, num_prompt_logprobs=None, vocab_size=1000)
    assert (params.temperature, params.top_k, params.seed, params.logit_bias) == (0.5, 0, 2**64 - 1, ((7, -2.0),))
