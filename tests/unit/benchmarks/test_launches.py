"""What a decode step launches, counted without a GPU, does not grow unnoticed."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.benchmarks.launches import count, launches_of_flash

MOST = {
    "before the layers": 3,
    "layer of ratio 0, hash": 29,
    "layer of ratio 4, hash": 37,
    "layer of ratio 128, hash": 30,
    "layer of ratio 0, score": 28,
    "layer of ratio 4, score": 36,
    "layer of ratio 128, score": 29,
}


def test_a_step_of_a_group_launches_no_more_than_it_did() -> None:
    found = count(ranks=2, batch=2)
    totals = {part: launches.total() for part, launches in found.items() if part != "behind the layers"}
    assert totals.keys() == MOST.keys()
    assert {part: total for part, total in totals.items() if total > MOST[part]} == {}, found
    layers = [launches for part, launches in found.items() if part.startswith("layer")]
    small, products = launches_of_flash(found)
    assert 9 <= products <= 12 and small + products + 8 == pytest.approx((29 + 28 + 37 + 20 * 36 + 20 * 29) / 43, abs=0.1)
    assert len(layers) == 6 and all(launches["all-gather"] == launches["reduce-scatter"] == 1 for launches in layers)


def test_alone_nothing_is_exchanged() -> None:
    found = count(ranks=1, batch=1)
    assert not any("gather" in name or "scatter" in name for launches in found.values() for name in launches)
    assert all(launches["moe_sum_kernel"] == 1 for part, launches in found.items() if part.startswith("layer")), found
