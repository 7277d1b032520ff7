"""Ports of loopback, for those who must know theirs before somebody binds it."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket

PORTS = range(20_000, 32_000)
"""Above those that Ray gives its workers, and below those that the kernel gives to whoever asks for any, for a listener as for a
connection: one of these may be gone in the seconds until a process that was told of it has started."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; drawn at random, since other tests may draw at the same time."""
    drawn = random.SystemRandom().sample(PORTS, len(PORTS))
    return list(itertools.islice(filter(is_free, drawn), count))


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True


async def freed(port: int) -> None:
    """Returns when nobody listens on it any more: gRPC lets go of a stopped server's a moment after it said that it has stopped."""
    async with asyncio.timeout(10.0):
        while not is_free(port):
            await asyncio.sleep(0.02)
