"""FlashMLA's sparse prefill kernel."""

from __future__ import annotations

import flash_mla
import torch

HEADS = (64, 128)
"""Numbers of query heads that the kernel knows; fewer are filled up."""
ROWS = 128
"""It takes rows by so many."""


def run(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, sink: torch.Tensor, scale: float) -> torch.Tensor:
    tokens, heads, width = q.shape
    if not tokens:
        return torch.empty_like(q)
    missing = next(known for known in HEADS if known >= heads) - heads
    if missing:
        q, sink = torch.nn.functional.pad(q, (0, 0, 0, missing)), torch.nn.functional.pad(sink, (0, missing))
    more = -indices.shape[1] % ROWS
    rows = torch.nn.functional.pad(indices, (0, more), value=-1) if more else indices  # `pad` copies even if nothing is to be added
    out, _, _ = flash_mla.flash_mla_sparse_fwd(
        q.contiguous(),
        kv[:, None].contiguous(),
        rows[:, None].contiguous(),
        scale,
        width,
        attn_sink=sink,
        use_legacy=True,
        return_log2_lse=False,
    )
    return out[:, :heads].contiguous()
