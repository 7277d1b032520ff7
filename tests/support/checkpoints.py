"""Random checkpoints for tests, in the published layout.

`TINY` is the test configuration of the DeepSeek-V4 specification (section 6), for comparison with transformers in float32.
`SMALL` has the head sizes that the FP8 and FP4 cache formats need, and every layer type.
"""

from __future__ import annotations

import pathlib
from typing import Any

import torch

from engine.config import ModelConfig
from engine.model.checkpoint_writer import write_checkpoint
from engine.model.quantized import QuantizedWeight
from engine.model.weights import dummy_weights, published_format

_SHARED: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "num_hash_layers": 2,
    "swiglu_limit": 10.0,
    "sliding_window": 128,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}

TINY: dict[str, Any] = _SHARED | {
    "vocab_size": 1024,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "head_dim": 64,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 64,
    "o_groups": 4,
    "o_lora_rank": 32,
    "n_routed_experts": 8,
    "compress_ratios": [0, 128, 4, 128, 4, 0, 0],
    "index_n_heads": 64,
    "index_head_dim": 32,
    "index_topk": 16,
    "rope_scaling": {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 512},
    "max_position_embeddings": 4096,
}

SMALL: dict[str, Any] = _SHARED | {
    "vocab_size": 512,
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "n_routed_experts": 4,
    "compress_ratios": [0, 4, 128, 4, 0],
    "index_n_heads": 16,
    "index_head_dim": 128,
    "index_topk": 16,
    "rope_scaling": {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 65536},
    "max_position_embeddings": 16384,
}


def random_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Float values of every tensor, none degenerate: sinks, ape, gate bias, norms and hyper-connections are random too."""
    weights = dict(dummy_weights(ModelConfig.from_dict(config)))
    return {name: w.dequantize() if isinstance(w, QuantizedWeight) else w for name, w in weights.items()}


def float_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """`random_tensors` in float32; tables of ids stay int64."""
    return {name: value if value.dtype == torch.int64 else value.float() for name, value in random_tensors(config).items()}


def write_random(folder: pathlib.Path, config: dict[str, Any], *, quantized: bool) -> pathlib.Path:
    """A checkpoint of random weights: published formats, or (`quantized=False`) float32 throughout. Returns the folder."""

    def formats(name: str) -> str:
        form = published_format(name)
        return form if quantized or form == "int64" else "fp32"

    write_checkpoint(folder, config, random_tensors(config), formats=formats)
    return folder
