"""What the cluster should do next. Pure: events and `now` in, actions out; the controller carries them out.

    fleet.set_desired({"prefill": Desired(replicas=2, revision="a1")}, now)
    for action in fleet.decide(now): ...            # Start, Drain or Stop one replica
    fleet.ready("prefill", 0, now)                  # and so on: placed, failed, loaded, drained, gone

States of a replica (all ranks of one group rise and fall together):

    PLACING --placed--> STARTING --ready--> READY --Drain--> DRAINING --drained, deadline--> STOPPING --gone--> (removed)
       |  no room in time   |  failed, too slow  | failed        | failed
       v                    v                    v               v
    STOPPING --gone-->      '--------------------'---------------'--> FAILED -> STOPPING --gone--> BACKOFF --time--> PLACING
    GIVEN_UP --new nodes, new file--> BACKOFF

Scaling down takes first what does not work, then what does least. Scaling up and down never wait for a replica that cannot start.
A new revision replaces one replica of a role at a time, and stops at the first that does not become ready.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from deploy.config import PlacementConfig


class Phase(enum.StrEnum):
    PLACING = "placing"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    GIVEN_UP = "given up"


class After(enum.Enum):
    """What becomes of a replica when it has stopped."""

    RESTART = enum.auto()
    GIVE_UP = enum.auto()
    REMOVE = enum.auto()


@dataclass(frozen=True, slots=True)
class Desired:
    replicas: int
    revision: str


@dataclass(frozen=True, slots=True)
class Start:
    role: str
    index: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no new work and finish what there is; then `drained`."""

    role: str
    index: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End all processes of the replica and give its resources back; then `gone`."""

    role: str
    index: int


Action = Start | Drain | Stop


@dataclass(slots=True)
class Replica:
    """One replica as the fleet sees it. Written by Fleet only."""

    role: str
    index: int
    revision: str
    phase: Phase
    since: float
    """When the phase began."""
    after: After = After.RESTART
    requests: int = 0
    """Running and waiting on its ranks, as last reported; 0 until it is ready."""
    num_failures: int = 0
    """In a row."""
    num_restarts: int = 0
    retry_at: float = 0.0
    is_drained: bool = False
    is_asked_to_restart: bool = False
    note: str = ""
    """Why it is not as it should be; empty when all is well."""
    waits_for: str = ""
    """What its placement waits for, as last reported."""

    @property
    def name(self) -> str:
        return f"{self.role}/{self.index}"

    @property
    def is_leaving(self) -> bool:
        return self.after is After.REMOVE


_EXPENDABLE = (Phase.GIVEN_UP, Phase.BACKOFF, Phase.FAILED, Phase.STOPPING, Phase.PLACING, Phase.STARTING, Phase.DRAINING, Phase.READY)
"""Whom scaling down takes first."""


class Fleet:
    """Owner of every replica's state."""

    def __init__(self, config: PlacementConfig) -> None:
        self.config = config
        self.replicas: dict[tuple[str, int], Replica] = {}
        self.events: list[str] = []
        """Sentences, oldest first; whoever reads them may take them away."""
        self._desired: dict[str, Desired] = {}

    # Events

    def set_desired(self, desired: Mapping[str, Desired], now: float) -> None:
        """A new file, new counts. What was given up is tried again, and what failed under another revision as if it never had."""
        self._desired = dict(desired)
        for replica in self.replicas.values():
            if replica.role in desired and replica.revision != desired[replica.role].revision:
                replica.num_failures, replica.retry_at, replica.note = 0, now, ""
        self.nodes_changed(now)

    def nodes_changed(self, now: float) -> None:
        for replica in self.replicas.values():
            if replica.after is After.GIVE_UP:
                replica.after = After.RESTART
            if replica.phase is Phase.GIVEN_UP:
                self._enter(replica, Phase.BACKOFF, now)
                replica.retry_at = now

    def adopt(self, role: str, index: int, phase: Phase, revision: str, now: float) -> None:
        """A replica that was running before this controller."""
        self.replicas[role, index] = Replica(role, index, revision, phase, now)
        self.events.append(f"{role}/{index} adopted, {phase}")

    def placed(self, role: str, index: int, now: float) -> None:
        if (replica := self._in(role, index, Phase.PLACING)) is not None:
            self._enter(replica, Phase.STARTING, now)
            replica.note = ""

    def ready(self, role: str, index: int, now: float) -> None:
        if (replica := self._in(role, index, Phase.STARTING)) is not None:
            self._enter(replica, Phase.READY, now)
            replica.note = ""
            self.events.append(f"{replica.name} ready")

    def loaded(self, role: str, index: int, requests: int) -> None:
        if (replica := self._in(role, index, Phase.READY, Phase.DRAINING)) is not None:
            replica.requests = requests

    def placing(self, role: str, index: int, waits_for: str) -> None:
        """How far its placement is. It is given up when the time for it is over."""
        if (replica := self._in(role, index, Phase.PLACING)) is not None:
            replica.waits_for = waits_for

    def unplaced(self, role: str, index: int, why: str) -> None:
        """It takes longer than it should, and people may want to know why."""
        if (replica := self._in(role, index, Phase.PLACING)) is not None:
            replica.waits_for = replica.note = why

    def drained(self, role: str, index: int) -> None:
        if (replica := self._in(role, index, Phase.DRAINING)) is not None:
            replica.is_drained = True

    def failed(self, role: str, index: int, why: str, now: float) -> None:
        """A rank died, could not start, or does not answer. `decide` will stop the rest of the replica."""
        replica = self._in(role, index, Phase.PLACING, Phase.STARTING, Phase.READY, Phase.DRAINING)
        if replica is None:
            return
        was_stable = replica.phase in (Phase.READY, Phase.DRAINING) and now - replica.since >= self.config.stable_s
        replica.num_failures = 1 if was_stable else replica.num_failures + 1
        doublings = min(replica.num_failures - 2, 30)
        pause = min(self.config.restart_backoff_s * 2**doublings, self.config.restart_backoff_max_s) if doublings >= 0 else 0.0
        replica.retry_at = now + pause
        replica.note = why
        self.events.append(f"{replica.name} failed ({replica.num_failures} in a row): {why}")
        self._enter(replica, Phase.FAILED, now)

    def gone(self, role: str, index: int, now: float) -> None:
        replica = self._in(role, index, Phase.STOPPING)
        if replica is None:
            return
        if replica.after is After.REMOVE:
            del self.replicas[role, index]
            self.events.append(f"{replica.name} gone")
        elif replica.after is After.GIVE_UP:
            replica.after = After.RESTART
            self._enter(replica, Phase.GIVEN_UP, now)
            self.events.append(f"{replica.name} given up: {replica.note}")
        else:
            self._enter(replica, Phase.BACKOFF, now)

    def ask_restart(self, role: str, index: int) -> bool:
        """Drain this replica and start it again. False if it is not ready."""
        if (replica := self._in(role, index, Phase.READY)) is None or replica.is_leaving:
            return False
        replica.is_asked_to_restart = True
        return True

    # Decisions

    def decide(self, now: float) -> list[Action]:
        """What to do at once. Changes the phases accordingly, so each action is given out once."""
        actions: list[Action] = []
        for replica in list(self.replicas.values()):
            actions += self._time_out(replica, now)
        for role, desired in self._desired.items():
            actions += self._shrink(role, desired, now)
            actions += self._renew(role, desired, now)
            actions += self._grow(role, desired, now)
        return actions

    def is_settled(self) -> bool:
        """Everything is ready or given up, in the numbers and revisions wanted, and nothing is about to be restarted."""
        return all(
            self._kept(role) == len(self._of(role)) == desired.replicas and all(self._is_at_rest(r, desired) for r in self._of(role))
            for role, desired in self._desired.items()
        )

    def _is_at_rest(self, replica: Replica, desired: Desired) -> bool:
        if replica.phase is Phase.READY:
            return replica.revision == desired.revision and not replica.is_asked_to_restart
        return replica.phase is Phase.GIVEN_UP

    def is_quiet(self) -> bool:
        """Nothing is on its way but what has problems: waiting longer brings nothing."""
        return all(
            self._is_in_trouble(replica) or self._is_at_rest(replica, desired) or self._is_held_up(replica)
            for role, desired in self._desired.items()
            for replica in self._of(role)
        )

    def _is_held_up(self, replica: Replica) -> bool:
        """It is to be renewed when another one of its role works, which has problems."""
        others = (other for other in self._of(replica.role) if other.phase is not Phase.GIVEN_UP and not other.is_leaving)
        return replica.phase is Phase.READY and not replica.is_asked_to_restart and any(map(self._is_in_trouble, others))

    def problems(self) -> list[str]:
        """Replicas that do not come up, and why."""
        return [f"{replica.name}: {replica.note}" for replica in self.replicas.values() if self._is_in_trouble(replica)]

    def _is_in_trouble(self, replica: Replica) -> bool:
        return bool(replica.note) and (replica.num_failures > 1 or replica.phase is Phase.GIVEN_UP)

    def _time_out(self, replica: Replica, now: float) -> list[Action]:
        age, config = now - replica.since, self.config
        if replica.phase is Phase.PLACING and age >= config.placement_timeout_s:
            replica.after = After.GIVE_UP if replica.after is After.RESTART else replica.after
            replica.note = f"{replica.waits_for} (given up after placement.placement_timeout_s = {config.placement_timeout_s:g} s)"
            return self._stop(replica, now)
        if replica.phase is Phase.STARTING and age >= config.start_timeout_s:
            self.failed(replica.role, replica.index, f"not ready within {config.start_timeout_s:g} s", now)
        if replica.phase is Phase.DRAINING and (replica.is_drained or age >= config.drain_timeout_s):
            return self._stop(replica, now)
        if replica.phase is Phase.FAILED:
            return self._stop(replica, now)
        return []

    def _shrink(self, role: str, desired: Desired, now: float) -> list[Action]:
        actions: list[Action] = []
        while self._kept(role) > desired.replicas:
            staying = [replica for replica in self._of(role) if not replica.is_leaving]
            victim = min(staying, key=lambda r: (_EXPENDABLE.index(r.phase), r.requests, -r.index))
            victim.after = After.REMOVE
            if victim.phase is Phase.READY:
                self._enter(victim, Phase.DRAINING, now)
                self.events.append(f"{victim.name} draining, to be removed")
                actions.append(Drain(role, victim.index))
            elif victim.phase in (Phase.PLACING, Phase.STARTING):
                actions += self._stop(victim, now)
            elif victim.phase in (Phase.BACKOFF, Phase.GIVEN_UP):
                del self.replicas[role, victim.index]
                self.events.append(f"{victim.name} removed")
        return actions

    def _renew(self, role: str, desired: Desired, now: float) -> list[Action]:
        staying = [replica for replica in self._of(role) if not replica.is_leaving]
        for replica in staying:
            if replica.phase in (Phase.PLACING, Phase.STARTING) and replica.revision != desired.revision:
                return self._stop(replica, now)
        ready = [replica for replica in staying if replica.phase is Phase.READY]
        asked = [replica for replica in ready if replica.is_asked_to_restart]
        outdated = [replica for replica in ready if replica.revision != desired.revision]
        if not asked and any(replica.phase not in (Phase.READY, Phase.GIVEN_UP) for replica in staying):
            return []
        if not asked and not outdated:
            return []
        chosen = min(asked or outdated, key=lambda r: (r.requests, r.index))
        chosen.is_asked_to_restart = False
        self._enter(chosen, Phase.DRAINING, now)
        self.events.append(f"{chosen.name} draining, to be restarted")
        return [Drain(role, chosen.index)]

    def _grow(self, role: str, desired: Desired, now: float) -> list[Action]:
        actions: list[Action] = []
        for replica in self._of(role):
            if replica.phase is Phase.BACKOFF and now >= replica.retry_at:
                self._begin(replica, desired.revision, now)
                replica.num_restarts += 1
                actions.append(Start(role, replica.index))
        while self._kept(role) < desired.replicas:
            taken = {replica.index for replica in self._of(role)}
            index = next(i for i in range(len(taken) + 1) if i not in taken)
            replica = self.replicas[role, index] = Replica(role, index, desired.revision, Phase.BACKOFF, now)
            self._begin(replica, desired.revision, now)
            actions.append(Start(role, index))
        return actions

    def _begin(self, replica: Replica, revision: str, now: float) -> None:
        self._enter(replica, Phase.PLACING, now)
        replica.revision, replica.requests, replica.is_drained = revision, 0, False
        replica.waits_for = "its placement has not begun"
        self.events.append(f"{replica.name} starting")

    def _stop(self, replica: Replica, now: float) -> list[Action]:
        self._enter(replica, Phase.STOPPING, now)
        return [Stop(replica.role, replica.index)]

    def _enter(self, replica: Replica, phase: Phase, now: float) -> None:
        replica.phase, replica.since = phase, now

    def _of(self, role: str) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.role == role]

    def _kept(self, role: str) -> int:
        return sum(not replica.is_leaving for replica in self._of(role))

    def _in(self, role: str, index: int, *phases: Phase) -> Replica | None:
        """The replica if it is in one of these phases. Late events of a life that is over find it in another."""
        replica = self.replicas.get((role, index))
        return replica if replica is not None and replica.phase in phases else None
