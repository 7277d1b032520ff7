"""The `decode` section of the cluster file."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import ConfigError
from core.rpc import check_liveness


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    replicas: int = 1
    """Replicas of the role; changed live by `baton scale decode=N`."""
    ranks_per_replica: int = 1
    """Ranks in one replica's group: each (or each attention_tp of them) has its own sequences, and the experts are spread over all."""
    attention_tp: int = 1
    """So many ranks of a group attend together: each computes some heads of the same sequences. Must divide ranks_per_replica, and the
    model's heads and output groups."""
    redundant_experts: int = 0
    """Further copies of experts in each layer of a group, for experts with much to do; rounded up so that all ranks hold as many."""
    num_pages: int = 256
    """Pages of 256 tokens on each rank. 0: as many as fit beside the rest, on a GPU, and no fewer than a sequence of
    engine.max_model_len takes."""
    num_slots: int = 24
    """Sequences on each rank at once: running and arriving."""
    max_running: int = 16
    """Sequences in one step, each of which has a slot: no more than num_slots."""
    expected_output: float = 1.0
    """Share of max_tokens that a sequence is expected to produce, (0, 1]. Below 1 pages are overcommitted, and the youngest
    sequences are given up and run again when they run out."""
    liveness_timeout_s: float = 5.0
    """A router whose session is silent for so long is lost, and its requests are cancelled."""

    def __post_init__(self) -> None:
        for key in ("ranks_per_replica", "attention_tp", "num_slots", "max_running"):
            if getattr(self, key) < 1:
                raise ConfigError(f"decode.{key} is {getattr(self, key)}; it must be at least 1")
        for key in ("replicas", "num_pages"):
            if getattr(self, key) < 0:
                raise ConfigError(f"decode.{key} is {getattr(self, key)}; it must be at least 0")
        if self.redundant_experts < 0:
            raise ConfigError(f"decode.redundant_experts is {self.redundant_experts}; it must be at least 0")
        if self.ranks_per_replica % self.attention_tp:
            raise ConfigError(
                f"decode.attention_tp is {self.attention_tp}; it must divide decode.ranks_per_replica, which is {self.ranks_per_replica}"
            )
        if self.redundant_experts and self.ranks_per_replica == 1:
            raise ConfigError(
                f"decode.redundant_experts is {self.redundant_experts}; with ranks_per_replica = 1 there is nobody to share with"
            )
        if not 0 < self.expected_output <= 1:
            raise ConfigError(f"decode.expected_output is {self.expected_output}; it must be in (0, 1]")
        check_liveness("decode", self.liveness_timeout_s)

    @property
    def most_running(self) -> int:
        """Sequences that a step can have."""
        return min(self.max_running, self.num_slots)
