"""One request on a decode rank, and a step under way. Who may write into its pages, and who owns them, is in `reservations.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.request import Request
from core.session import Outbox
from decode_worker.reservations import Held
from engine.runner import Launched
from engine.sequence import Sequence


@dataclass(slots=True)
class Job:
    """A request that this rank has accepted, in any state of its reservation."""

    request: Request
    outbox: Outbox
    """Of the session over which it came: where everything about it is told."""
    arrived: float
    sequence: Sequence | None = None
    """Set when its pages are here."""
    ready: float = 0.0
    started: float | None = None
    """When its first step began; None before that has ended."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds by stage, those that are over."""
    is_suspect: bool = False
    """It came to nothing in a step."""

    def receive(self, held: Held, now: float) -> Sequence:
        """Its pages, slot and first token are here: the sequence that goes on from there."""
        sequence = Sequence.from_request(self.request)
        sequence.num_computed = len(sequence.token_ids)
        sequence.token_ids.append(held.first_token)
        sequence.page_ids, sequence.slot_id = list(held.page_ids), held.slot_id
        self.sequence, self.ready = sequence, now
        self.stages["reserved"] = now - self.arrived
        return sequence


@dataclass(slots=True)
class Flight:
    """A step that is launched and not collected."""

    launched: Launched
    began: float
    leaving: list[Job] = field(default_factory=list)
    """Ended since; what they hold is given free when the step has ended."""

    def holds(self, sequence: Sequence | None) -> bool:
        return any(chunk.sequence is sequence for chunk in self.launched.chunks)
