"""What a decode step launches, counted without a GPU, does not grow unnoticed."""

from __future__ import annotations

import collections

import pytest
import torch

pytest.importorskip("triton")

from engine.model.side_stream import SideStream
from engine.ops.cases import prepared
from engine.ops.moe_experts.cases import in_rooms
from engine.ops.registry import get_op
from engine.ops.sample import NUM_TERMS, Draws, Filters, Histories
from engine.ops.sample.triton import run
from tests.benchmarks.hardware import AS_MEASURED
from tests.benchmarks.launches import Recorder, count, launches_of_flash, noting_kernels

MOST = {
    "before the layers": 3,
    "layer of ratio 0, hash": 27,
    "layer of ratio 4, hash": 35,
    "layer of ratio 128, hash": 28,
    "layer of ratio 0, score": 26,
    "layer of ratio 4, score": 34,
    "layer of ratio 128, score": 27,
}


def test_a_step_of_a_group_launches_no_more_than_it_did() -> None:
    found, chains = count(ranks=2, batch=2)
    totals = {part: launches.total() for part, launches in found.items() if part != "behind the layers"}
    assert totals.keys() == MOST.keys()
    assert {part: total for part, total in totals.items() if total > MOST[part]} == {}, found
    layers = [launches for part, launches in found.items() if part.startswith("layer")]
    assert all(15 < launches.total() < found[part].total() for part, launches in chains.items() if part.startswith("layer"))
    small, products = launches_of_flash(chains)
    assert 5 < small <= AS_MEASURED.small_launches and 5 < products <= AS_MEASURED.products, "the scaling model has fewer"
    small, products = launches_of_flash(found)
    hashed, scored = ({ratio: found[f"layer of ratio {ratio}, {kind}"].total() for ratio in (0, 4, 128)} for kind in ("hash", "score"))
    of_flash = (2 * hashed[0] + hashed[4] + 20 * scored[4] + 20 * scored[128]) / 43
    assert 9 <= products <= 12 and small + products + 8 == pytest.approx(of_flash)
    assert len(layers) == 6 and all(launches["direct_dispatch_kernel"] == launches["direct_combine_kernel"] == 1 for launches in layers)


def test_alone_nothing_is_exchanged() -> None:
    found, _ = count(ranks=1, batch=1)
    assert not any(part in name for part in ("gather", "scatter", "direct") for launches in found.values() for name in launches)
    assert all(launches["moe_sum_kernel"] == 1 for part, launches in found.items() if part.startswith("layer")), found


def launches_of_draw(filters: Filters | None, histories: Histories | None) -> collections.Counter[str]:
    recorder, numbers = Recorder(), torch.arange(4)
    logits, draws = torch.zeros(4, 512), Draws(torch.ones(4).double(), numbers, numbers, filters, None if histories is None else numbers)
    with noting_kernels(recorder), recorder:
        run(logits, draws, histories)
    return recorder.found["before the layers"]


def test_drawing_is_two_launches_and_penalties_add_none() -> None:
    histories = Histories(torch.zeros(4, 512, dtype=torch.int32), torch.zeros(4, NUM_TERMS, dtype=torch.float64))
    assert launches_of_draw(None, None) == launches_of_draw(None, histories) == {"sample_blocks_kernel": 1, "sample_decide_kernel": 1}
    filters = Filters(torch.full((4,), 5), torch.full((4,), 0.5).double(), None)
    assert launches_of_draw(filters, None) == launches_of_draw(filters, histories)
    search = {"sample_coarse_kernel": 2, "sample_collect_kernel": 2, "sample_finish_kernel": 2}
    assert launches_of_draw(filters, None) == {"sample_top_kernel": 1, **search, "sample_blocks_kernel": 1, "sample_decide_kernel": 1}


def test_experts_in_rooms_list_them_and_multiply_twice() -> None:
    recorder = Recorder()
    run_experts, arguments = prepared(get_op("moe_experts"), "triton", in_rooms(3, 8, 256, 128, 12)(torch.device("cpu"), 1))
    with noting_kernels(recorder), recorder:
        run_experts(*arguments)
    assert recorder.found["before the layers"] == {"moe_rooms_kernel": 1, "moe_hidden_kernel": 1, "moe_out_kernel": 1}


def test_the_longest_chain_leaves_out_what_runs_beside_it() -> None:
    recorder, side = Recorder(), SideStream(torch.device("cpu"))

    def work(number: int) -> None:
        for _ in range(number):
            torch.zeros(1)

    with noting_kernels(recorder), recorder:
        work(1)
        short, long = side.start(lambda: work(1)), side.start(lambda: work(4))  # five, one after the other, behind the first one
        work(3)
        short()
        assert recorder.chains["before the layers"].total() == 4
        long()
        work(1)
    assert recorder.chains["before the layers"].total() == 1 + 5 + 1 and recorder.found["before the layers"].total() == 10
