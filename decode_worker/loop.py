"""The decode rank's engine thread: grant reservations, take in what has arrived, step, publish tokens.

Everything that happens to a request happens in this thread: commands and transfer events come in through one inbox.

    device     | step n       | step n + 1        | step n + 2
    host            launch n + 1   tokens of n, orders, launch n + 2   tokens of n + 1, ...

Where the runner may, a step is launched before the tokens of the one before it are known. A sequence that those tokens end, or that is
cancelled meanwhile, is in it for nothing: its row is dropped, and its pages and slot are given free when the step has ended. One that
is certain to end, by max_tokens, is not launched again; and nobody is preempted while a step is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from core.clock import Clock
from core.codec import encode_failure, encode_reservation, encode_stages, encode_tokens
from core.errors import BatonError, Draining, InternalError, Preempted, TransferFailed
from core.inbox import InboxThread
from core.log import get_logger
from core.request import Load, Member, Request, Reservation, Tokens
from core.session import Outbox
from decode_worker.config import DecodeConfig
from decode_worker.job import Flight, Job
from decode_worker.metrics import DecodeMetrics
from decode_worker.reservations import Reservations
from engine.batch import Chunk
from engine.failed_steps import FailedSteps
from engine.limits import check_fits
from engine.parallel.lockstep import Steps
from engine.runner import ChunkResult, Runner
from engine.scheduler.decode import DecodePlanner
from engine.sequence import Sequence
from kv_transfer.receiver import Committed, Quiesced, Renewed, SenderLost
from kv_transfer.receiving import Event, KVReceiver
from protos import decode_pb2

log = get_logger("decode")

IDLE_S = 0.25

CHECK_S = 1.0
"""How often an idle rank counts its pages: that takes milliseconds when there are many, and is not to be on a request's way."""


class DecodeLoop:
    """Owner of the rank's jobs and reservations. Public methods may be called from any thread."""

    def __init__(
        self,
        runner: Runner,
        config: DecodeConfig,
        lease_s: float,
        metrics: DecodeMetrics,
        member: Member,
        steps: Steps,
        clock: Clock,
        on_death: Callable[[str], None],
    ) -> None:
        """`on_death(reason)` is called when the loop cannot go on. `steps` is the caller's to close, before `stop`."""
        self._runner, self._metrics, self._member, self._clock, self._on_death = runner, metrics, member, clock, on_death
        self._lease_s, self._group_steps, self._max_running = lease_s, steps, config.most_running
        self._reservations = Reservations(
            num_pages=len(runner.arena.pages), num_slots=config.num_slots, lease_s=lease_s, expected_output=config.expected_output
        )
        self._planner = DecodePlanner(max_running=config.most_running)
        self._jobs: dict[str, Job] = {}
        self._running: dict[str, Sequence] = {}
        """In the order in which they became ready."""
        self._thread = InboxThread("decode-loop", self._turn, self._died)
        self._flight: Flight | None = None
        """The newest."""
        self._last_collected = 0.0
        self._failed_steps, self._steps, self._tokens = FailedSteps(), 0, 0
        self._next_check = 0.0
        self.is_draining = False
        self.load = Load()
        """Replaced after every step and with every grant; read by the sessions."""

    def start(self, receiver: KVReceiver) -> None:
        self._receiver = receiver
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
        return not self._jobs and self._flight is None and not self._reservations.num_quarantined

    def reserve(self, request: Request, outbox: Outbox) -> None:
        self._thread.put(lambda: self._reserve(request, outbox))

    def cancel(self, request_ids: Iterable[str], outbox: Outbox) -> None:
        self._thread.put(lambda: self._cancel(request_ids, outbox))

    def session_closed(self, outbox: Outbox) -> None:
        """Cancel everything that came over a session."""

        def closed() -> None:
            for request_id in [name for name, job in self._jobs.items() if job.outbox is outbox]:
                self._end(request_id, "cancelled")

        self._thread.put(closed)

    def transfer_event(self, event: Event) -> None:
        self._thread.put(lambda: self._transfer_event(event))

    # -- the thread ------------------------------------------------------------------------------------------------------------

    def _turn(self) -> float:
        self._expire()
        is_idle = False
        budget = self._group_steps.agreed(self._num_wanted(), is_computing=self._flight is not None)
        if budget is not None:
            self._step(budget)
        elif self._flight is not None:
            self._collect()
        else:
            is_idle = True
            if not self._running and self._clock.now() >= self._next_check:
                self._reservations.check_integrity()
                self._next_check = self._clock.now() + CHECK_S
        self._refresh_load()
        return IDLE_S if is_idle else 0.0

    def _num_wanted(self, num_ending: int = 0) -> int:
        """Sequences for a step; `num_ending`: so many fewer."""
        return min(sum(sequence.num_steps_left > 0 for sequence in self._running.values()) - num_ending, self._max_running)

    def _died(self, error: Exception) -> None:
        log.exception("decode.died", error=repr(error))
        self._on_death(repr(error))

    def _reserve(self, request: Request, outbox: Outbox) -> None:
        now = self._clock.now()
        try:
            if self.is_draining:
                raise Draining("this decode rank is draining")
            check_fits(request, self._runner.vocab_size, self._runner.max_model_len)
            held = self._reservations.reserve(request, now)
        except BatonError as error:
            self._metrics.requests.labels("refused").inc()
            log.debug("decode.refused", request_id=request.request_id, error=f"{error.code}: {error}")  # often, while all is full
            outbox.post(decode_pb2.DecodeUpdate(failures=[encode_failure(request.request_id, error)]))
            return
        self._jobs[request.request_id] = Job(request, outbox, now)
        missing = held.page_ids[held.num_kept_pages :]
        self._receiver.expect(held.epoch, request.request_id, missing, held.slot_id, len(request.token_ids))
        grant = Reservation(
            request_id=request.request_id,
            decode=self._member,
            epoch=held.epoch,
            page_ids=held.page_ids,
            num_kept_pages=held.num_kept_pages,
            slot_id=held.slot_id,
            lease_s=self._lease_s,
        )
        self.load = self._load()  # goes with the grant, and counts it
        reserved = decode_pb2.Reserved(request_id=request.request_id, reservation=encode_reservation(grant))
        outbox.post(decode_pb2.DecodeUpdate(reserved=[reserved]))
        self._metrics.kept_pages.inc(held.num_kept_pages)
        log.info(
            "decode.accepted",
            request_id=request.request_id,
            epoch=held.epoch,
            num_pages=len(held.page_ids),
            num_kept_pages=held.num_kept_pages,
        )

    def _transfer_event(self, event: Event) -> None:
        if isinstance(event, Renewed):
            self._reservations.renewed(event.epoch, self._clock.now())
        elif isinstance(event, Quiesced):
            self._reservations.quiesced(event.epoch)
        elif isinstance(event, SenderLost):
            held = self._reservations.of_epoch(event.epoch)
            if held is not None:
                self._fail(held.request.request_id, TransferFailed(event.reason))
        elif isinstance(event, Committed):
            held = self._reservations.committed(event.epoch, event.first_token)
            if held is None:
                self._receiver.revoke(event.epoch)
                return
            self._runner.arrived(held.page_ids[held.num_kept_pages :], held.slot_id)
            sequence = self._jobs[held.request.request_id].receive(held, self._clock.now())
            self._running[sequence.request_id] = sequence

    def _step(self, budget: int) -> None:
        """Launch a step, then collect the one before it; or that one first, where its pages or tokens are needed."""
        if self._flight is not None and not self._planner.has_room(list(self._running.values()), self._reservations.pages, budget):
            self._collect()
        plan = self._planner.plan(list(self._running.values()), self._reservations.pages, budget)
        for sequence in plan.preempted:
            self._preempt(sequence.request_id)
        ending = sum(chunk.sequence.num_steps_left == 1 for chunk in plan.chunks)
        self._group_steps.begin(self._num_wanted(ending))
        if not plan.chunks and not self._group_steps.is_shared:
            return
        began = self._clock.now()
        try:
            launched = self._runner.launch(plan.chunks, budget if self._group_steps.is_shared else 0)
        except Exception as error:
            self._step_failed(plan.chunks, error)
            return
        before, self._flight = self._flight, Flight(launched, began)
        if before is not None:
            self._take_in(before)
        if not self._runner.may_lead(launched):
            self._collect()

    def _collect(self) -> None:
        """The newest step, and there is no other."""
        assert self._flight is not None
        flight, self._flight = self._flight, None
        self._take_in(flight)

    def _take_in(self, flight: Flight) -> None:
        results: list[ChunkResult] | None = None
        try:
            results = self._runner.collect(flight.launched)
        except Exception as error:
            self._step_failed(flight.launched.chunks, error)
        now = self._clock.now()
        seconds, self._last_collected = now - max(flight.began, self._last_collected), now
        for job in flight.leaving:
            self._give_back(job)
        if results is None:
            return
        self._metrics.group_wait_seconds.set(self._group_steps.waited_s)
        if not flight.launched.chunks:
            self._metrics.joined_steps.inc()
            return
        alive = [(found, result) for result in results if (found := self._job_of(result.sequence)) is not None]
        num_tokens = sum(result.error is None for _, result in alive)
        self._steps += 1
        self._tokens += num_tokens
        self._metrics.stepped(num_tokens, seconds)
        updates: dict[Outbox, decode_pb2.DecodeUpdate] = {}
        for job, result in alive:
            if result.error is None:
                self._advance(job, result, flight.began, updates)
            else:
                self._fail(result.sequence.request_id, result.error)
        for outbox, update in updates.items():
            outbox.post(update)
        self._failed_steps.ended([result for _, result in alive])

    def _job_of(self, sequence: Sequence) -> Job | None:
        """None if it has ended, and perhaps begun anew as another sequence."""
        job = self._jobs.get(sequence.request_id)
        return job if job is not None and job.sequence is sequence else None

    def _step_failed(self, chunks: list[Chunk], error: Exception) -> None:
        """A bug or a broken device: confined to the requests of this step."""
        if self._group_steps.is_ending:
            return
        if self._group_steps.is_shared:
            raise error  # the peers are in the midst of a step that this rank cannot finish
        log.exception("decode.step_failed", num_requests=len(chunks))
        self._metrics.failed_steps.inc()
        for chunk in chunks:
            if self._job_of(chunk.sequence) is not None:
                self._fail(chunk.sequence.request_id, InternalError(f"the decode step failed: {error!r}"))
        self._failed_steps.failed(error)

    def _advance(self, job: Job, result: ChunkResult, began: float, updates: dict[Outbox, decode_pb2.DecodeUpdate]) -> None:
        sequence = result.sequence
        if job.started is None:
            held = self._reservations.get(sequence.request_id)
            assert held is not None and result.token is not None
            job.started = began
            job.stages["ready_wait"] = began - job.ready
            self._reservations.started(sequence.request_id)
            self._receiver.release(held.epoch)
            log.debug("decode.started", request_id=sequence.request_id, seconds=self._clock.now() - began)
        update = updates.setdefault(job.outbox, decode_pb2.DecodeUpdate())
        tokens = Tokens(
            request_id=sequence.request_id,
            token_ids=(sequence.token_ids[-1],),
            logprobs=(result.logprobs,) if result.logprobs else (),
            finish_reason=sequence.finish_reason,
        )
        update.tokens.append(encode_tokens(tokens))
        if sequence.finish_reason is not None:
            job.stages["decode"] = self._clock.now() - job.started
            for stage, seconds in job.stages.items():
                self._metrics.stage_seconds.labels(stage).observe(seconds)
            update.finished.append(decode_pb2.Finished(request_id=sequence.request_id, stages=encode_stages(job.stages)))
            self._end(sequence.request_id, "finished")

    def _fail(self, request_id: str, error: BatonError) -> None:
        job = self._jobs.get(request_id)
        if job is not None:
            log.warning("decode.failed", request_id=request_id, error=str(error))
            job.is_suspect = isinstance(error, InternalError)
            job.outbox.post(decode_pb2.DecodeUpdate(failures=[encode_failure(request_id, error)]))
            self._end(request_id, "failed")

    def _preempt(self, request_id: str) -> None:
        """The planner has taken its pages; the router runs it again."""
        error = Preempted("the decode rank ran out of pages")
        self._jobs[request_id].outbox.post(decode_pb2.DecodeUpdate(failures=[encode_failure(request_id, error)]))
        self._end(request_id, "preempted")

    def _cancel(self, request_ids: Iterable[str], outbox: Outbox) -> None:
        for request_id in request_ids:
            job = self._jobs.get(request_id)
            if job is not None and job.outbox is outbox:
                self._end(request_id, "cancelled")

    def _end(self, request_id: str, outcome: str) -> None:
        """The one way out, from any state: pages back at once, or after the step under way, or after quarantine."""
        job = self._jobs.pop(request_id)
        self._metrics.requests.labels(outcome).inc()
        stages = {f"{stage}_s": seconds for stage, seconds in job.stages.items()}
        log.info("decode.done", request_id=request_id, outcome=outcome, **stages)
        self._running.pop(request_id, None)
        if self._flight is not None and self._flight.holds(job.sequence):
            self._flight.leaving.append(job)
        else:
            self._give_back(job)

    def _give_back(self, job: Job) -> None:
        held = self._reservations.end(job.request.request_id, is_suspect=job.is_suspect)
        assert held is not None, f"{job.request.request_id} had a job and no reservation"
        if job.started is None:
            self._receiver.revoke(held.epoch)

    def _expire(self) -> None:
        for expired in self._reservations.expired(self._clock.now()):
            self._fail(expired.held.request.request_id, expired.error)

    def _refresh_load(self) -> None:
        self.load = self._load()
        self._metrics.show(self.load, self._reservations.num_quarantined, self._reservations.pages.num_kept)

    def _load(self) -> Load:
        reservations = self._reservations
        return Load(
            num_running=len(self._running),
            num_waiting=len(self._jobs) - len(self._running),
            waiting_tokens=reservations.waiting_tokens,
            pages_free=reservations.pages.num_free,
            pages_total=reservations.pages.num_total,
            slots_free=reservations.slots.num_free,
            slots_total=reservations.slots.num_total,
            steps_total=self._steps,
            tokens_total=self._tokens,
        )


def _wake() -> None:
    """An order that does nothing: the turn after it does."""
