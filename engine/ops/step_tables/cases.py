"""step_tables: decode with fillers and in buckets for longer sequences, chunks longer and shorter than the window, positions up to 1M."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.ops.cases import Bench, Case, Draw
from engine.ops.paged_cases import places_of

REASON = "cosines and sines of float64 angles, which two libraries may round to neighbouring floats"


def _draw(chunks: Sequence[tuple[int, int]], rope: int = 64, fillers: int = 0, longest: int | None = None) -> Draw:
    """`longest`: a bucket's bound, whose page table is as wide; by default the longest sequence's."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        places, _, _ = places_of(device, seed, chunks, fillers)
        bound = max((start + length for start, length in chunks), default=0) if longest is None else longest
        table = torch.nn.functional.pad(places.page_table_SP, (0, -(-bound // 256) - places.page_table_SP.shape[1]), value=-1)
        places = places.__class__(
            places.positions_T, places.sequences_T, places.starts_T, places.slots_T, table.contiguous(), places.is_decode
        )
        main, compressed = (theta ** (-torch.arange(0, rope, 2, device=device) / rope) for theta in (1e4, 1.6e5))
        return places, main, compressed, 512, bound

    return draw


DECODE = [(position, 1) for position in (0, 2, 3, 126, 127, 128, 255, 2047, 2048, 70_003)]
CASES = (
    Case("no tokens", _draw([]), 1e-7, REASON, small=True),
    Case("short decode", _draw([(0, 1), (7, 1)], rope=16), 1e-7, REASON, small=True),
    Case("decode with fillers in a larger bucket", _draw(DECODE[:8], fillers=2, longest=2560), 1e-7, REASON, small=True),
    Case("chunks", _draw([(0, 3), (120, 140), (255, 1)], rope=16), 1e-7, REASON, small=True),
    Case("decode", _draw(DECODE, fillers=3, longest=131_072), 1e-7, REASON),
    Case("decode at 1M tokens", _draw([(1_048_575, 1)]), 1e-7, REASON),
    Case("prefill", _draw([(0, 4096), (5000, 300), (77, 1)]), 1e-7, REASON),
)


def _bench(tokens: int, position: int, longest: int) -> Bench:
    num_bytes = tokens * (3 * 8 + 8 * 32 * 4 + 3 * 8 + 3 * 4 + 128 * 4 + longest // 128 * 8)
    return Bench(f"T={tokens} bucket {longest // 1024}K", _draw([(position, 1)] * tokens, longest=longest), num_bytes)


BENCH = (_bench(1, 5000, 8192), _bench(32, 5000, 8192), _bench(128, 100_000, 131_072), _bench(1, 1_000_000, 1 << 20))
