"""What every route needs: run sequences through the relay with admission, metrics and the request log around them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

from core.clock import Clock
from core.errors import BatonError, InternalError, InvalidRequest, NoMembers, PromptTooLong
from core.log import get_logger
from core.request import Request, SamplingParams
from router.admission import Admission
from router.config import RouterConfig
from router.metrics import RouterMetrics
from router.relay import Journey, Output, Relay
from router.tokens import TextCodec, context_length

log = get_logger("request")

T = TypeVar("T")


class Service:
    def __init__(
        self, config: RouterConfig, model: str, max_model_len: int, codec: TextCodec, relay: Relay, metrics: RouterMetrics, clock: Clock
    ) -> None:
        self.config, self.model, self.codec, self.metrics = config, model, codec, metrics
        self.max_model_len = max_model_len
        """Longest sequence; 0 while the ranks have not said."""
        self._relay, self._clock = relay, clock
        self._admission = Admission(max_requests=config.max_requests, max_waiting_tokens=config.max_waiting_tokens, clock=clock)
        self._parsers = ThreadPoolExecutor(2, "parse")

    @property
    def num_requests(self) -> int:
        """Admitted and not ended."""
        return self._admission.num_requests

    def close(self) -> None:
        self._parsers.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, parse: Callable[[], T]) -> T:
        """The result of `parse`, run in one of few threads while the event loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(self._parsers, parse)

    def longest(self) -> int:
        """Tokens of the longest sequence. Raises NoMembers while that is not known."""
        if not self.max_model_len:
            raise NoMembers("not every rank has answered since this router started: how long a sequence may be is not known yet")
        return self.max_model_len

    def check_length(self, num_prompt_tokens: int, max_tokens: int | None, param: str, max_tokens_key: str = "max_tokens") -> int:
        """Tokens that may be generated: max_tokens, or what is left of the longest sequence. `param` and `max_tokens_key`: the fields of
        prompt and max_tokens in the client's dialect. Raises InvalidRequest or PromptTooLong, and NoMembers while the longest sequence
        is not known."""
        room = self.longest() - num_prompt_tokens
        if room < 1:
            raise PromptTooLong(
                f"prompt is too long: {num_prompt_tokens} tokens; {context_length(self.max_model_len)}",
                param=param,
            )
        if max_tokens is not None and max_tokens > room:
            raise InvalidRequest(
                f"{max_tokens_key} is {max_tokens}, the prompt has {num_prompt_tokens} tokens: together more than the "
                f"{self.max_model_len} that a sequence may have",
                param=max_tokens_key,
            )
        return max_tokens or room

    def refuse_if_full(self) -> None:
        """Before a request is parsed: under load that would be most of the work of refusing it. Raises Overloaded."""
        self._admission.refuse_if_full()

    @asynccontextmanager
    async def admitted(self, num_sequences: int, num_tokens: int) -> AsyncIterator[None]:
        """Count a request in for as long as the block runs. Raises Overloaded."""
        self._admission.enter(num_sequences, num_tokens)
        began = self._clock.now()
        self.metrics.in_progress.set(self._admission.num_requests)
        try:
            yield
        finally:
            self._admission.leave(num_sequences, self._clock.now() - began)
            self.metrics.in_progress.set(self._admission.num_requests)

    def new_journey(self, public_id: str, num_prompt_tokens: int) -> Journey:
        """Of a sequence that begins now."""
        return Journey(public_id, num_prompt_tokens, self._clock.now())

    async def sequence(self, journey: Journey, token_ids: tuple[int, ...], sampling: SamplingParams) -> AsyncGenerator[Output, None]:
        """Outputs of one sequence until its finish_reason. Raises the error that ended it; closing it cancels everywhere. A reader
        that has what it wants before that sets the journey's finish_reason."""
        request = Request(
            request_id=f"{journey.request_id}.{uuid.uuid4().hex[:8]}",
            token_ids=token_ids,
            prompt_len=len(token_ids),
            sampling=sampling,
            deadline_s=self.config.request_timeout_s,
        )
        failure, is_waiting = "", True
        try:
            async with aclosing(self._relay.generate(request, journey)) as outputs:
                async for output in outputs:
                    if output.token_ids and is_waiting:
                        is_waiting = False
                        self._admission.first_token(len(token_ids), self._clock.now() - journey.began)
                    self._note_tokens(journey, len(output.token_ids))
                    journey.finish_reason = output.finish_reason
                    yield output
        except Exception as error:
            failure = error.code if isinstance(error, BatonError) else InternalError.__name__
            raise
        finally:
            if is_waiting:
                self._admission.first_token(len(token_ids), self._clock.now() - journey.began)
            self._note_end(journey, failure or ("ok" if journey.finish_reason else "cancelled"))

    def _note_tokens(self, journey: Journey, count: int) -> None:
        now = self._clock.now()
        if count and journey.first_token_at is None:
            journey.first_token_at = now
            self.metrics.ttft.observe(now - journey.began)
        elif count and journey.last_token_at is not None:
            self.metrics.itl.observe((now - journey.last_token_at) / count)
        if count:
            journey.last_token_at = now
            self.metrics.output_tokens.inc(count)

    def _note_end(self, journey: Journey, status: str) -> None:
        seconds = self._clock.now() - journey.began
        self.metrics.sequences.labels(status).inc()
        self.metrics.request_seconds.observe(seconds)
        self.metrics.prompt_tokens.inc(journey.num_prompt_tokens)
        self.metrics.migrations.inc(journey.num_migrations)
        self.metrics.hand_ons.inc(journey.hand_ons)
        self.metrics.preemptions.inc(journey.num_preemptions)
        for stage, spent in journey.stages.items():
            self.metrics.stages.labels(stage).observe(spent)
        first = journey.first_token_at
        log.info(
            "request.done",
            id=journey.request_id,
            model=self.model,
            status=status,
            finish_reason=journey.finish_reason.value if journey.finish_reason else "none",
            prompt_tokens=journey.num_prompt_tokens,
            output_tokens=journey.num_output_tokens,
            ttft_s=first - journey.began if first is not None else "none",
            seconds=seconds,
            attempts=journey.attempts,
            hand_ons=journey.hand_ons,
            preemptions=journey.num_preemptions,
            ranks=",".join(journey.ranks),
            **{f"{stage}_s": spent for stage, spent in journey.stages.items()},
        )
