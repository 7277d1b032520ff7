from __future__ import annotations

import itertools
import random

import pytest

from core.request import Request, SamplingParams
from engine.scheduler.decode import DecodePlanner
from engine.scheduler.pages import PageAllocator
from engine.scheduler.prefill import SCORED_TOKENS, PrefillPlanner
from engine.sequence import Sequence


def new_sequence(name: str, num_tokens: int, **sampling: int) -> Sequence:
    params = SamplingParams(max_tokens=10_000, **sampling)  # type: ignore[arg-type]
    return Sequence.from_request(Request(request_id=name, token_ids=(1,) * num_tokens, prompt_len=num_tokens, sampling=params))


def lengths(planner: PrefillPlanner, sequences: list[Sequence]) -> dict[str, int]:
    return {chunk.sequence.request_id: chunk.length for chunk in planner.plan(sequences)}


def advance(planner: PrefillPlanner, sequences: list[Sequence]) -> int:
    """One step; returns its tokens."""
    chunks = planner.plan(sequences)
    for chunk in chunks:
        chunk.sequence.num_computed += chunk.length
    return sum(chunk.length for chunk in chunks)


class TestPrefill:
    def test_nothing_to_do_is_an_empty_plan(self) -> None:
        planner = PrefillPlanner(chunk_tokens=256, max_sequences=8)
        done = new_sequence("done", 5)
        done.num_computed = 5
        assert planner.plan([]) == [] and planner.plan([done]) == []

    def test_short_prompts_share_one_step(self) -> None:
        planner = PrefillPlanner(chunk_tokens=256, max_sequences=8)
        assert lengths(planner, [new_sequence(name, 60) for name in "abcd"]) == dict.fromkeys("abcd", 60)

    def test_short_prompt_behind_many_long_ones_is_computed_at_once(self) -> None:
        planner = PrefillPlanner(chunk_tokens=256, max_sequences=8)
        sequences = [*(new_sequence(f"long{i}", 5000) for i in range(6)), new_sequence("short", 40)]
        assert lengths(planner, sequences)["short"] == 40

    def test_oldest_gets_half_of_every_step_whatever_arrives(self) -> None:
        planner = PrefillPlanner(chunk_tokens=256, max_sequences=8)
        oldest = new_sequence("old", 2560)
        for step in itertools.count(1):
            advance(planner, [oldest, *(new_sequence(f"{step}.{i}", 30) for i in range(20))])
            if oldest.num_remaining == 0:
                break
        assert step <= 22  # 20 halves, and a little given up to page borders

    def test_equal_prompts_end_first_come_first_served(self) -> None:
        planner = PrefillPlanner(chunk_tokens=256, max_sequences=8)
        waiting, order = [new_sequence(str(i), 1000) for i in range(6)], []
        while waiting:
            advance(planner, waiting)
            order += [s.request_id for s in waiting if s.num_remaining == 0]
            waiting = [s for s in waiting if s.num_remaining > 0]
        assert order == [str(i) for i in range(6)]

    def test_unused_share_goes_back_to_the_oldest(self) -> None:
        planner = PrefillPlanner(chunk_tokens=256, max_sequences=8)
        assert lengths(planner, [new_sequence("long", 5000), new_sequence("short", 16)]) == {"long": 240, "short": 16}

    def test_no_more_sequences_than_allowed(self) -> None:
        planner = PrefillPlanner(chunk_tokens=256, max_sequences=3)
        assert len(planner.plan([new_sequence(str(i), 10) for i in range(9)])) == 3

    def test_a_chunk_ends_at_a_page_border_where_that_costs_little(self) -> None:
        planner = PrefillPlanner(chunk_tokens=320, max_sequences=1)
        sequence = new_sequence("a", 2000)
        sequence.num_computed = 200
        assert lengths(planner, [sequence]) == {"a": 312}  # to 512, giving up 8 of 320

    @pytest.mark.parametrize("chunk_tokens", [1, 2, 7, 64, 256, 300])
    def test_only_the_end_of_a_prompt_asks_for_logits(self, chunk_tokens: int) -> None:
        planner = PrefillPlanner(chunk_tokens=chunk_tokens, max_sequences=4)
        sequences = [new_sequence("a", 50), new_sequence("b", 50, num_prompt_logprobs=0)]
        while any(s.num_remaining for s in sequences):
            for chunk in planner.plan(sequences):
                ends = chunk.length == chunk.sequence.num_remaining
                assert chunk.logits == ("all" if chunk.sequence.request_id == "b" else "last" if ends else "none")
                chunk.sequence.num_computed += chunk.length

    def test_no_step_wants_more_logits_than_there_is_memory_for(self) -> None:
        """Neither does it leave a prompt that wants none waiting, nor a short one of those that do."""
        planner = PrefillPlanner(chunk_tokens=8192, max_sequences=8)
        waiting = [new_sequence(f"scored{i}", 5000, num_prompt_logprobs=1) for i in range(3)]
        waiting += [new_sequence("plain", 6000), new_sequence("short", 300, num_prompt_logprobs=1)]
        for step in itertools.count(1):
            chunks = planner.plan(waiting)
            scored = {chunk.sequence.request_id: chunk.length for chunk in chunks if chunk.logits == "all"}
            assert chunks and sum(scored.values()) <= SCORED_TOKENS
            assert step > 1 or (scored["scored0"] >= SCORED_TOKENS // 2 - 256 and scored["short"] == 300)
            for chunk in chunks:
                chunk.sequence.num_computed += chunk.length
            waiting = [s for s in waiting if s.num_remaining > 0]
            assert "plain" not in names(waiting)
            if not waiting:
                break
        assert step <= -(-15_300 // SCORED_TOKENS) + 6

    def test_random_arrivals_within_budget_and_all_finish(self, rng: random.Random) -> None:
        for _ in range(200):
            budget = rng.choice([1, 5, 64, 256, 1000])
            planner = PrefillPlanner(chunk_tokens=budget, max_sequences=rng.randint(1, 9))
            waiting = [new_sequence(str(i), rng.randint(1, 20 * budget)) for i in range(rng.randint(1, 12))]
            total, steps = sum(s.num_remaining for s in waiting), 0
            while waiting:
                used = advance(planner, waiting)
                assert 0 < used <= budget
                waiting, steps = [s for s in waiting if s.num_remaining > 0], steps + 1
                assert all(s.num_computed <= len(s.token_ids) for s in waiting)
            assert steps <= 2 * -(-total // budget) + 12


def running(pages: PageAllocator, name: str, num_computed: int) -> Sequence:
    """A sequence with one token to compute and pages for those computed."""
    sequence = new_sequence(name, num_computed + 1)
    sequence.num_computed = num_computed
    ids = pages.allocate(name, -(-num_computed // 256))
    assert ids is not None
    sequence.page_ids = ids
    return sequence


def names(sequences: list[Sequence]) -> list[str]:
    return [sequence.request_id for sequence in sequences]


class TestDecode:
    def test_everybody_runs_and_a_page_is_taken_only_at_a_border(self) -> None:
        pages = PageAllocator(10)
        sequences = [running(pages, "a", 255), running(pages, "b", 256), running(pages, "c", 257)]
        plan = DecodePlanner(max_running=8).plan(sequences, pages)
        assert names([chunk.sequence for chunk in plan.chunks]) == ["a", "b", "c"] and not plan.preempted
        assert [len(s.page_ids) for s in sequences] == [1, 2, 2]
        assert all(pages.owned_by(s.request_id) == tuple(s.page_ids) for s in sequences)

    def test_oldest_run_when_there_are_too_many(self) -> None:
        pages = PageAllocator(10)
        sequences = [running(pages, name, 10) for name in "abcd"]
        assert names([chunk.sequence for chunk in DecodePlanner(max_running=2).plan(sequences, pages).chunks]) == ["a", "b"]

    def test_youngest_gives_way_even_if_it_is_not_among_those_that_run(self) -> None:
        pages = PageAllocator(3)
        sequences = [running(pages, name, count) for name, count in (("a", 256), ("b", 10), ("c", 10))]
        plan = DecodePlanner(max_running=2).plan(sequences, pages)
        assert names(plan.preempted) == ["c"]
        assert names([chunk.sequence for chunk in plan.chunks]) == ["a", "b"]
        assert pages.owners() == ("a", "b") and not plan.preempted[0].page_ids

    def test_one_victim_with_two_pages_serves_two_sequences(self) -> None:
        pages = PageAllocator(4)
        sequences = [running(pages, name, count) for name, count in (("a", 256), ("b", 256), ("c", 300))]
        plan = DecodePlanner(max_running=8).plan(sequences, pages)
        assert names(plan.preempted) == ["c"]
        assert names([chunk.sequence for chunk in plan.chunks]) == ["a", "b"]

    def test_the_last_one_gives_way_itself_when_others_than_the_running_hold_all_pages(self) -> None:
        pages = PageAllocator(2)
        alone = running(pages, "a", 256)
        pages.allocate("arriving", 1)
        assert names(DecodePlanner(max_running=8).plan([alone], pages).preempted) == ["a"]

    def test_who_has_all_tokens_that_it_may_is_passed_over(self) -> None:
        pages, planner = PageAllocator(10), DecodePlanner(max_running=2)
        sequences = [running(pages, name, 10) for name in "abc"]
        sequences[0].num_computed = 11 + 10_000 - 1  # what is launched computes the last
        sequences[1].num_computed += 1  # its next token is on its way
        assert [sequence.num_steps_left for sequence in sequences] == [0, 9_999, 10_000]
        plan = planner.plan(sequences, pages)
        assert [(chunk.sequence.request_id, chunk.start) for chunk in plan.chunks] == [("b", 11), ("c", 10)]

    def test_room_is_what_keeps_everybody_running(self, rng: random.Random) -> None:
        found = set()
        for _ in range(300):
            pages, planner = PageAllocator(rng.randint(4, 9)), DecodePlanner(max_running=rng.randint(1, 4))
            counts = [rng.choice((10, 255, 256, 300, 512)) for _ in range(rng.randint(1, 4))]
            sequences = [running(pages, str(n), count) for n, count in enumerate(counts) if -(-count // 256) <= pages.num_free]
            budget = rng.choice((None, 1, 2, 4))
            has_room = planner.has_room(sequences, pages, budget)
            assert has_room == (not planner.plan(sequences, pages, budget).preempted)
            found.add(has_room)
        assert found == {True, False}

    def test_random_growth_always_ends_and_leaks_nothing(self, rng: random.Random) -> None:
        for _ in range(60):
            pages = PageAllocator(rng.randint(4, 12))
            planner = DecodePlanner(max_running=rng.randint(1, 6))
            waiting = [(str(i), rng.randint(1, 600), rng.randint(1, 400)) for i in range(rng.randint(1, 8))]
            alive: list[Sequence] = []
            goals = {name: start + output for name, start, output in waiting}
            for _step in range(60_000):
                while waiting and pages.num_free >= -(-waiting[0][1] // 256):
                    name, start, _ = waiting.pop(0)
                    alive.append(running(pages, name, start))
                if not alive:
                    break
                oldest, before = alive[0], alive[0].num_computed
                plan = planner.plan(alive, pages)
                assert oldest not in plan.preempted
                for victim in plan.preempted:
                    alive.remove(victim)
                    waiting.append((victim.request_id, len(victim.token_ids) - 1, 0))
                for chunk in plan.chunks:
                    assert chunk.sequence in alive
                    chunk.sequence.num_computed += 1
                    chunk.sequence.token_ids.append(1)
                    assert len(chunk.sequence.page_ids) * 256 >= chunk.sequence.num_computed
                assert oldest.num_computed == before + 1
                for sequence in [s for s in alive if s.num_computed >= goals[s.request_id]]:
                    alive.remove(sequence)
                    pages.free(sequence.request_id)
                pages.check_integrity()
            assert not alive and not waiting
            assert pages.num_free == pages.num_total
