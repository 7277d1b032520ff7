"""Sums over K that several programs share, in one launch: each stores its part of a tile as fp32, and the last one to arrive adds them, in
order, so that the result does not depend on who was last.

`arrived` counts the programs that have stored their part of a tile; it is zero between launches.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_last(arrived_ptr, splits):
    """Whether all other programs of a tile, of `splits`, have stored their part; the last one sets the count back to zero."""
    tl.debug_barrier()
    last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == splits - 1
    if last:
        tl.store(arrived_ptr, 0)
    return last


@triton.jit
def sum_parts(parts_ptr, mask, M: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr):
    """fp32 [N, M] of the parts at parts_ptr [N, M], and each N * M behind the one before."""
    total = tl.zeros([N, M], tl.float32)
    for split in tl.static_range(SPLITS):  # unrolled: all parts are asked for before the first is there
        total += tl.load(parts_ptr + split * (N * M), mask=mask, other=0.0, cache_modifier=".cg")
    return total
