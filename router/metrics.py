"""Prometheus metrics of a router process, and gauges of the ranks as it sees them.

Each router process has its own: on the shared port whichever process takes the connection answers `/metrics`, so under a controller
each has a port of its own as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from core.metrics import DURATION_BUCKETS, ITL_BUCKETS, TTFT_BUCKETS
from core.request import Load
from router.members import Members

MAX_FIELDS = 64


class RouterMetrics:
    def __init__(self, registry: CollectorRegistry, router_name: str) -> None:
        Gauge("baton_router_info", "1 for this router process", ["router"], registry=registry).labels(router_name).set(1)
        self.requests = Counter("baton_router_requests", "HTTP requests by route and status", ["route", "status"], registry=registry)
        self.sequences = Counter(
            "baton_router_sequences",
            "Sequences that ended, by outcome: ok, cancelled, or the error's name; also of streams, which are 200 once they have begun",
            ["outcome"],
            registry=registry,
        )
        self.ttft = Histogram("baton_router_ttft_seconds", "Time to first token", buckets=TTFT_BUCKETS, registry=registry)
        self.itl = Histogram("baton_router_itl_seconds", "Time between tokens of a stream", buckets=ITL_BUCKETS, registry=registry)
        self.request_seconds = Histogram("baton_router_request_seconds", "Whole sequences", buckets=DURATION_BUCKETS, registry=registry)
        self.stages = Histogram(
            "baton_router_stage_seconds",
            "Time of a request by stage: queue, reserve, prefill, transfer, ready_wait, decode",
            ["stage"],
            buckets=TTFT_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Counter("baton_router_prompt_tokens", "Prompt tokens of sequences that ended", registry=registry)
        self.output_tokens = Counter("baton_router_output_tokens", "Tokens sent to clients", registry=registry)
        self.migrations = Counter("baton_router_migrations", "Runs repeated on other ranks", registry=registry)
        self.hand_ons = Counter("baton_router_hand_ons", "Computed prompts handed to a second decode rank", registry=registry)
        self.preemptions = Counter("baton_router_preemptions", "Runs repeated since a decode rank was out of pages", registry=registry)
        self.in_progress = Gauge("baton_router_requests_in_progress", "Sequences admitted and not ended", registry=registry)
        self.in_line = Gauge("baton_router_requests_in_line", "Requests that wait for room on the decode ranks", registry=registry)
        self._ignored = Counter("baton_router_ignored_fields", "Unknown body fields", ["field"], registry=registry)
        self._fields: set[str] = set()

    def ignore(self, fields: Iterable[str]) -> None:
        """Count unknown fields of a body. Clients choose the names, so only the first MAX_FIELDS are kept apart."""
        num_others = 0
        for field in fields:
            if len(self._fields) < MAX_FIELDS and len(field) <= 40 and field.isidentifier():
                self._fields.add(field)
            if field in self._fields:
                self._ignored.labels(field).inc()
            else:
                num_others += 1
        if num_others:
            self._ignored.labels("other").inc(num_others)


class RankCollector(Collector):
    """Collects in the thread of whoever asks: how many ranks of each role there are, and each one's last report."""

    def __init__(self, members: Members) -> None:
        self._members = members

    def collect(self) -> Iterator[Metric]:
        sessions = [session for role in ("prefill", "decode") for session in self._members.sessions(role)]
        ready = GaugeMetricFamily("baton_router_ranks_ready", "Ranks that this router sends requests to", labels=["role"])
        for role in ("prefill", "decode"):  # 0 where there is none
            ready.add_metric([role], float(len(self._members.ready(role))))
        yield ready
        up = GaugeMetricFamily("baton_rank_up", "1 if this router has a session with the rank", labels=["role", "rank"])
        for session in sessions:
            up.add_metric([session.member.role, session.member.name], float(session.is_connected))
        yield up
        for name in Load.__slots__:
            family = GaugeMetricFamily(f"baton_rank_{name.removesuffix('_total')}", f"Rank's {name}", labels=["role", "rank"])
            for session in sessions:
                family.add_metric([session.member.role, session.member.name], float(getattr(session.load, name)))
            yield family
