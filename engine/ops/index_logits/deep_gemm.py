"""Index scores of FP8 keys: prefill with DeepGEMM over a gathered copy of the sequences' keys, decode with the Triton kernel, which reads
the pages in place and was faster than DeepGEMM's paged one at every shape measured (tests/benchmarks/results)."""

from __future__ import annotations

import deep_gemm
import torch

from engine.batch import TokenPlaces
from engine.cache.arena import RowPool
from engine.cache.rows import Fp8IndexRows
from engine.ops.index_logits import triton

ROWS = 64
RATIO = 4


def run(q: torch.Tensor, weights: torch.Tensor, keys: RowPool, places: TokenPlaces, num_entries: int) -> torch.Tensor:
    """As the reference; pages of 64 keys, 32 or 64 heads of 128 channels. Formats other than fp8 are the Triton kernel's, too."""
    if places.is_decode or not isinstance(keys.form, Fp8IndexRows) or not len(q) or not num_entries:
        return triton.run(q, weights, keys, places, num_entries)
    #   gathered = [ num_entries keys of the first sequence | of the second | ... ], whole pages
    pages = places.page_table_SP[:, : -(-num_entries // ROWS)].clamp(min=0).long()
    data = keys.data[pages].view(-1, keys.form.data_bytes).view(torch.float8_e4m3fn)
    scale = keys.scale[pages].view(-1, keys.form.scale_bytes).view(torch.float32)[:, 0]
    first = (places.sequences_T * (len(data) // len(pages))).int()
    visible = ((places.positions_T + 1) // RATIO).clamp(max=num_entries).int()
    scores: torch.Tensor = deep_gemm.fp8_mqa_logits(q, (data, scale), weights, first, first + visible, False, num_entries)
    return scores
