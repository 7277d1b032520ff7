"""A rank's ties to its group: what a worker opens before it loads, and closes when it has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.clock import Clock
from engine.config import EngineConfig
from engine.parallel.group import Group, Limits, Rendezvous, Seat
from engine.parallel.lockstep import GroupSteps, SoloSteps, Steps


class Membership:
    """Of a rank in its group; a rank alone has one, too."""

    def __init__(self, group: Group | None, steps: Steps) -> None:
        self.group, self.steps = group, steps

    @staticmethod
    def open(
        seat: Seat | None,
        rendezvous: Rendezvous | None,
        engine: EngineConfig,
        most: int,
        budget_of: Callable[[Sequence[int], int], int],
        clock: Clock,
    ) -> Membership:
        """Collective, unless there is no seat. `most`: tokens that a step may have on a rank, by configuration; `budget_of(wanted, most)`
        may choose fewer. Raises GroupLost."""
        if seat is None:
            return Membership(None, SoloSteps(most))
        group = Group.join(seat, Limits(start_s=engine.group_start_timeout_s, step_s=engine.group_step_timeout_s), rendezvous)
        return Membership(group, GroupSteps(group, lambda wanted: budget_of(wanted, most), clock))

    def leave(self) -> None:
        """Take no further step; the peers are told."""
        self.steps.close()

    def close(self) -> None:
        """Close the connections, after `leave` and the last step: peers that are in the midst of a step raise GroupLost."""
        if self.group is not None:
            self.group.close()
