"""What a client asked for, in token ids: the nouns that travel between router, prefill and decode.

All values are frozen. `router` is the last place that knows text; from here on a request is a list of token ids.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

MAX_LOGIT_BIAS = 1024
"""Entries of a request's logit_bias."""


class FinishReason(enum.Enum):
    """Why a sequence ended. STOP: an end or stop token (or, set by the router, a stop string). LENGTH: max_tokens."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Validated at the router, trusted by the workers.

    The draw for the token at absolute position p (0-based index in prompt + output) depends only on (seed, p), so a
    sequence that moves to another worker continues with the same tokens.
    """

    max_tokens: int
    """Tokens to generate in total, >= 1, counted from `Request.prompt_len`."""
    temperature: float = 1.0
    """0 is greedy (lowest id wins ties); otherwise logits are divided by it."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this; (0, 1]."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this times the most likely one; [0, 1]."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that occurs in the output so far."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the output so far."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that occur in prompt or output; > 0."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, value added to its logit), at most MAX_LOGIT_BIAS of them."""
    seed: int = 0
    """64-bit; the router draws one when the client gives none."""
    ignore_eos: bool = False
    """Go on to max_tokens whatever is produced."""
    stop_token_ids: tuple[int, ...] = ()
    """Further ids that end the sequence, beside the model's end-of-sequence id."""
    num_logprobs: int | None = None
    """None: no log-probabilities. n >= 0: that of each output token, with its n most likely alternatives."""
    num_prompt_logprobs: int | None = None
    """The same for the tokens of the prompt (the first has none)."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One sequence to run.

        token_ids:   [ prompt .............. | tokens generated before a migration ]
                       0 ......... prompt_len                     len(token_ids)

    `max_tokens` and the penalties count from `prompt_len`, so that a request re-run as prompt + tokens so far ends
    exactly where the undisturbed one would have ended.
    """

    request_id: str
    """Unique per attempt: the relay gives every re-run a new one ("<public id>.<attempt>")."""
    token_ids: tuple[int, ...]
    prompt_len: int
    sampling: SamplingParams
    deadline_s: float = 600.0
    """Seconds from receipt after which a worker gives the request up with DeadlineExceeded."""

    @property
    def max_total_tokens(self) -> int:
        """Length of the sequence when max_tokens have been generated."""
        return self.prompt_len + self.sampling.max_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Log-probability (natural log, of the untempered model distribution) of one token and of the most likely ones."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Tokens of one request produced by one step. `logprobs` is empty or as long as `token_ids`."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    """Set on the last one; the end token itself is among token_ids when it was produced."""


MemberKey = tuple[str, int]
"""Name and incarnation: one life of one rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One rank of one replica, or a router process, as others address it. One that was restarted is a new member."""

    role: str
    """"prefill", "decode" or "router"."""
    replica: int
    rank: int
    """Rank inside its replica's group."""
    address: str
    """host:port of its gRPC server: sessions with routers; on decode ranks transfer sessions, on prefill ranks what receivers ask. Of a
    router: of its HTTP API. "" of a rank that computes for another one, and serves nobody."""
    incarnation: int
    """Random 63-bit number drawn at process start."""
    fingerprint: str = ""
    """KVLayout.fingerprint(): only members with equal ones may be paired."""
    max_model_len: int = 0
    """Longest sequence (prompt + output) that this rank can hold, in tokens."""
    state: str = "ready"
    """"starting", "ready" or "draining"."""
    metrics_address: str = ""
    """host:port of its Prometheus endpoint; empty when off."""

    @property
    def name(self) -> str:
        """ "prefill/0.1": replica 0, rank 1. Reused by a restarted rank."""
        return f"{self.role}/{self.replica}.{self.rank}"

    @property
    def key(self) -> MemberKey:
        """(name, incarnation): unique, one life of the rank."""
        return self.name, self.incarnation


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """Where a prefill rank may write: granted by a decode rank, valid while its lease lives.

    `epoch` is unique within the decode incarnation and is in every message about the reservation.
    """

    request_id: str
    """Under which the decode rank granted it; a hand-off to another rank is granted under another one."""
    decode: Member
    epoch: int
    page_ids: tuple[int, ...]
    """One per 256 tokens of `Request.token_ids`, in order."""
    num_kept_pages: int = 0
    """The first so many hold the state of their tokens already, from an earlier request; only the others are written."""
    slot_id: int
    lease_s: float
    """The sender renews (by any Renew message) within this many seconds or the reservation is aborted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What a rank has and does, sent with its updates: what placement knows of it beside what its own router has sent there."""

    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0
    """Prompt tokens not yet computed (prefill) or not yet received (decode)."""
    pages_free: int = 0
    pages_total: int = 0
    slots_free: int = 0
    slots_total: int = 0
    transfer_bytes_total: int = 0
    transfer_seconds_total: float = 0.0
    steps_total: int = 0
    tokens_total: int = 0
