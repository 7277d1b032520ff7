"""The prefill rank's engine thread: take requests, compute prompts chunk by chunk, let pages go as they finish.

Everything that happens to a job (`job.py`) happens in this thread: commands and transfer events come in through one inbox. What is
computed here is sent by `hand_offs.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from core.clock import Clock
from core.codec import encode_failure, encode_logprobs, encode_stages, encode_tokens
from core.errors import BatonError, DeadlineExceeded, Draining, InternalError, InvalidRequest, Overloaded, TransferFailed
from core.inbox import InboxThread
from core.log import get_logger
from core.request import Load, Request, Reservation, Tokens
from core.session import Outbox
from engine.batch import Chunk
from engine.failed_steps import FailedSteps
from engine.limits import check_fits
from engine.parallel.lockstep import Steps
from engine.runner import ChunkResult, Runner
from engine.scheduler.pages import PageAllocator, SlotAllocator
from engine.scheduler.prefill import PrefillPlanner
from engine.sequence import Sequence
from kv_transfer.sender import Closed, HandedOff
from kv_transfer.sending import KVSender
from prefill_worker.config import PrefillConfig
from prefill_worker.hand_offs import HandOffs
from prefill_worker.job import Job, State, check_reservation, num_prompt_pages
from prefill_worker.metrics import PrefillMetrics
from protos import prefill_pb2

log = get_logger("prefill")

IDLE_S = 0.5

CHECK_S = 1.0
"""How often an idle rank counts its pages: that takes milliseconds when there are many, and is not to be on a request's way."""

MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0
NEWEST_STEP_WEIGHT = 0.2
"""In the mean time of a token."""


class PrefillLoop:
    """Owner of the rank's jobs, pages and slots. Public methods may be called from any thread."""

    def __init__(
        self, runner: Runner, config: PrefillConfig, metrics: PrefillMetrics, steps: Steps, clock: Clock, on_death: Callable[[str], None]
    ) -> None:
        """`on_death(reason)` is called when the loop cannot go on. `steps` is the caller's to close, before `stop`."""
        self._runner, self._config, self._metrics, self._clock, self._on_death = runner, config, metrics, clock, on_death
        self._pages, self._slots = PageAllocator(len(runner.arena.pages)), SlotAllocator(config.num_slots)
        self._group_steps, self._chunk_tokens = steps, config.chunk_tokens
        self._planner = PrefillPlanner(chunk_tokens=config.chunk_tokens, max_sequences=config.num_slots)
        self._jobs: dict[str, Job] = {}
        self._hand_offs = HandOffs(metrics, self._forget)
        self._thread = InboxThread("prefill-loop", self._turn, self._died)
        self._failed_steps = FailedSteps()
        self._steps, self._tokens = 0, 0
        self._token_s = 0.0
        """Seconds a token, of the latest steps."""
        self._next_check = 0.0
        self.is_draining = False
        self.load = Load()
        """Replaced after every step; read by the sessions."""

    def start(self, sender: KVSender) -> None:
        self._hand_offs.use(sender)
        self._refresh_load()
        self._group_steps.start(lambda: self._thread.put(_wake), self._on_death)
        self._thread.start()

    def stop(self) -> None:
        """Returns when the thread has ended; jobs are dropped."""
        self._thread.end()
        self._thread.join()

    @property
    def thread(self) -> InboxThread:
        """For whoever watches that it does not stand still."""
        return self._thread

    @property
    def is_idle(self) -> bool:
        return not self._jobs

    @property
    def num_waiting(self) -> int:
        """Jobs without pages or slot."""
        return sum(job.state is State.WAITING for job in self._jobs.values())

    def run(self, request: Request, reservation: Reservation, outbox: Outbox) -> None:
        self._thread.put(lambda: self._accept(request, reservation, outbox))

    def hand_on(self, request_id: str, reservation: Reservation, outbox: Outbox) -> None:
        """Hand the request off under this reservation, in place of the one before."""
        self._thread.put(lambda: self._hand_on(request_id, reservation, outbox))

    def cancel(self, request_ids: Iterable[str], outbox: Outbox) -> None:
        self._thread.put(lambda: self._cancel(request_ids, outbox))

    def session_closed(self, outbox: Outbox) -> None:
        """Cancel everything that came over a session."""
        self._thread.put(lambda: self._drop_session(outbox))

    def transfer_event(self, event: HandedOff | Closed) -> None:
        if isinstance(event, HandedOff):
            self._thread.put(partial(self._hand_offs.handed_off, event))
        else:
            self._thread.put(partial(self._hand_offs.closed, event))

    # -- the thread ------------------------------------------------------------------------------------------------------------

    def _turn(self) -> float:
        self._expire()
        self._admit()
        computing = [job.sequence for job in self._jobs.values() if job.state is State.COMPUTING]
        remaining = sum(sequence.num_remaining for sequence in computing)
        budget = self._group_steps.agreed(min(remaining, self._chunk_tokens))
        if budget is not None:
            chunks = self._planner.plan(computing, budget)
            self._group_steps.begin(min(remaining - sum(chunk.length for chunk in chunks), self._chunk_tokens))
            self._step(chunks, budget)
        elif not self._jobs and self._clock.now() >= self._next_check:
            self._pages.check_integrity()
            self._slots.check_integrity()
            self._next_check = self._clock.now() + CHECK_S
        self._refresh_load()
        return IDLE_S if budget is None else 0.0

    def _died(self, error: Exception) -> None:
        log.exception("prefill.died", error=repr(error))
        self._on_death(repr(error))

    def _step(self, chunks: list[Chunk], budget: int) -> None:
        began = self._clock.now()
        try:
            results = self._runner.step(chunks, budget if self._group_steps.is_shared else 0)
        except Exception as error:  # a bug or a broken device: confined to the requests of this step
            if self._group_steps.is_ending:
                return
            if self._group_steps.is_shared:
                raise  # the peers are in the midst of a step that this rank cannot finish
            self._step_failed([chunk.sequence.request_id for chunk in chunks], error)
            return
        self._metrics.group_wait_seconds.set(self._group_steps.waited_s)
        if not chunks:
            self._metrics.joined_steps.inc()
            return
        num_tokens, seconds = sum(chunk.length for chunk in chunks), self._clock.now() - began
        self._steps += 1
        self._tokens += num_tokens
        self._token_s += (NEWEST_STEP_WEIGHT if self._token_s else 1.0) * (seconds / num_tokens - self._token_s)
        self._metrics.stepped(num_tokens, seconds)
        ids = ",".join(chunk.sequence.request_id for chunk in chunks)
        log.debug("prefill.step", request_ids=ids, num_tokens=num_tokens, seconds=seconds)
        for result in results:
            self._advance(self._jobs[result.sequence.request_id], result)
        self._failed_steps.ended(results)

    def _accept(self, request: Request, reservation: Reservation, outbox: Outbox) -> None:
        try:
            self._check(request, reservation)
        except BatonError as error:
            self._metrics.requests.labels("refused").inc()
            log.info("prefill.refused", request_id=request.request_id, error=f"{error.code}: {error}")
            outbox.post(prefill_pb2.PrefillUpdate(failures=[encode_failure(request.request_id, error)]))
            return
        job = Job(Sequence.from_request(request), reservation, outbox, self._clock.now())
        self._jobs[request.request_id] = job
        self._hand_offs.open(job)
        log.info("prefill.accepted", request_id=request.request_id, num_tokens=len(request.token_ids))

    def _check(self, request: Request, reservation: Reservation) -> None:
        if self.is_draining:
            raise Draining("this prefill rank is draining")
        if request.request_id in self._jobs:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", param="request_id")
        check_fits(request, self._runner.vocab_size, self._runner.max_model_len)
        num_pages = num_prompt_pages(request)
        if num_pages > self._pages.num_total:
            raise InvalidRequest(f"the prompt needs {num_pages} pages; this prefill rank has {self._pages.num_total}", param="prompt")
        check_reservation(request, reservation)
        if self.num_waiting >= self._config.max_waiting:
            tokens = sum(job.sequence.num_remaining for job in self._jobs.values() if job.is_unfinished)
            retry_after_s = min(max(tokens * self._token_s, MIN_RETRY_S), MAX_RETRY_S)
            raise Overloaded(f"{self.num_waiting} requests are waiting on this prefill rank", retry_after_s=retry_after_s)

    def _admit(self) -> None:
        """Give pages and a slot to the oldest waiting jobs, in order."""
        for job in self._jobs.values():
            if job.state is not State.WAITING:
                continue
            count = num_prompt_pages(job.sequence.request)
            if not self._slots.num_free or count > self._pages.num_free:
                return
            pages, slots = self._pages.allocate(job.request_id, count), self._slots.allocate(job.request_id, 1)
            assert pages is not None and slots is not None
            job.sequence.page_ids, job.sequence.slot_id = pages, slots[0]
            self._runner.clear_slot(slots[0])
            job.state, job.started = State.COMPUTING, self._clock.now()
            job.stages["queue"] = job.started - job.arrived

    def _advance(self, job: Job, result: ChunkResult) -> None:
        sequence = job.sequence
        if result.error is not None:
            self._drop(job, result.error)
            return
        if result.prompt_logprobs:
            found = prefill_pb2.PromptLogprobs(
                request_id=job.request_id, start=result.prompt_logprobs_start, logprobs=encode_logprobs(result.prompt_logprobs)
            )
            job.outbox.post(prefill_pb2.PrefillUpdate(prompt_logprobs=[found]))
        if result.token is None:
            self._hand_offs.push(job)
            return
        job.first_token = result.token
        job.stages["prefill"] = self._clock.now() - job.started
        if sequence.finish_reason is None:  # first of all, since other threads may begin to run when the router is told
            job.state = State.SENDING
            self._hand_offs.push(job)
        tokens = Tokens(
            request_id=job.request_id,
            token_ids=(result.token,),
            logprobs=(result.logprobs,) if result.logprobs else (),
            finish_reason=sequence.finish_reason,
        )
        first = prefill_pb2.FirstToken(tokens=encode_tokens(tokens), stages=encode_stages(job.stages))
        job.outbox.post(prefill_pb2.PrefillUpdate(first_tokens=[first]))
        for stage in ("queue", "prefill"):
            self._metrics.stage_seconds.labels(stage).observe(job.stages[stage])
        if sequence.finish_reason is not None:
            self._metrics.requests.labels("finished").inc()
            self._hand_offs.close(job)

    def _hand_on(self, request_id: str, reservation: Reservation, outbox: Outbox) -> None:
        job = self._jobs.get(request_id)
        try:
            if job is None or job.state is State.CLOSING or job.outbox is not outbox:
                raise TransferFailed(f"nothing is kept of {request_id}")
            check_reservation(job.sequence.request, reservation)
        except BatonError as error:
            outbox.post(prefill_pb2.PrefillUpdate(failures=[encode_failure(request_id, error)]))
            return
        self._hand_offs.redirect(job, reservation)

    def _forget(self, job: Job) -> None:
        log.info("prefill.done", request_id=job.request_id, **{f"{stage}_s": seconds for stage, seconds in job.stages.items()})
        del self._jobs[job.request_id]
        self._pages.free(job.request_id)
        self._slots.free(job.request_id)

    def _cancel(self, request_ids: Iterable[str], outbox: Outbox) -> None:
        for request_id in request_ids:
            job = self._jobs.get(request_id)
            if job is not None and job.outbox is outbox:
                self._drop(job, None)

    def _drop_session(self, outbox: Outbox) -> None:
        for job in [job for job in self._jobs.values() if job.outbox is outbox]:
            self._drop(job, None)

    def _drop(self, job: Job, error: BatonError | None) -> None:
        """Give a job up; the router is told unless it asked for it. Pages stay until the sender has let go of them."""
        if job.state is State.CLOSING:
            return
        self._metrics.requests.labels("cancelled" if error is None else "failed").inc()
        if error is not None:
            job.outbox.post(prefill_pb2.PrefillUpdate(failures=[encode_failure(job.request_id, error)]))
        self._hand_offs.close(job)

    def _expire(self) -> None:
        now = self._clock.now()
        for job in list(self._jobs.values()):
            limit = job.sequence.request.deadline_s
            is_kept = job.state is State.SENDING and not job.is_open
            if (is_kept or job.is_unfinished) and now - job.arrived > limit:
                self._drop(job, DeadlineExceeded(f"prefill took over {limit:g} s"))

    def _step_failed(self, request_ids: list[str], error: Exception) -> None:
        log.exception("prefill.step_failed", request_ids=",".join(request_ids))
        self._metrics.failed_steps.inc()
        for request_id in request_ids:
            self._drop(self._jobs[request_id], InternalError(f"the prefill step failed: {error!r}"))
        self._failed_steps.failed(error)

    def _refresh_load(self) -> None:
        self.load = Load(
            num_running=sum(job.state is not State.WAITING for job in self._jobs.values()),
            num_waiting=self.num_waiting,
            waiting_tokens=sum(job.sequence.num_remaining for job in self._jobs.values() if job.is_unfinished),
            pages_free=self._pages.num_free,
            pages_total=self._pages.num_total,
            slots_free=self._slots.num_free,
            slots_total=self._slots.num_total,
            transfer_bytes_total=self._hand_offs.num_bytes,
            transfer_seconds_total=self._hand_offs.seconds,
            steps_total=self._steps,
            tokens_total=self._tokens,
        )
        self._metrics.show(self.load)


def _wake() -> None:
    """An order that does nothing: the turn after it does."""
