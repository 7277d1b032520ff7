"""The section `placement` of the cluster file; the others belong to the folders that read them."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementConfig:
    ray: str = "embedded"
    """"embedded" starts a Ray of its own on this machine, on loopback only; "host:port" uses the cluster whose head is there."""
    cpus_per_rank: float = 1.0
    """CPUs that Ray sets aside for each rank; 0.25 puts four ranks on one core."""
    gpus_per_rank: int = 0
    """GPUs of each rank: 0 on CPU machines, else 1."""
    node_labels: dict[str, str] = field(default_factory=dict)
    """Ray node labels that a node must have to be given ranks."""
    nvlink_domain_label: str = ""
    """Ray node label whose value names the node's NVLink domain (on GB300 NVL72: the rack); empty: domains are not looked at."""
    one_nvlink_domain: bool = True
    """Whether a replica must lie inside one NVLink domain; if false it only should."""
    placement_timeout_s: float = 60.0
    """A replica for which no node has room in this time is given up and reported; it is tried again when nodes come or the file changes."""
    start_timeout_s: float = 900.0
    """A rank that is not ready (weights loaded, warm) in this time is restarted."""
    drain_timeout_s: float = 120.0
    """Requests of a draining rank that take longer are cut off, and run again elsewhere by the router."""
    health_interval_s: float = 0.5
    """How often the controller asks every rank for its health."""
    health_timeout_s: float = 10.0
    """A rank that does not answer in this time is killed and restarted."""
    restart_backoff_s: float = 1.0
    """Pause before a rank's second restart in a row, doubled each time; the first is immediate."""
    restart_backoff_max_s: float = 60.0
    """Longest of these pauses."""
    stable_s: float = 60.0
    """A rank that was ready for so long starts counting its failures anew."""

    def __post_init__(self) -> None:
        host, _, port = self.ray.rpartition(":")
        if self.ray != "embedded" and not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError(f'placement.ray is {self.ray!r}; it must be "embedded" or host:port of a Ray head')
        if self.cpus_per_rank < 0.01:
            raise ConfigError(f"placement.cpus_per_rank is {self.cpus_per_rank}; it must be at least 0.01")
        if self.gpus_per_rank not in (0, 1):
            raise ConfigError(f"placement.gpus_per_rank is {self.gpus_per_rank}; a rank has one device: 0 (CPU) or 1")
        for key in (
            "placement_timeout_s",
            "start_timeout_s",
            "drain_timeout_s",
            "health_interval_s",
            "health_timeout_s",
            "restart_backoff_s",
            "restart_backoff_max_s",
            "stable_s",
        ):
            if getattr(self, key) <= 0:
                raise ConfigError(f"placement.{key} is {getattr(self, key)}; it must be above 0")
