"""DeepGEMM's index scores for FP8 keys: decode reads the pages in place, prefill a gathered copy of the sequences' keys.

Keys of other formats are scored by the Triton backend: DeepGEMM's FP4 is not this format's queries.
"""

from __future__ import annotations

import functools

import deep_gemm
import torch

from engine.batch import TokenPlaces
from engine.cache.arena import RowPool
from engine.cache.rows import Fp8IndexRows
from engine.ops.index_logits import triton

ROWS = 64
RATIO = 4


def run(q: torch.Tensor, weights: torch.Tensor, keys: RowPool, places: TokenPlaces, num_entries: int) -> torch.Tensor:
    """As the reference; pages of 64 keys, 32 or 64 heads of 128 channels in format fp8."""
    if not isinstance(keys.form, Fp8IndexRows):
        return triton.run(q, weights, keys, places, num_entries)
    if not len(q) or not num_entries:
        return triton.empty_scores(len(q), num_entries, q.device)
    visible = ((places.positions_T + 1) // RATIO).clamp(max=num_entries).int()
    return (
        _decode(q, weights, keys, places, visible, num_entries)
        if places.is_decode
        else _prefill(q, weights, keys, places, visible, num_entries)
    )


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _decode(
    q: torch.Tensor, weights: torch.Tensor, keys: RowPool, places: TokenPlaces, visible: torch.Tensor, num_entries: int
) -> torch.Tensor:
    table = places.page_table_SP
    if len(table) != len(q):
        table = table[places.sequences_T]
    num_pages, page_bytes, row_bytes = len(keys.data), keys.data.stride(0), keys.form.data_bytes + keys.form.scale_bytes
    fused = keys.data.as_strided((num_pages, ROWS, 1, row_bytes), (page_bytes, row_bytes, row_bytes, 1))
    # Filler rows see nothing; a length of 0 would leave the schedule without an end.
    lengths = visible.clamp(min=1)[:, None]
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, ROWS, _num_sms(q.device))
    scores: torch.Tensor = deep_gemm.fp8_paged_mqa_logits(q[:, None], fused, weights, lengths, table, schedule, num_entries, False)
    return scores


def _prefill(
    q: torch.Tensor, weights: torch.Tensor, keys: RowPool, places: TokenPlaces, visible: torch.Tensor, num_entries: int
) -> torch.Tensor:
    #   gathered = [ num_entries keys of the first sequence | of the second | ... ]
    num_sequences = len(places.page_table_SP)
    pages = places.page_table_SP[:, : -(-num_entries // ROWS)].clamp(min=0).long()
    data = keys.data[pages].view(-1, keys.form.data_bytes).view(torch.float8_e4m3fn)
    scale = keys.scale[pages].view(-1, keys.form.scale_bytes).view(torch.float32)[:, 0]
    first = (places.sequences_T * (len(data) // num_sequences)).int()
    scores: torch.Tensor = deep_gemm.fp8_mqa_logits(q, (data, scale), weights, first, first + visible, False, num_entries)
    return scores
