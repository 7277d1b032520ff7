"""Transport by name, imported on demand."""

from __future__ import annotations

from core.errors import ConfigError
from kv_transfer.config import TransferConfig
from kv_transfer.transport import Transport


def new_transport(config: TransferConfig, name: str) -> Transport:
    """`name` identifies this agent among its peers and must be unique over all processes' lives."""
    if config.transport == "nixl":
        from kv_transfer.transports.nixl import NixlTransport

        return NixlTransport(config, name)
    if config.transport == "memory":
        from kv_transfer.transports.memory import MemoryTransport

        return MemoryTransport(name)
    raise ConfigError(f"unknown transport {config.transport!r}")
