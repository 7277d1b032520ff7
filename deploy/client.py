"""The baton command's way to a running cluster: protos/control.proto, and HTTP."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

import grpc

from core.codec import decode_error
from core.errors import Unavailable
from core.rpc import NO_PROXY, token_metadata
from protos import control_pb2, control_pb2_grpc

T = TypeVar("T")

ANSWER_S = 20.0
"""Where nobody listens is known at once. A controller that is starting many ranks on a busy machine has been seconds in calls of Ray's."""


class NotOurs(Unavailable):
    """The controller that answers is another cluster's."""


class ControlClient:
    """Every call raises Unavailable when the controller cannot be reached (NotOurs when it does not take the token), and what the
    controller refused with."""

    def __init__(self, address: str, token: str) -> None:
        """`token`: the cluster's own (`ClusterFolder.read_control_token`)."""
        self._address, self._metadata = address, token_metadata(token)
        self._channel = grpc.insecure_channel(address, options=(("grpc.max_reconnect_backoff_ms", 500), NO_PROXY))
        self._stub = control_pb2_grpc.ControlStub(self._channel)

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._channel.close()

    def status(self) -> Any:
        """A control_pb2.ClusterStatus."""
        return self._call(lambda: self._stub.Status(control_pb2.StatusRequest(), timeout=ANSWER_S, metadata=self._metadata))

    def apply(self, spec_yaml: str = "", replicas: Mapping[str, int] | None = None, *, dry_run: bool = False) -> list[str]:
        """Set the desired state; returns what changes, as lines."""
        request = control_pb2.ApplyRequest(spec_yaml=spec_yaml, replicas=dict(replicas or {}), dry_run=dry_run)
        return self._changes(self._call(lambda: self._stub.Apply(request, timeout=ANSWER_S, metadata=self._metadata)))

    def drain(self, member: str) -> list[str]:
        request = control_pb2.DrainRequest(member=member)
        return self._changes(self._call(lambda: self._stub.Drain(request, timeout=ANSWER_S, metadata=self._metadata)))

    def shut_down(self) -> None:
        self._call(lambda: self._stub.Shutdown(control_pb2.ShutdownRequest(), timeout=60.0, metadata=self._metadata))

    def _call(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise NotOurs(f"the controller at {self._address} is not this cluster's: it does not take its token") from error
            raise Unavailable(f"the controller at {self._address} does not answer ({error.code().name})") from error

    def _changes(self, reply: Any) -> list[str]:
        if reply.HasField("error"):
            raise decode_error(reply.error)
        return list(reply.changes)


def open_url(request: str | urllib.request.Request, timeout_s: float) -> Any:
    """The response of a cluster's router, past any proxy that the environment names. Raises what urllib raises."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_s)
