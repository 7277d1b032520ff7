"""A rank's part of its group's experts: which ones are here, how to reach the others, and how much each is used."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from core.errors import ConfigError
from engine.config import ModelConfig
from engine.memory_plan import tensor_bytes
from engine.ops.expert_exchange import Arrived, ExchangeShape, ExpertExchange, Tokens
from engine.ops.registry import BoundOps
from engine.parallel.expert_placement import ExpertPlacement, SlotChoice, even_placement, imbalance
from engine.parallel.group import Group
from engine.parallel.packed import put_expert

_EXPERT = re.compile(r"(.*\.ffn)\.experts\.(\d+)\..*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharing:
    """How a group is going to use its model."""

    group: Group
    max_tokens: int
    """Most tokens of one rank in a step."""
    is_latency_bound: bool
    """Decode."""
    attention_tp: int = 1
    """Ranks that attend together."""
    num_redundant: int = 0
    """Further copies of experts in each layer, over the whole group."""


class LayerShare:
    """One layer's."""

    def __init__(self, placement: ExpertPlacement, rank: int, exchange: ExpertExchange, device: torch.device) -> None:
        self.placement, self.exchange = placement, exchange
        self.held = placement.local(rank)
        """Experts of this rank, by place."""
        self.experts: Any = None
        """The weights of `held`, as `moe_experts` has packed them: a dataclass whose tensors have experts as their first dimension."""
        self.form: Callable[[Any], Any] = lambda experts: experts
        """What an expert goes through between `pack` and a place here."""
        self.choice = SlotChoice(placement, rank, device)
        """For the tokens that this rank takes to experts."""
        self._rank = rank
        self.num_moves = 0
        """Placements since the first."""

    def dispatch(self, tokens: Tokens) -> Arrived:
        """Count what each expert gets of tokens with a position, and send all."""
        return self.exchange.dispatch(tokens, self.choice)

    def missing(self, placement: ExpertPlacement) -> dict[int, int]:
        """Place -> expert that it holds under another placement and does not hold now."""
        wanted = placement.local(self._rank)
        return {place: expert for place, expert in enumerate(wanted) if self.held[place] != expert}

    def move(self, placement: ExpertPlacement, coming: Mapping[int, Any]) -> None:
        """Put another placement in force, in place. `coming`: packed weights of what is `missing`, by place, each of one expert. All ranks
        do it between the same two steps."""
        for place, expert in coming.items():
            put_expert(self.experts, place, expert)
        self.placement, self.held = placement, placement.local(self._rank)
        self.choice.update(placement)
        self.num_moves += 1


class ExpertShare:
    """All layers'."""

    def __init__(self, layers: dict[str, LayerShare], exchange: ExpertExchange, group: Group) -> None:
        self.layers = layers
        """By the prefix of their tensors: "layers.0.ffn", and so on, then "mtp.0.ffn"."""
        self._exchange, self._group = exchange, group
        self.num_awaited = 0
        """Layers whose next placement is decided and not in force yet."""

    @staticmethod
    def open(sharing: Sharing, model: ModelConfig, ops: BoundOps, device: torch.device) -> ExpertShare:
        """Collective: all ranks, with equal arguments. Raises ConfigError if the experts do not spread so, GroupLost."""
        group, experts = sharing.group, model.n_routed_experts
        slots = -(-(experts + sharing.num_redundant) // group.size) * group.size
        if group.size > experts or slots > experts * group.size:
            raise ConfigError(f"{group.seat.name}: {experts} experts in {slots} places do not spread over {group.size} ranks")
        placement = even_placement(experts, group.size, sharing.num_redundant)
        shape = ExchangeShape(
            hidden_size=model.hidden_size,
            num_slots=slots,
            max_tokens=-(-sharing.max_tokens // sharing.attention_tp),
            is_latency_bound=sharing.is_latency_bound,
        )
        exchange: ExpertExchange = ops.expert_exchange(group, shape, ops)
        group.before_close(exchange.close)
        prefixes = [f"layers.{layer}.ffn" for layer in range(model.num_hidden_layers)]
        prefixes += [f"mtp.{index}.ffn" for index in range(model.num_nextn_predict_layers)]
        return ExpertShare({prefix: LayerShare(placement, group.rank, exchange, device) for prefix in prefixes}, exchange, group)

    def least(self, name: str, number: int) -> int:
        """Collective, for the opening of things: the least of what the ranks say."""
        return min(int(said) for said in self._group.gather_bytes(name, str(number).encode()))

    def begin_step(self, rows: int) -> None:
        """The ranks are about to take a step with so many rows at most each; 0: they have not agreed on a number."""
        self._exchange.rows = rows

    def check(self) -> None:
        """As ExpertExchange.check."""
        self._exchange.check()

    def is_wanted(self, name: str) -> bool:
        """Whether this rank needs a tensor of the checkpoint: all but other ranks' experts."""
        found = _EXPERT.fullmatch(name)
        return found is None or int(found[2]) in self.layers[found[1]].held

    def expert_bytes(self) -> int:
        """Of the largest expert held here."""
        return max(tensor_bytes(layer.experts) // len(layer.held) for layer in self.layers.values() if layer.experts is not None)

    def forget_load(self) -> None:
        """Count from now on."""
        for layer in self.layers.values():
            layer.choice.load.zero_()

    def load(self) -> torch.Tensor:
        """int64 [layers, experts] on the CPU: tokens that this rank has taken to each expert, since the start."""
        return torch.stack([layer.choice.load for layer in self.layers.values()]).cpu()

    def imbalance(self) -> list[float]:
        """Of each layer: the busiest rank's tokens over the mean, by what this rank has taken to experts. 1 is perfect."""
        counts = self.load().tolist()
        return [imbalance(one, layer.placement) if any(one) else 1.0 for one, layer in zip(counts, self.layers.values(), strict=True)]
