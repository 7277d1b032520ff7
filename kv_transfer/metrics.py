"""Prometheus metrics of both ends. Bytes and seconds of finished hand-offs are the prefill rank's (`baton_prefill_transfer_*`)."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class SenderMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.open_hand_offs = Gauge("baton_transfer_open_hand_offs", "Hand-offs opened and not released by decode", registry=registry)
        self.bytes_in_flight = Gauge("baton_transfer_in_flight_bytes", "Posted and not yet out", registry=registry)
        self.written = Counter("baton_transfer_written_bytes", "Posted, failed hand-offs included", registry=registry)
        self.failures = Counter("baton_transfer_failed_hand_offs", "Hand-offs that failed, by error", ["error"], registry=registry)
        self.links = Gauge(
            "baton_transfer_link", "1 for each decode rank written to, with what that travels over", ["peer", "path"], registry=registry
        )
        self.slow_links = Gauge("baton_transfer_slow_links", "Decode ranks written to more slowly than expected", registry=registry)
        self.peers_lost = Counter("baton_transfer_peers_lost", "Links to decode ranks that were given up", registry=registry)
        self.resets = Counter("baton_transfer_resets", "Resets of the transport because writes did not end", registry=registry)


class ReceiverMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.open_epochs = Gauge("baton_transfer_open_epochs", "Reservations that something may still arrive for", registry=registry)
        self.quarantined = Gauge("baton_transfer_quarantined_pages", "Pages of revoked reservations not yet safe to use", registry=registry)
        self.commits = Counter("baton_transfer_commits", "Commits that arrived: accepted, void, corrupt", ["outcome"], registry=registry)
        self.senders_lost = Counter("baton_transfer_senders_lost", "Sessions of prefill ranks that ended", registry=registry)
        self.fences = Counter("baton_transfer_fences", "Resets of the transport to shut out a lost sender", registry=registry)
