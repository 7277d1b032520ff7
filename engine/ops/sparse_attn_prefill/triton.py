"""Sparse prefill attention with Triton alone: a program for each query and block of heads, over the rows it has chosen."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 32
"""Rows that a program takes at a time."""


@triton.jit(do_not_specialize=["num_rows"])
def sparse_attn_prefill_kernel(
    q_ptr, kv_ptr, indices_ptr, sink_ptr, out_ptr, num_heads, num_rows, scale,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, column, place = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, WIDTH), tl.arange(0, ROWS)
    real = head < num_heads
    at = (token * num_heads + head)[:, None] * WIDTH + column[None, :]
    q = tl.load(q_ptr + at, mask=real[:, None], other=0.0).to(tl.float32).to(DOT)
    top = tl.load(sink_ptr + head, mask=real, other=0.0)
    total, acc = tl.full([HEADS], 1.0, tl.float32), tl.zeros([HEADS, WIDTH], tl.float32)
    for start in range(0, num_rows, ROWS):
        rows = tl.load(indices_ptr + token * num_rows + start + place, mask=start + place < num_rows, other=-1).to(tl.int64)
        used = rows >= 0
        kv = tl.load(kv_ptr + tl.maximum(rows, 0)[:, None] * WIDTH + column[None, :], mask=used[:, None], other=0.0)
        kv = kv.to(tl.float32).to(DOT)
        scores = tl.dot(q, tl.trans(kv), input_precision="ieee") * scale
        scores = tl.where(used[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        keep, weight = tl.exp(top - higher), tl.exp(scores - higher[:, None])
        total = total * keep + tl.sum(weight, 1)
        acc = acc * keep[:, None] + tl.dot(weight.to(DOT), kv, input_precision="ieee")
        top = higher
    tl.store(out_ptr + at, acc / total[:, None], mask=real[:, None])


def run(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, sink: torch.Tensor, scale: float) -> torch.Tensor:
    tokens, heads, width = q.shape
    out = torch.empty_like(q)
    if not tokens:
        return out
    block = max(16, min(64, triton.next_power_of_2(heads)))
    sparse_attn_prefill_kernel[(tokens, triton.cdiv(heads, block))](
        q.contiguous(), kv.contiguous(), indices.contiguous(), sink, out, heads, indices.shape[1], scale,
        WIDTH=width, HEADS=block, ROWS=ROWS, DOT=tl.bfloat16 if q.is_cuda else tl.float32, num_warps=8,
    )  # fmt: skip
    return out


_SIGNATURE = {
    "q_ptr": "*bf16", "kv_ptr": "*bf16", "indices_ptr": "*i32", "sink_ptr": "*fp32", "out_ptr": "*bf16", "num_heads": "i32",
    "num_rows": "i32", "scale": "fp32",
}  # fmt: skip
AOT = [(sparse_attn_prefill_kernel, _SIGNATURE, {"WIDTH": 512, "HEADS": 64, "ROWS": ROWS, "DOT": tl.bfloat16}, {"num_warps": 8})]
