"""The `prefill` section of the cluster file."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import ConfigError
from core.rpc import check_liveness


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillConfig:
    replicas: int = 1
    """Replicas of the role; changed live by `baton scale prefill=N`."""
    ranks_per_replica: int = 1
    """Ranks in one replica's group: each (or each attention_tp of them) has its own sequences, and the experts are spread over all."""
    attention_tp: int = 1
    """So many ranks of a group attend together: each computes some heads of the same sequences. Must divide ranks_per_replica, and the
    model's heads and output groups."""
    redundant_experts: int = 0
    """Further copies of experts in each layer of a group, for experts with much to do; rounded up so that all ranks hold as many."""
    num_pages: int = 128
    """Pages of 256 tokens on each rank: prompts being computed or being handed off. 0: as many as fit beside the rest, on a
    GPU, and no fewer than a sequence of engine.max_model_len takes."""
    num_slots: int = 8
    """Sequences on each rank at once."""
    chunk_tokens: int = 256
    """Prompt tokens computed in one step."""
    widened_layers: int = -1
    """Layers whose MXFP4 experts are kept as FP8, with equal results: twice the bytes, and no widening in each step. -1: as many as fit
    beside num_pages (0: what num_slots sequences of engine.max_model_len can fill), on a GPU; 0: none."""
    max_waiting: int = 256
    """Requests waiting on a rank for pages or a slot; more are refused as Overloaded."""
    liveness_timeout_s: float = 5.0
    """A router whose session is silent for so long is lost, and its requests are cancelled."""

    def __post_init__(self) -> None:
        for key in ("ranks_per_replica", "attention_tp", "num_slots", "chunk_tokens", "max_waiting"):
            if getattr(self, key) < 1:
                raise ConfigError(f"prefill.{key} is {getattr(self, key)}; it must be at least 1")
        for key in ("replicas", "num_pages"):
            if getattr(self, key) < 0:
                raise ConfigError(f"prefill.{key} is {getattr(self, key)}; it must be at least 0")
        if self.widened_layers < -1:
            raise ConfigError(f"prefill.widened_layers is {self.widened_layers}; it must be at least -1")
        if self.redundant_experts < 0:
            raise ConfigError(f"prefill.redundant_experts is {self.redundant_experts}; it must be at least 0")
        if self.ranks_per_replica % self.attention_tp:
            raise ConfigError(
                f"prefill.attention_tp is {self.attention_tp}; it must divide prefill.ranks_per_replica, which is {self.ranks_per_replica}"
            )
        if self.redundant_experts and self.ranks_per_replica == 1:
            raise ConfigError(
                f"prefill.redundant_experts is {self.redundant_experts}; with ranks_per_replica = 1 there is nobody to share with"
            )
        check_liveness("prefill", self.liveness_timeout_s)
