"""A listener's port, and who a server with a token lets in."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from core.errors import ConfigError
from core.rpc import Listener, new_channel, new_server, token_metadata
from deploy.client import ControlClient
from protos import control_pb2, control_pb2_grpc
from tests.support.ports import freed, is_free


@pytest.mark.parametrize("is_started", [False, True])
def test_a_port_is_held_from_the_beginning_and_freed_by_stop(is_started: bool) -> None:
    async def live() -> None:
        listener = Listener("127.0.0.1", 0)
        assert not is_free(listener.port)
        if is_started:
            await listener.start()
        await listener.stop(0.0)
        await freed(listener.port)

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


def call(port: int, metadata: tuple[tuple[str, str], ...], method: str) -> grpc.StatusCode:
    """The status of a call with this metadata; a stream is read to its first message."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        try:
            if method == "Watch":
                next(stub.Watch(control_pb2.WatchRequest(), metadata=metadata, timeout=10))
            else:
                stub.Status(control_pb2.StatusRequest(), metadata=metadata, timeout=10)
        except grpc.RpcError as error:
            status: grpc.StatusCode = error.code()
            return status
    return grpc.StatusCode.OK


class Answers(control_pb2_grpc.ControlServicer):
    async def Status(self, request: Any, context: Any) -> Any:
        return control_pb2.ClusterStatus()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield control_pb2.Members()


@pytest.mark.parametrize("method", ["Status", "Watch"])
@pytest.mark.parametrize(
    ("metadata", "is_let_in"),
    [
        (token_metadata("right"), True),
        ((*token_metadata("wrong"), *token_metadata("right")), True),
        ((), False),
        (token_metadata("wrong"), False),
        (token_metadata(""), False),
        (token_metadata("righ"), False),
        (token_metadata("rightt"), False),
        ((("authorization", "right"),), False),
        ((("token", "Bearer right"),), False),
    ],
)
def test_a_server_with_a_token_answers_only_calls_that_carry_it(
    metadata: tuple[tuple[str, str], ...], is_let_in: bool, method: str
) -> None:
    async def live() -> None:
        server = new_server("right")
        control_pb2_grpc.add_ControlServicer_to_server(Answers(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            status = await asyncio.to_thread(call, port, metadata, method)
        finally:
            await server.stop(None)
        assert status is (grpc.StatusCode.OK if is_let_in else grpc.StatusCode.UNAUTHENTICATED)

    asyncio.run(live())


def test_a_proxy_named_in_the_environment_stands_between_no_processes_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and never listens
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{unused.getsockname()[1]}")

        async def live() -> None:
            listener = Listener("127.0.0.1", 0)
            control_pb2_grpc.add_ControlServicer_to_server(Answers(), listener.server)
            await listener.start()
            channel = new_channel(f"127.0.0.1:{listener.port}")
            try:
                await control_pb2_grpc.ControlStub(channel).Status(control_pb2.StatusRequest(), timeout=10)
                with ControlClient(f"127.0.0.1:{listener.port}", "t") as client:
                    await asyncio.to_thread(client.status)
            finally:
                await channel.close()
                await listener.stop(0.0)

        asyncio.run(live())
