"""A listener's port."""

from __future__ import annotations

import asyncio
import socket

import pytest

from core.errors import ConfigError
from core.rpc import Listener


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True


@pytest.mark.parametrize("is_started", [False, True])
def test_a_port_is_held_from_the_beginning_and_freed_by_stop(is_started: bool) -> None:
    async def live() -> None:
        listener = Listener("127.0.0.1", 0)
        assert not is_free(listener.port)
        if is_started:
            await listener.start()
        await listener.stop(0.0)
        for _ in range(100):
            if is_free(listener.port):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"port {listener.port} is still taken")

    asyncio.run(live())


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_an_address_that_cannot_be_had_is_a_config_error_naming_it(host: str) -> None:
    async def live() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match=f"{host}:{port}"):
                Listener(host, port)

    asyncio.run(live())
