"""Router in one launch: one warp a token, all experts in registers.

Scores are computed in float64, as the reference does, so that the selection is the reference's for every input: a token's E
logits are few, and rounding a score differently would swap experts whose scores nearly tie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def moe_gate_kernel(
    logits_ptr,
    bias_ptr,
    fixed_ptr,
    ids_ptr,
    weights_ptr,
    num_experts,
    scaling,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_E: tl.constexpr,
    FIXED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PADDED_K)
    if FIXED:
        ids = tl.load(fixed_ptr + token * TOP_K + place, mask=place < TOP_K, other=0)
        picked = _score(tl.load(logits_ptr + token * num_experts + ids))
        picked = tl.where(place < TOP_K, picked, 0.0)
    else:
        expert = tl.arange(0, PADDED_E)
        real = expert < num_experts
        scores = _score(tl.load(logits_ptr + token * num_experts + expert, mask=real, other=0.0))
        left = tl.where(real, scores + tl.load(bias_ptr + expert, mask=real, other=0.0), float("-inf"))
        ids = tl.zeros([PADDED_K], tl.int64)
        picked = tl.zeros([PADDED_K], tl.float32)
        for k in tl.static_range(TOP_K):
            best = tl.max(left, 0)
            chosen = tl.min(tl.where(left == best, expert, PADDED_E), 0)
            chosen = tl.minimum(chosen, num_experts - 1)  # NaN equals nothing: stay inside
            ids = tl.where(place == k, chosen.to(tl.int64), ids)
            picked = tl.where(place == k, tl.sum(tl.where(expert == chosen, scores, 0.0), 0), picked)
            left = tl.where(expert == chosen, float("-inf"), left)
    weights = picked / (tl.sum(picked, 0) + 1e-20) * scaling
    tl.store(ids_ptr + token * TOP_K + place, ids, mask=place < TOP_K)
    tl.store(weights_ptr + token * TOP_K + place, weights, mask=place < TOP_K)


@triton.jit
def _score(logits):
    """fp32 sqrt(softplus), computed in float64; log(1 + e) without loss for small e."""
    x = logits.to(tl.float64)
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.sqrt(tl.maximum(x, 0.0) + log1p).to(tl.float32)


def run(
    logits: torch.Tensor, bias: torch.Tensor | None, fixed_ids: torch.Tensor | None, top_k: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference; logits contiguous in rows."""
    tokens, experts = logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens:
        moe_gate_kernel[(tokens,)](
            logits.contiguous(),
            logits if bias is None else bias,
            ids if fixed_ids is None else fixed_ids.contiguous(),
            ids,
            weights,
            experts,
            scaling,
            TOP_K=top_k,
            PADDED_K=triton.next_power_of_2(top_k),
            PADDED_E=triton.next_power_of_2(experts),
            FIXED=fixed_ids is not None,
            num_warps=1,
        )
    return ids if fixed_ids is None else fixed_ids, weights


_SIGNATURE = {
    "logits_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "fixed_ptr": "*i64",
    "ids_ptr": "*i64",
    "weights_ptr": "*fp32",
    "num_experts": "i32:16",
    "scaling": "fp32",
}
AOT = [
    (moe_gate_kernel, _SIGNATURE, {"TOP_K": 6, "PADDED_K": 8, "PADDED_E": experts, "FIXED": fixed}, {"num_warps": 1})
    for experts, fixed in ((256, False), (512, False), (256, True))
]
