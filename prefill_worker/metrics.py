"""Prometheus metrics of a prefill rank."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from core.metrics import DURATION_BUCKETS, TTFT_BUCKETS
from core.request import Load


class PrefillMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.steps = Counter("baton_prefill_steps", "Steps run", registry=registry)
        self.failed_steps = Counter("baton_prefill_failed_steps", "Steps that raised; their requests failed", registry=registry)
        self.tokens = Counter("baton_prefill_tokens", "Prompt tokens computed", registry=registry)
        self.step_seconds = Histogram("baton_prefill_step_seconds", "Duration of a step", buckets=TTFT_BUCKETS, registry=registry)
        self.stage_seconds = Histogram(
            "baton_prefill_stage_seconds",
            "Time of a request in queue, prefill and transfer",
            ["stage"],
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self.requests = Counter("baton_prefill_requests", "Requests by outcome", ["outcome"], registry=registry)
        self.transfer_bytes = Counter("baton_prefill_transfer_bytes", "Bytes handed off to decode ranks", registry=registry)
        self.transfer_seconds = Counter("baton_prefill_transfer_seconds", "Seconds from last page to commit", registry=registry)
        self.waiting = Gauge("baton_prefill_waiting_requests", "Requests waiting for pages or a slot", registry=registry)
        self.pages_free = Gauge("baton_prefill_pages_free", "Free pages", registry=registry)
        self.slots_free = Gauge("baton_prefill_slots_free", "Free slots", registry=registry)
        self.joined_steps = Counter(
            "baton_prefill_joined_steps", "Steps taken without work of one's own, for the other ranks of the group", registry=registry
        )
        self.group_wait_seconds = Gauge(
            "baton_prefill_group_wait_seconds", "Time with work at hand that was spent waiting for peers between steps", registry=registry
        )

    def stepped(self, num_tokens: int, seconds: float) -> None:
        self.steps.inc()
        self.tokens.inc(num_tokens)
        self.step_seconds.observe(seconds)

    def handed_off(self, num_bytes: int, seconds: float) -> None:
        self.transfer_bytes.inc(num_bytes)
        self.transfer_seconds.inc(seconds)
        self.stage_seconds.labels("transfer").observe(seconds)
        self.requests.labels("handed_off").inc()

    def show(self, load: Load) -> None:
        self.waiting.set(load.num_waiting)
        self.pages_free.set(load.pages_free)
        self.slots_free.set(load.slots_free)
