"""Router in one launch: one program a token, all experts in registers.

Scores are computed in float64, as the reference does, so that the selection is the reference's for every input: a token's E
logits are few, and rounding a score differently would swap experts whose scores nearly tie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NOTHING = tl.constexpr(-(2**63))
"""Below every key."""
FEW_TOKENS = 1024
"""So many programs leave multiprocessors room: four warps each are faster; more tokens fill them with one each."""


@triton.jit
def moe_gate_kernel(
    logits_ptr,
    bias_ptr,
    table_ptr,
    token_ids_ptr,
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
        ids = tl.load(table_ptr + tl.load(token_ids_ptr + token) * TOP_K + place, mask=place < TOP_K, other=0)
    else:
        expert = tl.arange(0, PADDED_E)
        real = expert < num_experts
        biased = _score(tl.load(logits_ptr + token * num_experts + expert, mask=real, other=0.0))
        biased += tl.load(bias_ptr + expert, mask=real, other=0.0)
        bits = (biased + 0.0).to(tl.int32, bitcast=True)  # + 0: no negative zero
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        # One maximum finds score and id: the score's bits, in its order, above; the lower id below is the larger number.
        keys = tl.where(real, (ordered << 32) | (PADDED_E - 1 - expert).to(tl.int64), NOTHING)
        ids = tl.zeros([PADDED_K], tl.int64)
        for k in tl.static_range(TOP_K):
            best = tl.max(keys, 0)
            ids = tl.where(place == k, PADDED_E - 1 - (best & (PADDED_E - 1)), ids)
            keys = tl.where(keys == best, NOTHING, keys)
    picked = _score(tl.load(logits_ptr + token * num_experts + ids))
    picked = tl.where(place < TOP_K, picked, 0.0)
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
    logits: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor | None, token_ids: torch.Tensor, top_k: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference; table and token_ids contiguous."""
    tokens, experts = logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens:
        moe_gate_kernel[(tokens,)](
            logits.contiguous(),
            logits if bias is None else bias,
            ids if table is None else table,
            token_ids,
            ids,
            weights,
            experts,
            scaling,
            TOP_K=top_k,
            PADDED_K=triton.next_power_of_2(top_k),
            PADDED_E=triton.next_power_of_2(experts),
            FIXED=table is not None,
            num_warps=4 if tokens <= FEW_TOKENS else 1,
        )
    return ids, weights


_SIGNATURE = {
    "logits_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "table_ptr": "*i64",
    "token_ids_ptr": "*i64",
    "ids_ptr": "*i64",
    "weights_ptr": "*fp32",
    "num_experts": "i32:16",
    "scaling": "fp32",
}
AOT = [
    (moe_gate_kernel, _SIGNATURE, {"TOP_K": 6, "PADDED_K": 8, "PADDED_E": experts, "FIXED": fixed}, {"num_warps": warps})
    for experts, fixed, warps in ((256, False, 1), (256, False, 4), (512, False, 4), (256, True, 4))
]
