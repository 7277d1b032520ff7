"""One router process: HTTP in front, sessions with the ranks behind. Lives inside a running event loop."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import uvicorn

from core.clock import SystemClock
from core.errors import BatonError, ConfigError
from core.log import get_logger
from core.metrics import new_registry
from core.process import die
from core.request import Member
from core.rpc import address_of
from router.app import create_app
from router.chat import ChatFormat
from router.config import RouterConfig
from router.members import Members
from router.metrics import RankCollector, RouterMetrics
from router.relay import Relay
from router.service import Service
from router.tokens import TextCodec

log = get_logger("router")

MAX_UNREAD_MS = 2**31 - 1
"""What the kernel takes: 24 days."""


class Router:
    def __init__(
        self,
        *,
        config: RouterConfig,
        served_name: str,
        tokenizer_folder: pathlib.Path,
        max_model_len: int = 0,
        watch: Callable[[Members], Coroutine[Any, Any, None]] | None = None,
        members: Sequence[Member] = (),
        is_port_shared: bool = False,
    ) -> None:
        """`max_model_len`: longest sequence; 0 until `learn_max_model_len` says it. `members`: those known at the start. `watch` keeps
        them up to date for as long as the router lives. `is_port_shared`: other router processes of the same cluster listen there, too.
        Raises ConfigError for a bad tokenizer or key file."""
        self._config, self._served_name, self._max_model_len = config, served_name, max_model_len
        self._is_port_shared = is_port_shared
        self._follow, self._first_members = watch, members
        self._codec = TextCodec(tokenizer_folder)
        self._api_keys = config.read_api_keys()
        self.registry = new_registry()
        """Its metrics, complete from `start` on; may be read from any thread."""

    async def start(self) -> None:
        """Returns when the port answers. Raises ConfigError if it cannot be had, and then leaves nothing behind."""
        config, clock, registry = self._config, SystemClock(), self.registry
        self.members = Members(config.liveness_timeout_s)
        metrics = RouterMetrics(registry, self.members.router_name)
        registry.register(RankCollector(self.members))
        relay = Relay(self.members, config, clock)
        metrics.in_line.set_function(lambda: relay.num_in_line)
        service = self._service = Service(config, self._served_name, self._max_model_len, self._codec, relay, metrics, clock)
        app = create_app(service, ChatFormat(service, config.default_thinking), self.members, registry, self._api_keys)
        self._socket = _listen(config.host, config.port, self._is_port_shared, config.request_timeout_s)
        self.port = self._socket.getsockname()[1]
        self._server = _Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=round(config.drain_timeout_s),
                timeout_keep_alive=30,
                h11_max_incomplete_event_size=65536,
            )
        )
        self._watch: asyncio.Task[None] | None = None
        self.members.update(list(self._first_members))
        if self._follow is not None:
            self._watch = asyncio.create_task(self._follow(self.members))
            self._watch.add_done_callback(_end_with)
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._serving.done():
                raise ConfigError(f"the HTTP server did not start: {self._serving.exception()}")
            await asyncio.sleep(0.01)
        log.info("router.ready", address=address_of(config.host, self.port), name=self.members.router_name)

    def learn_max_model_len(self, num_tokens: int) -> None:
        """What the ranks say, where nobody knew it before them; after `start`."""
        self._service.max_model_len = num_tokens

    @property
    def num_requests(self) -> int:
        """Admitted and not ended."""
        return self._service.num_requests

    async def stop(self) -> None:
        """Take no new connections, let streams end within drain_timeout_s, then cut them."""
        self._server.should_exit = True
        await self._serving
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self.members.close()
        self._service.close()


class _Server(uvicorn.Server):
    """Leaves signals to the process, which has the router stop. Else it sends itself again, at its end, those that came."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _end_with(watch: asyncio.Task[None]) -> None:
    """A router that does not learn of ranks any more would answer 503 for ever."""
    if not watch.cancelled() and (error := watch.exception()) is not None:
        die(str(error) if isinstance(error, BatonError) else f"ranks are not followed any more: {error!r}")


def _listen(host: str, port: int, is_shared: bool, unread_s: float) -> socket.socket:
    """A listening socket; all that share a port must say so. A connection whose client reads nothing for `unread_s` while there is
    something to read is reset. Raises ConfigError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named: event loops then send small writes at once, else they wait for the client's delayed acknowledgement.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    # Accepted connections inherit it. Else who stops reading, and leaves the connection open, holds its place in the router for ever.
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(max(round(unread_s * 1000), 1), MAX_UNREAD_MS))
    try:
        found.bind((host, port))
        found.listen(2048)
    except OSError as error:
        found.close()
        raise ConfigError(f"router.port: cannot listen on {address_of(host, port)}: {error.strerror}") from error
    return found
