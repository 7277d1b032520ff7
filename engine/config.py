"""What the checkpoint says (`ModelConfig`) and what the operator says (`EngineConfig`)."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from dataclasses import dataclass, field
from typing import Any

from core.errors import CheckpointError, ConfigError
from engine.ops.names import OP_NAMES, backends_of


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The `config.json` of a DeepSeek-V4 checkpoint, field names as published (engine/model/deepseek_v4.md, 1)."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    num_hash_layers: int
    swiglu_limit: float
    sliding_window: int
    compress_ratios: tuple[int, ...]
    """Per main layer (truncated to num_hidden_layers): 0 window only, 4 with indexer, 128 dense entries."""
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    rope_factor: float
    rope_beta_fast: float
    rope_beta_slow: float
    rope_original_max_positions: int
    max_position_embeddings: int
    num_nextn_predict_layers: int
    bos_token_id: int
    eos_token_id: int

    @staticmethod
    def from_folder(folder: pathlib.Path) -> ModelConfig:
        """Read `folder/config.json`. Raises CheckpointError naming the file and the key."""
        path = folder / "config.json"
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file; a model folder holds config.json, tokenizer.json and *.safetensors")
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
        return ModelConfig.from_dict(raw, str(path))

    @staticmethod
    def from_dict(raw: dict[str, Any], source: str = "config") -> ModelConfig:
        """`raw` as in config.json. `source` names it in errors."""
        if not isinstance(raw, dict):
            raise CheckpointError(f"{source}: expected an object, found {type(raw).__name__}")
        if raw.get("model_type", "deepseek_v4") != "deepseek_v4":
            raise CheckpointError(f"{source}: model_type is {raw['model_type']!r}; only 'deepseek_v4' is supported")

        def number(holder: dict[str, Any], key: str, kind: type, where: str = "") -> Any:
            if key not in holder:
                raise CheckpointError(f"{source}: missing key {where + key!r}")
            value = holder[key]
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
                raise CheckpointError(f"{source}: {where + key!r} must be {kind.__name__}, found {value!r}")
            least = 1 if kind is int and key not in _MAY_BE_ZERO else 0
            if not least <= value < 2**53:
                raise CheckpointError(f"{source}: {where + key!r} is {value!r}; it must be at least {least}, and finite")
            return kind(value)

        layers = number(raw, "num_hidden_layers", int)
        ratios = raw.get("compress_ratios")
        if not isinstance(ratios, list) or len(ratios) < layers:
            raise CheckpointError(f"{source}: 'compress_ratios' must list at least num_hidden_layers={layers} ratios")
        bad = [ratio for ratio in ratios[:layers] if isinstance(ratio, bool) or ratio not in (0, 4, 128)]
        if bad:
            raise CheckpointError(f"{source}: 'compress_ratios' holds {bad[0]!r}; allowed are 0, 4 and 128")
        for key, allowed in (("scoring_func", "sqrtsoftplus"), ("hidden_act", "silu"), ("norm_topk_prob", True)):
            if raw.get(key, allowed) != allowed:
                raise CheckpointError(f"{source}: {key!r} is {raw[key]!r}; only {allowed!r} is supported")
        scaling = raw.get("rope_scaling") or {}
        if not isinstance(scaling, dict):
            raise CheckpointError(f"{source}: 'rope_scaling' must be an object, found {scaling!r}")
        if scaling.get("type", scaling.get("rope_type")) != "yarn":
            raise CheckpointError(f"{source}: 'rope_scaling.type' must be 'yarn', found {scaling.get('type')!r}")
        values: dict[str, Any] = {key: number(raw, key, kind) for key, kind in _SCALARS.items()}
        config = ModelConfig(
            **values,
            num_hidden_layers=layers,
            compress_ratios=tuple(ratios[:layers]),
            rope_factor=number(scaling, "factor", float, "rope_scaling."),
            rope_beta_fast=number(scaling, "beta_fast", float, "rope_scaling."),
            rope_beta_slow=number(scaling, "beta_slow", float, "rope_scaling."),
            rope_original_max_positions=number(scaling, "original_max_position_embeddings", int, "rope_scaling."),
            num_nextn_predict_layers=number({"num_nextn_predict_layers": 0} | raw, "num_nextn_predict_layers", int),
        )
        for is_right, claim in config._claims():
            if not is_right:
                raise CheckpointError(f"{source}: {claim}")
        return config

    def _claims(self) -> tuple[tuple[bool, str], ...]:
        """What must hold between the values, with the sentence to say if it does not."""
        return (
            (self.num_attention_heads % self.o_groups == 0, "'num_attention_heads' must be a multiple of 'o_groups'"),
            (self.sliding_window == 128, f"'sliding_window' is {self.sliding_window}; the slot format holds 128"),
            (self.num_experts_per_tok <= self.n_routed_experts, "'num_experts_per_tok' exceeds 'n_routed_experts'"),
            (self.qk_rope_head_dim % 2 == 0, "'qk_rope_head_dim' must be even"),
            (self.qk_rope_head_dim <= min(self.head_dim, self.index_head_dim), "'qk_rope_head_dim' exceeds a head dim"),
            (self.index_head_dim & (self.index_head_dim - 1) == 0, "'index_head_dim' must be a power of two"),
            (self.eos_token_id < self.vocab_size and self.bos_token_id < self.vocab_size, "a special token is not in the vocabulary"),
        )


_SCALARS: dict[str, type] = {
    field.name: {"int": int, "float": float}[str(field.type)]
    for field in dataclasses.fields(ModelConfig)
    if field.type in ("int", "float")
    and (field.name == "rope_theta" or not field.name.startswith("rope_"))
    and field.name not in ("num_hidden_layers", "num_nextn_predict_layers")
}
"""Keys of config.json that are read as they are."""

_MAY_BE_ZERO = ("num_hash_layers", "num_nextn_predict_layers", "bos_token_id", "eos_token_id")

KV_FORMATS = ("fp8", "bf16", "fp32")
INDEX_FORMATS = ("fp8", "fp4", "bf16", "fp32")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How the model is run; equal for prefill and decode ranks (each role adds its own sizes)."""

    device: str = "auto"
    """"cpu", "cuda", or "auto": the GPU if there is one."""
    load: str = "checkpoint"
    """"checkpoint" reads the model folder; "dummy" draws weights of the right shapes and formats from a fixed seed."""
    dummy_skew: float = 0.0
    """With load: dummy, how unequal the experts are in layers that choose them by token id (num_hash_layers of config.json): the n-th most
    popular has weight n^-dummy_skew in the draw. 0: all are alike."""
    dtype: str = "bfloat16"
    """Activations. "bfloat16": the official numerics (activation and KV quantisation included). "float32": no quantisation of
    activations, for comparison with other implementations."""
    kv_format: str = "fp8"
    """Rows of window and compressed entries: "fp8", "bf16" or "fp32"."""
    index_format: str = "fp8"
    """Index keys: "fp8" (132 B), "fp4" (68 B), "bf16" or "fp32" (no quantisation)."""
    max_model_len: int = 8192
    """Longest sequence (prompt + output), in tokens."""
    fabric_memory: bool = False
    """Pages and slots in memory that GPUs of other nodes of an NVLink domain can map (GB200, GB300 racks; needs IMEX). Without it pages
    travel between nodes over NICs or TCP."""
    threads: int = 1
    """CPU threads of one rank's compute."""
    group_start_timeout_s: float = 120.0
    """The ranks of a group must find each other within this time, and then have read their weights, and compiled the products of a prefill
    rank, within this time of each other, or the group is started again."""
    group_step_timeout_s: float = 20.0
    """A rank of a group that waits for another one for so long gives up, and the group is started again."""
    rebalance_interval_s: float = 0.0
    """How long a group works before it places its experts anew, by what each had to do since the last time, while it serves; 0 is never."""
    overlap: str = "auto"
    """Whether a decode step is launched before the tokens of the one before it are known to the host, "on" or "off". "auto": where decode
    steps are CUDA graphs. Tokens are the same; on a CPU it gains nothing, and serves tests."""
    ops: dict[str, str] = field(default_factory=dict)
    """Op name -> backend, to overrule the automatic choice; one that cannot run is an error with the reason."""

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("device", self.device, ("auto", "cpu", "cuda")),
            ("load", self.load, ("checkpoint", "dummy")),
            ("dtype", self.dtype, ("bfloat16", "float32")),
            ("kv_format", self.kv_format, KV_FORMATS),
            ("index_format", self.index_format, INDEX_FORMATS),
            ("overlap", self.overlap, ("auto", "on", "off")),
        ):
            if value not in allowed:
                raise ConfigError(f"engine.{key} is {value!r}; allowed: {', '.join(allowed)}")
        for name, backend in self.ops.items():
            if name not in OP_NAMES:
                raise ConfigError(f"engine.ops names the op {name!r}, which does not exist; allowed: {', '.join(OP_NAMES)}")
            if backend not in backends_of(name):
                raise ConfigError(f"engine.ops.{name}: unknown backend {backend!r}; allowed: {', '.join(backends_of(name))}")
        for key in ("max_model_len", "threads"):
            if getattr(self, key) < 1:
                raise ConfigError(f"engine.{key} is {getattr(self, key)}; it must be at least 1")
        for key in ("rebalance_interval_s", "dummy_skew"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"engine.{key} is {getattr(self, key)}; it must be at least 0")
        for key in ("group_start_timeout_s", "group_step_timeout_s"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"engine.{key} is {getattr(self, key)}; it must be above 0")
