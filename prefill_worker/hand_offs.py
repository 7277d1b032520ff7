"""What the rank tells its sender, and what becomes of it: jobs on their way into the memory of decode ranks.

A hand-off is open from acceptance on, so that its handshake goes on while the prompt is computed. One that fails takes nothing with it:
the job keeps its pages and goes on, and is handed on when the router has found another decode rank.
"""

from __future__ import annotations

from collections.abc import Callable

from core.codec import encode_error, encode_stages
from core.log import get_logger
from core.request import Reservation
from kv_transfer.sender import Closed, CommitOrder, HandedOff
from kv_transfer.sending import KVSender
from prefill_worker.job import Job, State
from prefill_worker.metrics import PrefillMetrics
from protos import prefill_pb2

log = get_logger("prefill")


class HandOffs:
    """Owner of which job is open under which name. Belongs to the loop's thread."""

    def __init__(self, metrics: PrefillMetrics, free: Callable[[Job], None]) -> None:
        """`free(job)`: decode has it, or it was closed, and nothing reads its pages any more."""
        self._metrics, self._free = metrics, free
        self._open: dict[str, Job] = {}
        self.num_bytes, self.seconds = 0, 0.0
        """Of all that have succeeded."""

    def use(self, sender: KVSender) -> None:
        self._sender = sender

    def open(self, job: Job) -> None:
        """Begin to send under the job's reservation: what is final now, the rest with `push`."""
        job.is_open, job.hand_off, job.num_pushed = True, job.reservation.request_id, job.reservation.num_kept_pages
        self._open[job.hand_off] = job
        self._sender.open(job.hand_off, job.reservation)
        self.push(job)

    def push(self, job: Job) -> None:
        """Give the sender what is final and new; with the first token the commit. Nothing while the job is not open."""
        if not job.is_open:
            return
        sequence, end = job.sequence, job.num_final_pages
        if end > job.num_pushed:
            self._sender.push_pages(job.hand_off, job.num_pushed, sequence.page_ids[job.num_pushed : end])
            job.num_pushed = end
        if job.first_token is not None:
            num_tokens = len(sequence.request.token_ids)
            self._sender.commit(job.hand_off, CommitOrder(sequence.slot_id, num_tokens, job.first_token))

    def redirect(self, job: Job, reservation: Reservation) -> None:
        """Hand the job off under this reservation, in place of the one before."""
        log.info("prefill.handed_on", request_id=job.request_id, decode=reservation.decode.name, was_open=job.is_open)
        job.reservation = reservation
        if job.is_open:
            self._sender.abort(job.hand_off)  # the next one begins when nothing reads the pages any more
        else:
            self.open(job)

    def close(self, job: Job) -> None:
        """Give the job up. It is freed at once, or when the sender has let go of it."""
        job.state = State.CLOSING
        if job.is_open:
            self._sender.abort(job.hand_off)
        else:
            self._free(job)

    def handed_off(self, event: HandedOff) -> None:
        """All bytes are there; the router is told."""
        job = self._open.get(event.request_id)
        if job is None:
            return
        self.num_bytes += event.num_bytes
        self.seconds += event.seconds
        self._metrics.handed_off(event.num_bytes, event.seconds)
        log.info("prefill.handed_off", request_id=job.request_id, num_bytes=event.num_bytes, seconds=event.seconds)
        done = prefill_pb2.HandedOff(
            request_id=job.request_id,
            stages=encode_stages({"transfer": event.seconds}),
            reserved_as=event.request_id,
        )
        job.outbox.post(prefill_pb2.PrefillUpdate(handed_off=[done]))

    def closed(self, event: Closed) -> None:
        """The sender has let go: free the job, send it to where it was redirected (even if decode had just taken over: the router has
        given that one up), or keep it and tell the router."""
        job = self._open.pop(event.request_id)
        job.is_open = False
        if job.state is State.CLOSING:
            self._free(job)
        elif job.reservation.request_id != job.hand_off:
            self.open(job)
        elif event.error is None:
            self._free(job)
        else:
            self._metrics.requests.labels("hand_off_failed").inc()
            log.warning("prefill.hand_off_failed", request_id=job.request_id, error=str(event.error))
            failed = prefill_pb2.HandOffFailed(request_id=job.request_id, reserved_as=event.request_id, error=encode_error(event.error))
            job.outbox.post(prefill_pb2.PrefillUpdate(hand_offs_failed=[failed]))
