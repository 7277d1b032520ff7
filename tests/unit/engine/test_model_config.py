from __future__ import annotations

import json
import pathlib
import random
from typing import Any

import pytest

from core.errors import CheckpointError, ConfigError
from engine.config import EngineConfig, ModelConfig
from tests.support.checkpoints import SMALL, TINY


def test_layers_are_counted_by_num_hidden_layers_and_never_by_the_ratios() -> None:
    config = ModelConfig.from_dict(TINY | {"compress_ratios": [*TINY["compress_ratios"], 0, 0, 0]})
    assert config.compress_ratios == (0, 128, 4, 128, 4, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, ("model_type", "deepseek_v4")),
        ({"hidden_size": None}, ("hidden_size", "None")),
        ({"hidden_size": "256"}, ("hidden_size", "'256'")),
        ({"hidden_size": True}, ("hidden_size",)),
        ({"hidden_size": 0}, ("hidden_size", "at least 1")),
        ({"vocab_size": -3}, ("vocab_size", "-3")),
        ({"rope_theta": float("nan")}, ("rope_theta", "finite")),
        ({"rms_norm_eps": float("inf")}, ("rms_norm_eps", "finite")),
        ({"num_nextn_predict_layers": "one"}, ("num_nextn_predict_layers",)),
        ({"compress_ratios": [0, 4]}, ("compress_ratios", "num_hidden_layers=4")),
        ({"compress_ratios": [0, 4, 8, 4]}, ("compress_ratios", "8")),
        ({"compress_ratios": "0,4"}, ("compress_ratios",)),
        ({"rope_scaling": [1]}, ("rope_scaling",)),
        ({"rope_scaling": None}, ("rope_scaling", "yarn")),
        ({"rope_scaling": {"type": "yarn", "factor": 16}}, ("rope_scaling.", "beta_fast")),
        ({"scoring_func": "softmax"}, ("scoring_func", "sqrtsoftplus")),
        ({"norm_topk_prob": False}, ("norm_topk_prob", "True")),
        ({"o_groups": 3}, ("num_attention_heads", "o_groups")),
        ({"sliding_window": 64}, ("sliding_window", "64")),
        ({"num_experts_per_tok": 5}, ("num_experts_per_tok", "n_routed_experts")),
        ({"eos_token_id": 512}, ("vocabulary",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_refused_naming_key_and_file(change: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(SMALL | change, "folder/config.json")
    assert all(word in str(caught.value) for word in ("folder/config.json", *words)), str(caught.value)


@pytest.mark.parametrize(
    "key", sorted(SMALL.keys() - {"architectures", "model_type", "num_key_value_heads", "norm_topk_prob", "tie_word_embeddings"})
)
def test_every_key_may_be_missing_only_if_it_has_a_default(key: str) -> None:
    raw = {name: value for name, value in SMALL.items() if name != key}
    if key in ("scoring_func", "num_nextn_predict_layers"):
        ModelConfig.from_dict(raw)
    else:
        with pytest.raises(CheckpointError, match=key):
            ModelConfig.from_dict(raw)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00", "[" * 100_000])
def test_garbage_for_a_config_is_refused(text: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        ModelConfig.from_folder(tmp_path)


def test_random_values_give_a_config_or_a_refusal(rng: random.Random) -> None:
    odd: list[Any] = [None, True, -1, 0, 1, 2**70, 1.5, "x", [], {}, [0, 4, 128, 4], float("nan"), {"type": "yarn"}]
    num_refused = 0
    for _ in range(3000):
        raw = dict(SMALL)
        for key in rng.sample(sorted(raw), rng.randint(1, 3)):
            raw[key] = rng.choice(odd)
        try:
            ModelConfig.from_dict(json.loads(json.dumps(raw)))
        except CheckpointError:  # anything else fails the test
            num_refused += 1
    assert 2000 < num_refused < 3000, "some values are good"


@pytest.mark.parametrize(
    ("change", "word"),
    [({"device": "tpu"}, "cpu, cuda"), ({"dtype": "float16"}, "bfloat16"), ({"kv_format": "int8"}, "fp8"), ({"threads": 0}, "at least 1")],
)
def test_a_wrong_engine_option_is_refused_naming_key_and_choices(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        EngineConfig(**change)
    assert f"engine.{next(iter(change))}" in str(caught.value)
