"""Groups of ranks: requests that go through groups of 1, 2 and 4 ranks get the tokens of one engine, however unevenly they are spread,
and while experts move from rank to rank.

The ranks are threads of this process, each with its own connections; tests/e2e/test_group_cluster.py has them as processes.
"""

from __future__ import annotations

import dataclasses
import functools
import urllib.request

import pytest

from decode_worker.config import DecodeConfig
from prefill_worker.config import PrefillConfig
from tests.support.serving import Serving
from tests.support.split_prompts import BORDERS, ENGINE, few_requests, requests, serve, spelling, tokens_of_one_engine

pytestmark = pytest.mark.e2e

SETS = {"a few of the set": lambda: few_requests()[::2], "a part of the set": few_requests, "the whole set": requests}


@functools.cache
def whole(chosen: str) -> dict[str, list[int]]:
    return tokens_of_one_engine(SETS[chosen]())


def serving_in_groups(prefill: int, decode: int, overlap: str, tp: tuple[int, int] = (1, 1)) -> Serving:
    """tp: ranks that attend together, in prefill and in decode."""
    redundant = 2 * (prefill > 2)
    return Serving(
        engine=dataclasses.replace(ENGINE, rebalance_interval_s=0.5, overlap=overlap),
        prefill=PrefillConfig(ranks_per_replica=prefill, attention_tp=tp[0], num_pages=32, num_slots=4, redundant_experts=redundant),
        decode=DecodeConfig(ranks_per_replica=decode, attention_tp=tp[1], num_pages=64, num_slots=8, max_running=4),
    )


def metric(serving: Serving, member: str, name: str) -> float:
    with urllib.request.urlopen(f"http://{serving.members[member].metrics_address}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def samples(serving: Serving, member: str, name: str) -> list[float]:
    with urllib.request.urlopen(f"http://{serving.members[member].metrics_address}/metrics", timeout=10) as response:
        return [float(line.split()[-1]) for line in response.read().decode().splitlines() if f"_{name}{{" in line]


def steps_of(serving: Serving, role: str, size: int) -> list[tuple[float, float]]:
    """For each rank of the group: steps joined without work, steps with work."""
    names = (f"baton_{role}_joined_steps_total", f"baton_{role}_steps_total")
    return [(metric(serving, f"{role}/0.{rank}", names[0]), metric(serving, f"{role}/0.{rank}", names[1])) for rank in range(size)]


def have_moved(serving: Serving, members: list[str]) -> bool:
    """Experts, on all of them; those of an idle group do with its next step."""
    serving.complete(prompt=[5, 6, 7], max_tokens=6, ignore_eos=True)
    return all(sum(samples(serving, name, "expert_moves_total")) > 0 for name in members)


def have_stepped_alike(serving: Serving, role: str, size: int) -> bool:
    return len({sum(steps) for steps in steps_of(serving, role, size)}) == 1


@pytest.mark.parametrize("chosen", ["a part of the set", pytest.param("the whole set", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("prefill", "decode", "overlap"), [(2, 2, "off"), (1, 4, "on"), (4, 1, "on")])
def test_groups_give_the_tokens_of_one_engine(
    prefill: int, decode: int, overlap: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.parallel.rebalance.LEAST_LOAD", 1)  # chance is skew enough
    wanted = SETS[chosen]()
    with serving_in_groups(prefill, decode, overlap) as serving:
        assert len(serving.members) == prefill + decode
        assert len({member.fingerprint for member in serving.members.values()}) == 1
        crowded = serve(serving, wanted, at_once=16)
        lonely = serve(serving, wanted[: len(BORDERS) // 2], at_once=1)  # all ranks but one are idle
        for found in (crowded, lonely):
            wrong = [name for name, tokens in found.items() if tokens != spelling(whole(chosen)[name])]
            assert not wrong, f"{len(wrong)} of {len(found)} differ: {wrong[:10]}"
        assert len(crowded) == len(wanted)
        sizes = {"prefill": prefill, "decode": decode}
        groups = [name for name, member in serving.members.items() if sizes[member.role] > 1]
        serving.wait(functools.partial(have_moved, serving, groups), 60)
        serving.wait(serving.is_empty)
        for role, size in (("prefill", prefill), ("decode", decode)):
            serving.wait(functools.partial(have_stepped_alike, serving, role, size))
            steps = steps_of(serving, role, size)
            assert (sum(joined for joined, _ in steps) > 0) == (size > 1) and all(worked for _, worked in steps), f"{role}: {steps}"
            for rank in range(size if size > 1 else 0):  # each token has two experts in each of five layers
                computed = serving.workers[f"{role}/0.{rank}"].load().tokens_total
                counted = sum(samples(serving, f"{role}/0.{rank}", "expert_tokens_total"))
                # Overlapped decode steps may compute a token for a sequence that ends, in vain.
                assert counted >= 2 * 5 * computed if (role, overlap) == ("decode", "on") else counted == 2 * 5 * computed
        assert serving.deaths == []


@pytest.mark.parametrize(
    ("prefill", "decode", "overlap", "tp", "chosen"),
    [
        (1, 4, "on", (1, 2), "a few of the set"),
        pytest.param(4, 2, "off", (2, 2), "the whole set", marks=pytest.mark.slow),
    ],
)
def test_ranks_that_attend_together_give_them_too(
    prefill: int, decode: int, overlap: str, tp: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.parallel.rebalance.LEAST_LOAD", 1)
    wanted = SETS[chosen]()
    with serving_in_groups(prefill, decode, overlap, tp) as serving:
        following = [name for name, member in serving.members.items() if not member.address]
        assert len(following) == prefill - prefill // tp[0] + decode - decode // tp[1]
        found = serve(serving, wanted, at_once=16)
        wrong = [name for name, tokens in found.items() if tokens != spelling(whole(chosen)[name])]
        assert len(found) == len(wanted) and not wrong, f"{len(wrong)} of {len(found)} differ: {wrong[:10]}"
        long = [request for request in wanted if request.prompt_len > 256]
        again = serve(serving, long, at_once=4)
        assert all(tokens == spelling(whole(chosen)[name]) for name, tokens in again.items())
        leading = [name for name in serving.members if name.startswith("decode") and name not in following]
        assert sum(metric(serving, name, "baton_decode_kept_pages_total") for name in leading) > 0, "no page was kept"
        serving.wait(functools.partial(have_moved, serving, following), 60)
        serving.wait(serving.is_empty)
        for name in following:
            role, _, rank = name.replace(".", "/").split("/")
            assert serving.workers[name].note() == f"computes heads for {role}/0.{int(rank) // 2 * 2}"
            assert sum(samples(serving, name, "expert_tokens_total")) > 0, "it took no tokens to experts"
        assert serving.deaths == []
