"""A router process and its port."""

from __future__ import annotations

import asyncio
import pathlib
import socket
import time

import pytest

from core.errors import ConfigError
from router.config import RouterConfig
from router.members import Members
from router.server import Router

MODEL = pathlib.Path(__file__).resolve().parents[3] / "deploy" / "demo_model" / "checkpoint"


def new_router(port: int, is_port_shared: bool) -> Router:
    config = RouterConfig(port=port)
    return Router(config=config, served_name="demo", tokenizer_folder=MODEL, max_model_len=512, is_port_shared=is_port_shared)


@pytest.mark.parametrize(("first", "second"), [(False, False), (False, True), (True, False)])
def test_a_port_is_shared_only_by_routers_that_both_mean_to(first: bool, second: bool) -> None:
    async def live() -> None:
        there = new_router(0, first)
        await there.start()
        with pytest.raises(ConfigError, match=rf"router\.port: cannot listen on 127\.0\.0\.1:{there.port}: Address already in use"):
            await new_router(there.port, second).start()
        await there.stop()
        again = new_router(there.port, second)
        await again.start()
        await again.stop()

    asyncio.run(live())


def test_small_writes_are_sent_at_once() -> None:
    """Else each answer and each event of a stream on a kept connection would wait 40 ms for the client's acknowledgement."""

    async def live() -> None:
        router = new_router(0, False)
        await router.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: here\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"200"
        (connection,) = router._server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")  # type: ignore[union-attr]
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        writer.close()
        await router.stop()

    asyncio.run(live())


def test_a_client_that_stops_reading_is_cut_off_when_its_time_is_up() -> None:
    async def live() -> None:
        config = RouterConfig(port=0, request_timeout_s=0.2)
        router = Router(config=config, served_name="demo", tokenizer_folder=MODEL, max_model_len=512)
        await router.start()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            began = time.monotonic()
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", router.port))
            await asyncio.get_running_loop().sock_sendall(client, b"GET /openapi.json HTTP/1.1\r\nhost: here\r\n\r\n" * 1000)
            state = router._server.server_state
            async with asyncio.timeout(10):
                while not state.total_requests or state.connections:
                    await asyncio.sleep(0.02)
            assert time.monotonic() - began >= config.request_timeout_s, "it is served until then"
        await router.stop()

    asyncio.run(live())


def test_a_body_that_does_not_come_ends_when_its_time_is_up() -> None:
    async def live() -> bytes:
        config = RouterConfig(port=0, request_timeout_s=0.05)
        router = Router(config=config, served_name="demo", tokenizer_folder=MODEL, max_model_len=512)
        await router.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: 100\r\n\r\n{")
        line = await reader.readline()
        writer.close()
        await router.stop()
        return line

    assert asyncio.run(live()).split()[1] == b"499"


def test_a_router_that_does_not_learn_of_ranks_any_more_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str] = []
    monkeypatch.setattr("router.server.die", reasons.append)

    async def watch(members: Members) -> None:
        raise OSError("the list is gone")

    async def live() -> None:
        router = Router(config=RouterConfig(port=0), served_name="demo", tokenizer_folder=MODEL, max_model_len=512, watch=watch)
        await router.start()
        await router.stop()

    asyncio.run(live())
    assert len(reasons) == 1 and "the list is gone" in reasons[0]


def test_a_key_file_has_comments_wherever_they_begin_and_no_bytes_that_are_no_text(tmp_path: pathlib.Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# operators\n  # night shift\n alpha \n\n")
    assert RouterConfig(api_keys_file=str(keys)).read_api_keys() == ("alpha",)
    keys.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ConfigError, match=r"router\.api_keys_file: .*keys: not UTF-8 text"):
        RouterConfig(api_keys_file=str(keys)).read_api_keys()


def test_a_request_may_be_given_more_time_than_the_kernel_can_count() -> None:
    async def live() -> None:
        config = RouterConfig(port=0, request_timeout_s=1e12, drain_timeout_s=1e12)
        router = Router(config=config, served_name="demo", tokenizer_folder=MODEL, max_model_len=512)
        await router.start()
        await router.stop()

    asyncio.run(live())
