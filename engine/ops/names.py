"""The ops by name and their backends, for whoever checks a configuration without loading torch."""

OP_NAMES = (
    "compress_c128",
    "compress_c4",
    "exchange_pack",
    "exchange_pack_fp8",
    "exchange_slots",
    "exchange_slots_fp8",
    "exchange_sum",
    "exchange_unpack",
    "exchange_unpack_fp8",
    "expert_exchange",
    "fp8_linear",
    "grouped_linear",
    "hc_head",
    "hc_post",
    "hc_post_pre",
    "hc_pre",
    "index_logits",
    "index_query",
    "index_topk",
    "kv_store",
    "linear",
    "moe_experts",
    "moe_gate",
    "output_derotate",
    "page_rows",
    "pool_rows",
    "prompt_indices",
    "q_norm_rope",
    "rms_norm",
    "sample",
    "sparse_attn_decode",
    "sparse_attn_prefill",
    "step_tables",
    "swiglu",
)
"""Every folder beside this file, in alphabetical order (a test compares)."""

_OTHERS = {
    "expert_exchange": ("direct", "gather", "deepep"),
    "fp8_linear": ("deep_gemm", "triton"),
    "index_logits": ("deep_gemm", "triton"),
    "index_topk": ("cuda", "triton"),
    "linear": ("triton", "cublas"),
    "moe_experts": ("deep_gemm", "triton"),
    "sparse_attn_decode": ("flash_mla", "triton"),
    "sparse_attn_prefill": ("flash_mla", "triton"),
}
"""Backends of those that have others than Triton's."""


def backends_of(name: str) -> tuple[str, ...]:
    """What `engine.ops` may name for an op, on whatever machine (a test compares with the ops)."""
    return ("reference", *_OTHERS.get(name, ("triton",)))
