"""transformers' DeepSeek-V4 with the weights of a published checkpoint: the yardstick of the parity tests."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import torch


def transformers_name(name: str) -> str:
    """Published tensor name -> transformers' (specification, section 4.3)."""
    rules = [
        (r"^embed\.weight", "model.embed_tokens.weight"),
        (r"^head\.weight", "lm_head.weight"),
        (r"^norm\.weight", "model.norm.weight"),
        (r"^hc_head_(fn|base|scale)", r"model.hc_head.hc_\1"),
        (r"^layers", "model.layers"),
        (r"attn_norm", "input_layernorm"),
        (r"ffn_norm", "post_attention_layernorm"),
        (r"hc_(attn|ffn)_(fn|base|scale)", r"\1_hc.\2"),
        (r"\.attn\.indexer\.compressor\.", ".self_attn.compressor.indexer."),
        (r"\.attn\.indexer\.wq_b", ".self_attn.compressor.indexer.q_b_proj"),
        (r"\.attn\.indexer\.weights_proj", ".self_attn.compressor.indexer.scorer.weights_proj"),
        (r"\.attn\.", ".self_attn."),
        (r"\.ffn\.", ".mlp."),
        (r"compressor\.(indexer\.)?wkv", r"compressor.\1kv_proj"),
        (r"wgate", "gate_proj"),
        (r"\.ape$", ".position_bias"),
        (r"compressor\.(indexer\.)?norm", r"compressor.\1kv_norm"),
        (r"wq_a", "q_a_proj"),
        (r"q_norm", "q_a_norm"),
        (r"self_attn\.wq_b", "self_attn.q_b_proj"),
        (r"self_attn\.wkv", "self_attn.kv_proj"),
        (r"wo_([ab])", r"o_\1_proj"),
        (r"attn_sink", "sinks"),
        (r"gate\.bias", "gate.e_score_correction_bias"),
        (r"shared_experts\.w1", "shared_experts.gate_proj"),
        (r"shared_experts\.w3", "shared_experts.up_proj"),
        (r"shared_experts\.w2", "shared_experts.down_proj"),
    ]
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def transformers_model(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """DeepseekV4ForCausalLM in float32 with these weights. `tensors`: values by published name."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf_config = DeepseekV4Config(**config)
        hf_config._attn_implementation = "eager"
        model = DeepseekV4ForCausalLM(hf_config).float().eval()
    state: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        experts = [f"layers.{layer}.ffn.experts.{index}" for index in range(config["n_routed_experts"])]
        gate_up = [torch.cat((tensors[f"{e}.w1.weight"], tensors[f"{e}.w3.weight"])) for e in experts]
        state[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        state[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack([tensors[f"{e}.w2.weight"] for e in experts])
    for name, value in tensors.items():
        if not name.startswith("mtp.") and ".experts." not in name:
            state[transformers_name(name)] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, f"{unexpected[:5]}"
    assert not [name for name in missing if "inv_freq" not in name], f"{missing[:5]}"
    return model


def logits_of(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    """float32 [T, vocab] of one whole forward."""
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([ids])).logits[0].float().numpy()
    return logits
