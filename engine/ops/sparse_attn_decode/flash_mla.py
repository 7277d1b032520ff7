"""FlashMLA's sparse decode kernel over the pools where they lie: window and entries in one call. Few rows, and one sequence, go to
triton_few.py: FlashMLA gives a sequence of 640 to two multiprocessors, one of 7,200 to all, and takes launches to put the parts together
and to turn the result back.

Its tile schedule depends on the lengths alone, so it is worked out in the step's first layer of each kind and kept in the memo.
"""

from __future__ import annotations

from typing import Any

import flash_mla
import torch

from engine.cache.arena import RowPool
from engine.ops.output_derotate.triton import run as output_derotate
from engine.ops.sparse_attn_decode import triton_few

HEADS = (64, 128)
"""Numbers of query heads that the kernel knows; fewer are filled up."""
ROWS = 64
"""It takes rows by so many."""
MOST_FEW_ROWS, MOST_FEW_ENTRIES = 2048, 512
"""Rows of all sequences, and entries of one among several, up to which triton_few.py is faster on an H200."""


def run(
    q: torch.Tensor,
    window: RowPool,
    window_rows: torch.Tensor,
    entries: RowPool | None,
    entry_rows: torch.Tensor,
    num_entries: torch.Tensor,
    sink: torch.Tensor,
    scale: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    memo: dict[str, Any],
) -> torch.Tensor:
    sequences, heads, width = q.shape
    if not sequences:
        return torch.empty_like(q)
    most = entry_rows.shape[1]
    is_few = most <= MOST_FEW_ENTRIES and sequences * (window_rows.shape[1] + most) <= MOST_FEW_ROWS
    if (is_few or sequences == 1) and triton_few.takes(sequences, most):
        few = q.contiguous(), window, window_rows.contiguous(), entries, entry_rows, num_entries, sink, scale, cos, sin
        return triton_few.run_few(*few, memo)
    missing = next(known for known in HEADS if known >= heads) - heads
    if missing:
        q, sink = torch.nn.functional.pad(q, (0, 0, 0, missing)), torch.nn.functional.pad(sink, (0, missing))
    more: dict[str, Any] = {}
    if entries is not None and most:
        rows = torch.nn.functional.pad(entry_rows, (0, -most % ROWS), value=-1) if most % ROWS else entry_rows
        more = {"extra_k_cache": blocks(entries), "extra_indices_in_kvcache": rows[:, None], "extra_topk_length": num_entries}
    if "schedule" not in memo:
        memo["schedule"], _ = flash_mla.get_mla_metadata()
    out, _ = flash_mla.flash_mla_with_kvcache(
        q[:, None],
        blocks(window),
        None,
        None,
        width,
        memo["schedule"],
        softmax_scale=scale,
        indices=window_rows[:, None],
        attn_sink=sink,
        use_legacy=True,
        kv_format="V4",
        **more,
    )
    return output_derotate(out[:, 0, :heads].contiguous(), cos, sin)


def blocks(pool: RowPool) -> torch.Tensor:
    """uint8 [units, R, 1, bytes of a row]: data rows, then scale rows, as they lie in each unit."""
    units, rows, data_bytes = pool.data.shape
    row_bytes = data_bytes + pool.scale.shape[2]
    return pool.data.as_strided((units, rows, 1, row_bytes), (pool.data.stride(0), row_bytes, row_bytes, 1))
