"""Sequence: the state of one request inside a worker. The only mutable thing between scheduling and memory.

token_ids   [ prompt ............... | output ....... ]
              0 ....... computed ......... len
tokens [0, num_computed) have their KV state in `page_ids` and `slot_id`, or will have it when the step that is launched has ended. Then
num_computed may be as large as len: the token after is being computed, and the step that takes it in may be launched, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from core.request import FinishReason, Request


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """Compared by identity: two sequences of one request are two sequences."""

    request: Request
    token_ids: list[int]
    """Prompt and output so far; grows by one when a decode step is collected."""
    num_computed: int = 0
    page_ids: list[int] = field(default_factory=list)
    """Page i holds tokens [256 i, 256 (i + 1)). Owned by the PageAllocator's record of `request_id`."""
    slot_id: int = -1
    """-1 while it owns none."""
    finish_reason: FinishReason | None = None

    @classmethod
    def from_request(cls, request: Request) -> Sequence:
        return cls(request=request, token_ids=list(request.token_ids))

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_remaining(self) -> int:
        """Known tokens whose state is not computed yet, and is not being computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_steps_left(self) -> int:
        """Decode steps that max_tokens allows, beside those launched."""
        return self.request.prompt_len + self.request.sampling.max_tokens - 1 - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.request.prompt_len
