"""The ops by name, for whoever checks a configuration without loading torch."""

OP_NAMES = (
    "compress_c128",
    "compress_c4",
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
    "q_norm_rope",
    "rms_norm",
    "sample",
    "sparse_attn_decode",
    "sparse_attn_prefill",
    "swiglu",
)
"""Every folder beside this file, in alphabetical order (a test compares)."""
