"""A prompt's token on its way to the ranks that hold its experts, as one row: FP8 values with their scales, slots, weights.

Experts quantise what they get to FP8, groups of 128 channels with a power of two each (`moe_experts`). Doing it before the way halves the
bytes and changes no bit of the result.

    [ d codes | d / 128 scales, fp32 | k slots, int32 | k weights, fp32 | zeros up to a multiple of 64 bytes ]
"""

from __future__ import annotations

import torch

from engine.model.quantized import FP8_BLOCK
from engine.ops import requires
from engine.ops.fp8_linear import quantize_rows
from engine.ops.registry import Impl, Op
from engine.parallel.expert_placement import choose_slots, count_tokens

ALIGNMENT = 16
"""Words that a row is a multiple of, so that values can be moved 16 bytes at a time."""


def row_words(width: int, top_k: int) -> int:
    """int32 words of a row of d = `width` channels, a multiple of 128."""
    assert width % FP8_BLOCK == 0, f"{width} channels are no whole groups"
    return -(-(width // 4 + width // FP8_BLOCK + 2 * top_k) // ALIGNMENT) * ALIGNMENT


def exchange_pack_fp8(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    turns: torch.Tensor,
    load: torch.Tensor,
    rows: int,
) -> torch.Tensor:
    """x: [T, d] bf16; the others as `exchange_pack` takes them. Returns int32 [rows, row_words(d, k)], rows >= T: those behind the tokens
    are zeros, quantised, without an expert."""
    count_tokens(load, ids, positions)
    slots = torch.where(positions[:, None] >= 0, choose_slots(ids, table, turns), -1)
    more = (0, 0, 0, rows - len(x))
    quantized = quantize_rows(torch.nn.functional.pad(x, more))
    labels = (torch.nn.functional.pad(slots.int(), more, value=-1), torch.nn.functional.pad(weights, more).view(torch.int32))
    row = torch.cat((quantized.codes.view(torch.int32), quantized.scale.view(torch.int32), *labels), dim=1)
    return torch.nn.functional.pad(row, (0, row_words(x.shape[1], ids.shape[1]) - row.shape[1]))


OP = Op("exchange_pack_fp8", exchange_pack_fp8, backends={"triton": Impl("engine.ops.exchange_pack_fp8.triton", requires.triton)})
