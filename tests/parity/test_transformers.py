"""The reference path against transformers' DeepseekV4ForCausalLM in float32, on random weights in published tensor names.

transformers keeps no compressed caches across chunks of its own, so one whole forward of it is the yardstick for every way of
cutting the same tokens here.
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.engine import LoadedModel
from engine.score import score
from tests.support.checkpoints import TINY, random_tensors, write_random

NUM_TOKENS = 600
TOLERANCE = 1e-4
"""Float32 against float64 accumulation over 6 layers; logits reach about 5."""

FLOAT32 = EngineConfig(device="cpu", dtype="float32", kv_format="fp32", index_format="fp32", max_model_len=4096, threads=2)


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


def transformers_logits(config: dict, tensors: dict[str, torch.Tensor], ids: list[int]) -> np.ndarray:
    """float32 [T, vocab] of one whole forward."""
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
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(0, TINY["vocab_size"], (NUM_TOKENS,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_random(tmp_path_factory.mktemp("tiny"), TINY, quantized=False)


@pytest.fixture(scope="module")
def loaded(folder: pathlib.Path) -> LoadedModel:
    return LoadedModel.load(folder, FLOAT32)


@pytest.fixture(scope="module")
def expected(ids: list[int]) -> np.ndarray:
    tensors = {name: value if value.dtype == torch.int64 else value.float() for name, value in random_tensors(TINY).items()}
    return transformers_logits(TINY, tensors, ids)


def test_the_random_model_is_not_degenerate(expected: np.ndarray) -> None:
    assert expected.std() > 0.3
    assert np.abs(expected[1:] - expected[:-1]).max() > 1.0


@pytest.mark.parametrize("chunk", [None, 50, 100, 128, 137, 300])
def test_prefill_in_chunks_matches_transformers(loaded: LoadedModel, ids: list[int], expected: np.ndarray, chunk: int | None) -> None:
    assert np.abs(score(loaded, ids, chunk=chunk) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("decode_from", [1, 3, 4, 127, 128, 129, 255, 511])
def test_decode_matches_transformers(loaded: LoadedModel, ids: list[int], expected: np.ndarray, decode_from: int) -> None:
    assert np.abs(score(loaded, ids, decode_from=decode_from) - expected).max() <= TOLERANCE


def test_score_command_writes_the_same_logits(folder: pathlib.Path, ids: list[int], expected: np.ndarray, tmp_path: pathlib.Path) -> None:
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    command = [sys.executable, "-m", "engine", "score", "--model", str(folder), "--ids", str(tmp_path / "ids.json")]
    subprocess.run([*command, "--out", str(tmp_path / "out.npy"), "--dtype", "float32", "--chunk", "128"], check=True)
    assert np.abs(np.load(tmp_path / "out.npy") - expected).max() <= TOLERANCE
