"""Chunks that are run before a rank is ready need the kernels that chunks of all lengths need."""

from __future__ import annotations

import pytest

from engine.workspace import warm_lengths


@pytest.mark.parametrize("most", [1, 2, 100, 8192, 10_000])
def test_lengths_are_dense_and_end_with_the_longest(most: int) -> None:
    lengths = warm_lengths(most)
    assert lengths == sorted(set(lengths)) and lengths[0] == 1 and lengths[-1] == most
    assert all(after <= 2 * before for before, after in zip(lengths, lengths[1:], strict=False))


def test_no_length_in_between_has_a_kernel_compiled() -> None:
    pytest.importorskip("triton")
    from tests.benchmarks.launches import prefill_keys

    ladder, between = warm_lengths(2048), [5, 9, 23, 100, 300]
    beside = {length: [max(step for step in ladder if step < length), min(step for step in ladder if step > length)] for length in between}
    found = prefill_keys(sorted({*between, *(step for steps in beside.values() for step in steps)}))
    for length, steps in beside.items():
        assert len(found[length]) > 20
        missing = found[length] - set().union(*(found[step] for step in steps))
        assert not missing, f"{length} tokens, beside {steps}"
