"""Transport by name, imported on demand."""

from __future__ import annotations

from core.errors import BatonError, ConfigError
from core.region import Region
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


def open_transport(config: TransferConfig, name: str, pages: Region, slots: Region) -> tuple[Transport, bytes]:
    """A transport that knows this process's memory, and its agent bytes. Raises ConfigError saying why it cannot be used here."""
    try:
        transport = new_transport(config, name)
        return transport, transport.register(pages, slots)
    except BatonError:
        raise
    except Exception as error:  # libraries that are not there or find no device raise whatever they like
        raise ConfigError(f"transfer.transport {config.transport!r} cannot be used here: {error!r}") from error
