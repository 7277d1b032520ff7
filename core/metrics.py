"""Prometheus metrics: bucket choices and naming shared by all processes.

Names are `baton_<folder>_<what>_<unit>`. Each process has one registry (prometheus_client's default is not used, so that
several roles can live in one test process).
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server

from core.rpc import address_of

TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 30.0, 60.0, 120.0)
"""Seconds; also for the stages that make up time to first token."""

ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Seconds between two tokens of one stream."""

DURATION_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Seconds for whole requests."""


def new_registry() -> CollectorRegistry:
    # A `_created` series beside every counter and histogram says what nobody asks. The switch is the process's.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    return CollectorRegistry(auto_describe=True)


class MetricsEndpoint:
    """An HTTP server for Prometheus on a free port of `host`, in a thread of its own."""

    def __init__(self, registry: CollectorRegistry, host: str) -> None:
        self._server, self._thread = start_http_server(0, host, registry)
        self.address = address_of(host, self._server.server_port)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
