"""The `transfer` section of the cluster file."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from core.errors import ConfigError
from core.rpc import check_liveness

TRANSPORTS = ("nixl", "memory")


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferConfig:
    transport: str = "nixl"
    """"nixl" (UCX: NVLink, RDMA, shared memory, TCP); "memory" is for tests within one process."""
    ucx_tls: str = ""
    """UCX_TLS: transports that UCX may use, e.g. "tcp" or "rc,cuda_ipc,cuda_copy"; empty lets UCX choose."""
    ucx_net_devices: str = ""
    """UCX_NET_DEVICES, e.g. "mlx5_0:1"; empty lets UCX choose."""
    ucx_rdma_gid_index: int = -1
    """UCX_IB_GID_INDEX: entry of the GID table to use on RoCE; -1 lets UCX choose."""
    ucx_rdma_traffic_class: int = -1
    """UCX_IB_TRAFFIC_CLASS: DSCP and ECN bits of RoCE packets, 0 to 255, as the fabric's lossless class wants; -1 lets UCX choose."""
    ucx_log_level: str = "error"
    """UCX_LOG_LEVEL: fatal, error, warn, info or debug. From info on UCX says which lanes it chose."""
    tcp_user_timeout_s: float = 3.0
    """UCX_TCP_USER_TIMEOUT: a TCP peer that acknowledges nothing for so long is an error. Writes to a lost peer are given the same time
    to end by themselves, over any transport."""
    num_threads: int = 0
    """Threads of the NIXL agent's UCX backend; 4 pay for GPU to GPU, 0 for a CPU machine."""
    max_bytes_in_flight: int = 512 * 2**20
    """Bytes posted and not yet out, over all hand-offs of a prefill rank."""
    deadline_s: float = 60.0
    """From the last page computed to the commit; then the hand-off has failed."""
    write_timeout_s: float = 30.0
    """One write (at most a quarter of max_bytes_in_flight); then the connection to its receiver is given up."""
    lease_s: float = 15.0
    """A reservation whose sender is silent for so long is aborted."""
    liveness_timeout_s: float = 5.0
    """A peer whose transfer session is silent for so long is lost."""
    quarantine_s: float = 10.0
    """Pages that a lost sender may still write to are kept from use for so long after its connection was torn down; must exceed
    liveness_timeout_s (the cut-off sender stops itself by then) plus tcp_user_timeout_s (its last write has ended by then)."""
    checksum: bool = False
    """Checked mode: the commit carries a checksum of each page and the slot, and the receiver compares. On GPUs both ends copy every piece
    to the host for it: for tests and for trying out a fabric."""
    poll_interval_ms: float = 0.2
    """How often both sides poll the transport while anything is outstanding; a poll takes some microseconds."""

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("transport", self.transport, TRANSPORTS),
            ("ucx_log_level", self.ucx_log_level, ("fatal", "error", "warn", "info", "debug")),
        ):
            if value not in allowed:
                raise ConfigError(f"transfer.{key} is {value!r}; allowed: {', '.join(allowed)}")
        for key in (
            "tcp_user_timeout_s",
            "max_bytes_in_flight",
            "deadline_s",
            "write_timeout_s",
            "poll_interval_ms",
        ):
            if not getattr(self, key) > 0:
                raise ConfigError(f"transfer.{key} is {getattr(self, key)}; it must be above 0")
        check_liveness("transfer", self.liveness_timeout_s)
        if self.lease_s < 1:
            raise ConfigError(
                f"transfer.lease_s is {self.lease_s}; it must be at least 1: it is renewed when a third of it is over, and late"
            )
        for key, least, most in (("num_threads", 0, 64), ("ucx_rdma_gid_index", -1, 255), ("ucx_rdma_traffic_class", -1, 255)):
            if not least <= getattr(self, key) <= most:
                raise ConfigError(f"transfer.{key} is {getattr(self, key)}; it must be from {least} to {most}")
        if not self.quarantine_s > self.liveness_timeout_s + self.tcp_user_timeout_s:
            raise ConfigError(
                f"transfer.quarantine_s is {self.quarantine_s}; it must exceed liveness_timeout_s + tcp_user_timeout_s = "
                f"{self.liveness_timeout_s + self.tcp_user_timeout_s:g}"
            )

    def on_loopback(self) -> TransferConfig:
        """UCX listens on every network device unless told otherwise; one machine needs none but lo (beside shared memory and NVLink)."""
        return self if self.ucx_net_devices else dataclasses.replace(self, ucx_net_devices="lo")

    def apply_to_environment(self) -> None:
        """UCX and NIXL read their settings from the environment when an agent is created; what is set there already is overruled."""
        settings = {
            "UCX_TCP_USER_TIMEOUT": f"{self.tcp_user_timeout_s:g}s",
            "UCX_LOG_LEVEL": self.ucx_log_level,
            "NIXL_LOG_LEVEL": "WARN",
            "UCX_TLS": self.ucx_tls,
            "UCX_NET_DEVICES": self.ucx_net_devices,
            "UCX_IB_GID_INDEX": "" if self.ucx_rdma_gid_index < 0 else str(self.ucx_rdma_gid_index),
            "UCX_IB_TRAFFIC_CLASS": "" if self.ucx_rdma_traffic_class < 0 else str(self.ucx_rdma_traffic_class),
        }
        os.environ.update({name: value for name, value in settings.items() if value})
