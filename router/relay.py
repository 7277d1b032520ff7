"""THE HEART: one request from reservation to last token, over as many ranks as it takes.

    place -> reserve (decode) -> run (prefill) -> first token -> tokens of decode -> finished
      ^                                                                  |
      '------ a retryable failure: again as prompt + tokens so far ------'

A decode rank that fails before its first step costs a transfer, not a prefill: the prefill rank has kept what it computed, and hands it
to another one (`_hand_on`).

Retries live here and nowhere else. Sampling depends on (seed, position) only, so a client sees a pause, never other text. Whatever
ends an attempt early, both ranks are told to cancel.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from core.clock import Clock
from core.errors import BatonError, DeadlineExceeded, MemberLost, Overloaded, Preempted, TransferFailed
from core.log import get_logger
from core.request import FinishReason, MemberKey, Request, TokenLogprobs
from router.config import RouterConfig
from router.members import Members
from router.reserving import Events, Reserver, into
from router.session import Decoded, Event, Failed, Finished, FirstToken, HandedOff, HandOffFailed, PromptScored, RankSession

log = get_logger("relay")

RETRY_S = 0.05
"""Pause before the next attempt, doubled up to a second."""


@dataclass(frozen=True, slots=True)
class Output:
    """A piece of a request's result."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of prompt tokens from `prompt_start` on."""
    prompt_start: int = 0
    finish_reason: FinishReason | None = None

    def scored_after(self, num_scored: int) -> Output:
        """Its log-probabilities but those of the prompt's first so many scored tokens (from token 1 on: the first has none)."""
        start = max(self.prompt_start, num_scored + 1)
        return Output(prompt_logprobs=self.prompt_logprobs[start - self.prompt_start :], prompt_start=start)


@dataclass(slots=True)
class Journey:
    """What happened to one request, for its log line and the metrics."""

    request_id: str
    num_prompt_tokens: int
    began: float
    attempts: int = 0
    """Reservations that were asked for: for runs, and for hand-ons of what a run had computed."""
    num_runs: int = 0
    """Those that a rank was then told to work for; `max_attempts` bounds them."""
    hand_ons: int = 0
    num_preemptions: int = 0
    """Runs that a decode rank gave up for want of pages."""
    ranks: list[str] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    num_output_tokens: int = 0
    first_token_at: float | None = None
    last_token_at: float | None = None
    finish_reason: FinishReason | None = None
    """What the client is told: the ranks' reason, or STOP where the reader cut the text at a stop string."""

    @property
    def num_migrations(self) -> int:
        """Runs repeated on other ranks."""
        return max(self.num_runs - 1 - self.hand_ons - self.num_preemptions, 0)

    def may_run_again(self, max_attempts: int) -> bool:
        """Being given up for want of pages is no failure, and counts for nothing."""
        return self.num_runs - self.num_preemptions < max_attempts

    def add(self, stages: dict[str, float]) -> None:
        """Seconds by stage."""
        for stage, seconds in stages.items():
            self.stages[stage] = self.stages.get(stage, 0.0) + seconds


@dataclass(slots=True)
class _Run:
    """One prompt on one prefill rank, and the decode rank that it is meant for."""

    request: Request
    prefill: RankSession
    decode: RankSession
    reserved_as: str
    """What the decode rank knows the request as."""
    has_landed: bool = False
    """Everything is in the decode rank's memory."""
    has_decoded: bool = False
    is_kept: bool = False
    """The prefill rank could not tell whether decode took over."""
    is_handed_on: bool = False

    def is_stale(self, name: str, event: Event) -> bool:
        """Whether it is about a reservation that was given up. `name`: what the rank that told it knows the request as."""
        if isinstance(event, (HandedOff, HandOffFailed)):
            return event.reserved_as != self.reserved_as
        is_of_decode = isinstance(event, (Decoded, Finished)) or (isinstance(event, Failed) and event.role == "decode")
        return is_of_decode and name != self.reserved_as

    def leave(self, session: RankSession) -> None:
        name = self.reserved_as if session is self.decode else self.request.request_id
        session.forget(name)
        session.cancel(name)


class Relay:
    def __init__(self, members: Members, config: RouterConfig, clock: Clock) -> None:
        self._config, self._clock = config, clock
        self._reserver = Reserver(members, config, clock)

    @property
    def num_in_line(self) -> int:
        """Requests that wait for room on the decode ranks."""
        return len(self._reserver.line)

    async def generate(self, request: Request, journey: Journey) -> AsyncGenerator[Output, None]:
        """Yield the outputs of a request until one carries a finish_reason. Raises the error that ended it, if it cannot be mended.
        Closing the generator cancels the request everywhere."""
        produced: list[int] = []
        num_scored = 0  # prompt tokens whose log-probabilities the client has: another run scores them again
        avoid: list[MemberKey] = []
        pause = RETRY_S
        arrived = journey.began
        deadline = journey.began + self._config.request_timeout_s
        while True:
            journey.attempts += 1
            attempt = dataclasses.replace(
                request,
                request_id=f"{request.request_id}.{journey.attempts}",
                token_ids=request.token_ids + tuple(produced),
                deadline_s=max(deadline - self._clock.now(), 0.001),
            )
            try:
                async with aclosing(self._attempt(attempt, journey, avoid, arrived, deadline)) as outputs:
                    async for output in outputs:
                        if output.prompt_logprobs:
                            output = output.scored_after(num_scored)
                            num_scored += len(output.prompt_logprobs)
                        produced += output.token_ids
                        journey.num_output_tokens = len(produced)
                        yield output
                        if output.finish_reason is not None:
                            return
            except Preempted:  # the rank is well; what was given up waits for room behind the others
                if self._clock.now() > deadline:
                    raise
                journey.num_preemptions += 1
                arrived = self._clock.now()
                log.info("relay.preempted", request_id=attempt.request_id, num_tokens=len(produced))
            except BatonError as error:
                has_to_wait = isinstance(error, Overloaded) and bool(produced)  # for the prefill rank; without tokens the client comes back
                if has_to_wait:
                    journey.num_runs -= 1
                may_go_on = (error.retryable or has_to_wait) and journey.may_run_again(self._config.max_attempts)
                if not may_go_on or self._clock.now() > deadline:
                    raise
                log.warning("relay.retried", request_id=attempt.request_id, num_tokens=len(produced), error=f"{error.code}: {error}")
                await asyncio.sleep(pause)
                pause = min(2 * pause, 1.0)

    async def _attempt(
        self, request: Request, journey: Journey, avoid: list[MemberKey], arrived: float, deadline: float
    ) -> AsyncGenerator[Output, None]:
        """One prompt on one prefill rank, handed to a decode rank, or to a second one."""
        events: Events = asyncio.Queue()
        began = self._clock.now()
        prefill, decode, reservation = await self._reserver.reserve(request, events, avoid, arrived, deadline)
        journey.add({"reserve": self._clock.now() - began})
        journey.ranks += [prefill.member.name, decode.member.name]
        run = _Run(request, prefill, decode, request.request_id)
        left_s = max(deadline - self._clock.now(), 0.0)
        alarm = asyncio.get_running_loop().call_later(left_s, events.put_nowait, ("", None))  # a timeout around each read costs more
        try:
            prefill.listen(request.request_id, len(request.token_ids), into(events, request.request_id))
            prefill.run(request, reservation)
            journey.num_runs += 1
            held: list[Output] = []  # decode's tokens may overtake the first one: they come over another stream
            has_first = False
            while True:
                name, event = await events.get()
                if event is None:
                    raise DeadlineExceeded(f"the request took over {self._config.request_timeout_s:g} s")
                if run.is_stale(name, event):
                    continue
                if isinstance(event, PromptScored):
                    yield Output(prompt_logprobs=event.logprobs, prompt_start=event.start)
                elif isinstance(event, FirstToken):
                    journey.add(event.stages)
                    has_first = True
                    held.insert(0, _output(event))
                elif isinstance(event, Decoded):
                    run.has_landed = run.has_decoded = True
                    held.append(_output(event))
                elif isinstance(event, (HandedOff, Finished)):
                    run.has_landed = True
                    journey.add(event.stages)
                elif isinstance(event, HandOffFailed):
                    run.is_kept = True
                    if not run.has_landed:
                        await self._hand_on(run, events, journey, avoid, deadline, event.error)
                elif isinstance(event, Failed) and event.role == "decode":
                    await self._hand_on(run, events, journey, avoid, deadline, event.error)
                elif isinstance(event, Failed):
                    if run.has_landed and has_first:
                        continue  # its part is done
                    avoid.append(prefill.member.key)
                    raise event.error
                if run.has_decoded and run.is_kept:
                    run.is_kept = False
                    prefill.cancel(request.request_id)
                if has_first:
                    for output in held:
                        if output.finish_reason is not None and run.has_decoded:
                            self._reserver.note_end(request, run.decode)
                        yield output
                        if output.finish_reason is not None:
                            return
                    held.clear()
        finally:
            alarm.cancel()
            run.leave(run.prefill)
            run.leave(run.decode)

    async def _hand_on(
        self, run: _Run, events: Events, journey: Journey, avoid: list[MemberKey], deadline: float, error: BatonError
    ) -> None:
        """Have the prefill rank hand what it keeps to another decode rank. Raises `error` if that cannot be: decode has taken over
        already, it is not the rank that failed, or a second rank could not be reached either."""
        if isinstance(error, Preempted):
            raise error
        avoid.append(run.decode.member.key)
        if run.is_handed_on:
            avoid.append(run.prefill.member.key)
        is_too_late = run.has_decoded or run.is_handed_on or not journey.may_run_again(self._config.max_attempts)
        if is_too_late or not isinstance(error, (MemberLost, TransferFailed)):
            raise error
        run.leave(run.decode)
        journey.attempts += 1
        base = run.request.request_id.rpartition(".")[0]
        request = dataclasses.replace(
            run.request, request_id=f"{base}.{journey.attempts}", deadline_s=max(deadline - self._clock.now(), 0.001)
        )
        try:
            _, run.decode, reservation = await self._reserver.reserve(request, events, avoid, journey.began, deadline, run.prefill)
            run.reserved_as = request.request_id
            run.prefill.hand_on(run.request.request_id, reservation)
            journey.num_runs += 1
        except BatonError as failure:
            raise error from failure
        run.is_handed_on, run.has_landed, run.is_kept = True, False, False
        journey.hand_ons += 1
        journey.ranks.append(run.decode.member.name)
        log.warning("relay.handed_on", request_id=request.request_id, decode=run.decode.member.name, error=f"{error.code}: {error}")


def _output(event: FirstToken | Decoded) -> Output:
    tokens = event.tokens
    return Output(token_ids=tokens.token_ids, logprobs=tokens.logprobs, finish_reason=tokens.finish_reason)
