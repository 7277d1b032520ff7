"""How long things may take in a world. Most worlds have times of their own, scaled down; some have the defaults of a cluster file.

Scaled times make worlds short, and hide what depends on how the defaults stand to each other: a request that tries eight times in a second,
a lost connection that takes eight to end.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kv_transfer.config import TransferConfig
from router.config import RouterConfig

_TRANSFER = TransferConfig(transport="memory", max_bytes_in_flight=400, poll_interval_ms=40.0)
_ROUTER = RouterConfig(max_requests=10)


@dataclass(frozen=True, kw_only=True)
class Times:
    transfer: TransferConfig
    router: RouterConfig
    calm_s: float
    """After the last event everything must have come to an end by itself within this time."""

    @property
    def liveness_s(self) -> float:
        """For every session."""
        return self.transfer.liveness_timeout_s

    @property
    def wire_s(self) -> float:
        """Longest life of a byte on the wire: the TCP user timeout."""
        return self.transfer.tcp_user_timeout_s


SCALED = Times(
    transfer=dataclasses.replace(
        _TRANSFER,
        tcp_user_timeout_s=0.5,
        deadline_s=4.0,
        write_timeout_s=1.0,
        lease_s=3.0,
        liveness_timeout_s=1.2,
        quarantine_s=1.2 + 0.5 + 0.8,
    ),
    router=dataclasses.replace(
        _ROUTER,
        request_timeout_s=40.0,
        reserve_timeout_s=2.0,
        wait_for_members_s=16.0,  # longer than two outages one after the other, of a prefill and of a decode rank
        max_attempts=12,
    ),
    calm_s=90.0,
)

DEFAULT = Times(transfer=_TRANSFER, router=_ROUTER, calm_s=700.0)


def times_of(seed: int) -> Times:
    return DEFAULT if seed % 4 == 3 else SCALED
