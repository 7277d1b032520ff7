"""One request on a prefill rank, from acceptance until nothing reads its pages any more.

    WAITING (no pages yet) -> COMPUTING -> SENDING (first token is known) -> gone when decode has taken its first step

From each of them a job that fails or is cancelled goes to CLOSING, and is gone when the sender has let go of its pages.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from core.errors import InternalError
from core.kv_layout import PAGE_TOKENS
from core.request import Request, Reservation
from core.session import Outbox
from engine.sequence import Sequence


class State(enum.Enum):
    WAITING = "waiting"
    COMPUTING = "computing"
    SENDING = "sending"
    CLOSING = "closing"
    """Failed or cancelled; its pages are still being written from."""


@dataclass(slots=True)
class Job:
    sequence: Sequence
    reservation: Reservation
    """The latest one."""
    outbox: Outbox
    """Of the session over which it came: where everything about it is told."""
    arrived: float
    state: State = State.WAITING
    started: float = 0.0
    first_token: int | None = None
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds by stage, those that are over."""
    is_open: bool = False
    """Whether the sender knows it, under `hand_off`. This and the next two belong to `HandOffs`."""
    hand_off: str = ""
    num_pushed: int = 0
    """Pages given to the sender in this hand-off, or kept by the decode rank."""

    @property
    def request_id(self) -> str:
        return self.sequence.request_id

    @property
    def is_unfinished(self) -> bool:
        """Its first token is yet to come."""
        return self.state in (State.WAITING, State.COMPUTING)

    @property
    def num_final_pages(self) -> int:
        """Pages that will not change any more: the whole ones, and all with the first token."""
        if self.first_token is not None:
            return len(self.sequence.page_ids)
        return self.sequence.num_computed // PAGE_TOKENS


def num_prompt_pages(request: Request) -> int:
    return -(-len(request.token_ids) // PAGE_TOKENS)


def check_reservation(request: Request, reservation: Reservation) -> None:
    """Raises InternalError if the decode rank has reserved another number of pages than the prompt has."""
    num_pages = num_prompt_pages(request)
    if len(reservation.page_ids) != num_pages:
        raise InternalError(f"{len(reservation.page_ids)} pages are reserved, the prompt has {num_pages}")
