"""RankEngine: what a rank runs. Its ties to the group of its replica, its model, and the thread that moves experts.

engine = RankEngine.join(work, seat, rendezvous, config, clock)     # collective, in a group
runner = engine.load(folder, registry, on_death)
engine.start()          # when the loop runs
engine.leave()          # before the loop ends: take no further step; the peers are told
engine.close()          # after it, or in place of both: peers that are in the midst of a step raise GroupLost
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from core.clock import Clock
from core.errors import ConfigError, GroupLost
from engine.config import EngineConfig
from engine.engine import LoadedModel
from engine.following import Following, LeadingRunner
from engine.parallel.experts import Sharing
from engine.parallel.group import Group, Limits, Rendezvous, Seat
from engine.parallel.lockstep import GroupSteps, SoloSteps, Steps
from engine.parallel.metrics import ExpertLoadCollector
from engine.parallel.rebalance import Rebalancer, new_rebalancer
from engine.runner import Runner


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a role asks of its engine."""

    role: str
    ranks_per_replica: int
    attention_tp: int
    redundant_experts: int
    max_tokens: int
    """Most tokens of a rank in a step."""
    budget_of: Callable[[Sequence[int], int], int]
    """(tokens that each rank of the group wants, max_tokens) -> the most that each may take in the next step."""
    is_latency_bound: bool
    new_runner: Callable[[LoadedModel], Runner]


class RankEngine:
    def __init__(self, work: Work, config: EngineConfig, group: Group | None, steps: Steps) -> None:
        self.steps = steps
        self._work, self._config, self._group = work, config, group
        self._rebalancer: Rebalancer | None = None
        self.following: Following | None = None
        """Once loaded, on a rank that computes heads for another one: what it does in place of a role's work."""

    @staticmethod
    def join(work: Work, seat: Seat | None, rendezvous: Rendezvous | None, config: EngineConfig, clock: Clock) -> RankEngine:
        """`seat`: in the group, if the replica has several ranks; rank 0 brings the `rendezvous`. Raises GroupLost, or ConfigError for a
        rank of a group that has no seat."""
        if (seat is None) != (work.ranks_per_replica == 1):
            ranks = work.ranks_per_replica
            raise ConfigError(f"{work.role}.ranks_per_replica is {ranks}; a group is started by the controller (`baton up`)")
        if seat is None:
            return RankEngine(work, config, None, SoloSteps(work.max_tokens))
        group = Group.join(seat, Limits(start_s=config.group_start_timeout_s, step_s=config.group_step_timeout_s), rendezvous)
        try:
            leading = slice(None, None, work.attention_tp)  # the others want nothing of their own
            steps = GroupSteps(group, lambda wanted: work.budget_of(wanted[leading], work.max_tokens), clock)
            return RankEngine(work, config, group, steps)
        except GroupLost:
            group.close()
            raise

    def load(self, folder: pathlib.Path, registry: CollectorRegistry, on_death: Callable[[str], None]) -> Runner:
        """Read the model, and take memory for its caches. `on_death(reason)`: the rank cannot go on. Raises CheckpointError, ConfigError
        or GroupLost."""
        work, group = self._work, self._group
        sharing = None
        if group is not None:
            sharing = Sharing(
                group=group,
                max_tokens=work.max_tokens,
                is_latency_bound=work.is_latency_bound,
                attention_tp=work.attention_tp,
                num_redundant=work.redundant_experts,
            )
        loaded = LoadedModel.load(folder, self._config, sharing)
        if group is not None:
            group.gather_bytes("weights", b"-")  # some read longer than others, and the first step waits for a step's time only
        runner = work.new_runner(loaded)
        if loaded.share is not None:
            loaded.share.forget_load()  # of steps that were run to measure memory
            registry.register(ExpertLoadCollector(work.role, loaded.share))
        if group is not None:
            assert isinstance(self.steps, GroupSteps), f"{self.steps}"
            self._rebalancer = new_rebalancer(loaded, group, self.steps, on_death)
        if loaded.heads is None:
            return runner
        if loaded.heads.rank:
            self.following = Following(runner, loaded.heads)
            return runner
        return LeadingRunner(runner, loaded.heads)

    def start(self) -> None:
        if self._rebalancer is not None:
            self._rebalancer.start()

    def leave(self) -> None:
        if self._rebalancer is not None:
            self._rebalancer.close()
        self.steps.close()

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
