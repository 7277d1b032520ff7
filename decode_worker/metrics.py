"""Prometheus metrics of a decode rank."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from core.metrics import DURATION_BUCKETS, ITL_BUCKETS
from core.request import Load


class DecodeMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.steps = Counter("baton_decode_steps", "Steps run", registry=registry)
        self.failed_steps = Counter("baton_decode_failed_steps", "Steps that raised; their requests failed", registry=registry)
        self.tokens = Counter("baton_decode_tokens", "Tokens generated", registry=registry)
        self.step_seconds = Histogram("baton_decode_step_seconds", "Duration of a step", buckets=ITL_BUCKETS, registry=registry)
        self.stage_seconds = Histogram(
            "baton_decode_stage_seconds",
            "Time of a request in reserved, ready_wait and decode",
            ["stage"],
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self.requests = Counter("baton_decode_requests", "Requests by outcome", ["outcome"], registry=registry)
        self.running = Gauge("baton_decode_running_requests", "Sequences in the batch", registry=registry)
        self.quarantined = Gauge("baton_decode_quarantined_reservations", "Aborted ones that may still be written to", registry=registry)
        self.kept_pages = Counter("baton_decode_kept_pages", "Pages of prompts that needed no transfer", registry=registry)
        self.pages_free = Gauge("baton_decode_pages_free", "Free pages", registry=registry)
        self.pages_cached = Gauge("baton_decode_pages_cached", "Free pages that still hold the beginning of a prompt", registry=registry)
        self.slots_free = Gauge("baton_decode_slots_free", "Free slots", registry=registry)
        self.joined_steps = Counter(
            "baton_decode_joined_steps", "Steps taken without work of one's own, for the other ranks of the group", registry=registry
        )
        self.group_wait_seconds = Gauge(
            "baton_decode_group_wait_seconds", "Time with work at hand that was spent waiting for peers between steps", registry=registry
        )

    def stepped(self, num_tokens: int, seconds: float) -> None:
        self.steps.inc()
        self.tokens.inc(num_tokens)
        self.step_seconds.observe(seconds)

    def show(self, load: Load, num_quarantined: int, num_cached_pages: int) -> None:
        self.running.set(load.num_running)
        self.quarantined.set(num_quarantined)
        self.pages_free.set(load.pages_free)
        self.pages_cached.set(num_cached_pages)
        self.slots_free.set(load.slots_free)
