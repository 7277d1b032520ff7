"""Page-major pools and places of tokens, drawn for the cases of ops that read or write them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from core.kv_layout import PAGE_TOKENS
from engine.batch import TokenPlaces
from engine.cache.arena import RowPool
from engine.cache.layout import ALIGNMENT
from engine.cache.rows import RowFormat
from engine.ops.cases import generator, randn

NUM_LAYERS = 3
"""Layers whose rows a page holds: the pool is the middle one's."""
AT_ONCE = 1 << 16


def empty_pool(device: torch.device, form: RowFormat, num_pages: int, rows: int) -> RowPool:
    """Zeros, strided as in an arena."""
    field_bytes = -(-rows * (form.data_bytes + form.scale_bytes) // ALIGNMENT) * ALIGNMENT
    memory = torch.zeros(num_pages, NUM_LAYERS * field_bytes, dtype=torch.uint8, device=device)
    split, end = field_bytes + rows * form.data_bytes, field_bytes + rows * (form.data_bytes + form.scale_bytes)
    data = memory[:, field_bytes:split].unflatten(1, (rows, form.data_bytes))
    if form.scale_bytes:
        return RowPool(form, data, memory[:, split:end].unflatten(1, (rows, form.scale_bytes)))
    return RowPool(form, data, memory[:, :0].unsqueeze(1).expand(-1, rows, -1))


def random_pool(device: torch.device, seed: int, form: RowFormat, num_pages: int, rows: int) -> RowPool:
    """Every row holds an encoded normal vector."""
    pool = empty_pool(device, form, num_pages, rows)
    for first in range(0, num_pages * rows, AT_ONCE):
        number = torch.arange(first, min(first + AT_ONCE, num_pages * rows), device=device)
        pool.write(number // rows, number % rows, randn(device, seed + first, len(number), form.width))
    return pool


def places_of(device: torch.device, seed: int, chunks: Sequence[tuple[int, int]], fillers: int = 0) -> tuple[TokenPlaces, int, int]:
    """Of a step's chunks, each (position of its first token, tokens), and rows that only fill up: (places, pages, slots), with pages
    and slots given out in random order and the pages just enough."""
    needed = [-(-(start + length) // PAGE_TOKENS) for start, length in chunks] + [0] * fillers
    lengths = torch.tensor([length for _, length in chunks] + [1] * fillers, dtype=torch.int64)
    positions = [torch.arange(start, start + length) for start, length in chunks] + [torch.full((1,), -1)] * fillers
    num_pages, num_slots, width = sum(needed), len(chunks) + 1, max(needed, default=0)
    draw = generator(torch.device("cpu"), seed)
    ids, slots = torch.randperm(num_pages, generator=draw).int(), torch.randperm(num_slots, generator=draw)
    table = torch.full((len(needed), width), -1, dtype=torch.int32)
    for row, (count, first) in enumerate(zip(needed, [sum(needed[:i]) for i in range(len(needed))], strict=True)):
        table[row, :count] = ids[first : first + count]
    starts = torch.tensor([start for start, _ in chunks] + [-1] * fillers, dtype=torch.int64)
    per_sequence = (torch.arange(len(needed)), starts, slots[torch.arange(len(needed)).clamp(max=len(chunks))])
    sequences, start_of, slot_of = (values.repeat_interleave(lengths).to(device) for values in per_sequence)
    joined = torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64)
    is_decode = all(length == 1 for _, length in chunks)
    return TokenPlaces(joined.to(device), sequences, start_of, slot_of, table.to(device), is_decode), num_pages, num_slots
