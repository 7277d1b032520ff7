"""prompt_indices in one launch, a program 128 columns of some tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.ops.prompt_indices import MULTIPLE

TOKENS = 16


@triton.jit(do_not_specialize=["tokens", "chosen_stride", "count"])
def prompt_indices_kernel(
    window_ptr, chosen_ptr, base_ptr, out_ptr, tokens, count, chosen_stride, columns, TOKENS: tl.constexpr, MULTIPLE: tl.constexpr
):  # fmt: skip
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    part, place = tl.program_id(1), tl.arange(0, MULTIPLE)[None, :]
    there = token < tokens
    if part == 0:
        rows = tl.load(window_ptr + token * MULTIPLE + place, mask=there, other=-1)
    else:
        entry = (part - 1) * MULTIPLE + place
        chosen = tl.load(chosen_ptr + token * chosen_stride + entry, mask=there & (entry < count), other=-1)
        rows = tl.where(chosen >= 0, chosen + tl.load(base_ptr + token, mask=there, other=0), -1)
    tl.store(out_ptr + token * columns + part * MULTIPLE + place, rows, mask=there)


def run(window: torch.Tensor, chosen: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """As the reference; window and base contiguous, chosen in rows."""
    assert window.is_contiguous() and base.is_contiguous() and window.shape[1] == MULTIPLE, f"{window.shape} {window.stride()}"
    assert chosen.shape[1] <= 1 or chosen.stride(1) == 1, f"strides {chosen.stride()}"
    tokens, count = chosen.shape
    columns = MULTIPLE + -(-count // MULTIPLE) * MULTIPLE
    out = torch.empty(tokens, columns, dtype=torch.int32, device=window.device)
    if tokens:
        prompt_indices_kernel[(triton.cdiv(tokens, TOKENS), columns // MULTIPLE)](
            window, chosen, base, out, tokens, count, chosen.stride(0), columns, TOKENS=TOKENS, MULTIPLE=MULTIPLE, num_warps=4
        )
    return out


_TYPES = dict.fromkeys(("window_ptr", "chosen_ptr", "base_ptr", "out_ptr"), "*i32") | dict.fromkeys(
    ("tokens", "count", "chosen_stride"), "i32"
)
AOT = [(prompt_indices_kernel, _TYPES | {"columns": "i32:16"}, {"TOKENS": TOKENS, "MULTIPLE": MULTIPLE}, {"num_warps": 4})]
