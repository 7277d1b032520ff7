"""Whether an address can be had on this machine."""

from __future__ import annotations

import errno
import socket

from core.errors import ConfigError


def refuse_taken(key: str, host: str, port: int) -> None:
    """Raises ConfigError naming the key whose port is taken, also by those who would share it (routers of another cluster), or whose
    host is not this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                key = key.replace("port", "host")
            raise ConfigError(f"{key}: {host}:{port} cannot be had ({error.strerror}); choose another in the file") from error
