"""The `router` section of the cluster file."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from dataclasses import dataclass

from core.errors import ConfigError
from core.rpc import check_liveness


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = 8000
    """Port of the HTTP API, shared by all router processes."""
    processes: int = 1
    """Router processes; the kernel spreads connections over them."""
    control_address: str = "127.0.0.1:8010"
    """host:port of the controller's gRPC service."""
    default_thinking: bool = True
    """Whether chat requests that do not say so are answered in thinking mode."""
    max_requests: int = 1024
    """Sequences in a router process at once, waiting ones included; more get 429. A request with `n` of 3 is three."""
    max_waiting_tokens: int = 8_388_608
    """Prompt tokens of requests that have no first token yet, in a router process; more get 429."""
    max_body_bytes: int = 33_554_432
    """Largest request body."""
    max_n: int = 16
    """Largest `n` of a request."""
    request_timeout_s: float = 600.0
    """A request that takes longer ends with an error; a client that reads nothing of its answer for so long is cut off."""
    reserve_timeout_s: float = 10.0
    """A decode rank must answer a reservation within this time."""
    wait_for_members_s: float = 30.0
    """How long a request waits for a prefill and a decode rank to be there, before 503."""
    max_attempts: int = 8
    """Runs of one request, the first included, when ranks are lost under it."""
    liveness_timeout_s: float = 5.0
    """A rank whose session is silent for so long is lost."""
    drain_timeout_s: float = 30.0
    """How long streams may go on after the router was told to stop; the controller waits for placement.drain_timeout_s at most."""
    api_keys_file: str = ""
    """File with one API key a line; requests to /v1 must carry one of them. A relative path starts at the cluster file's folder.
    Empty: no keys."""
    api_keys_env: str = ""
    """Name of an environment variable with API keys separated by commas; adds to the file's."""

    def __post_init__(self) -> None:
        for key in ("processes", "max_requests", "max_waiting_tokens", "max_body_bytes", "max_n", "max_attempts"):
            if getattr(self, key) < 1:
                raise ConfigError(f"router.{key} is {getattr(self, key)}; it must be at least 1")
        for key in ("request_timeout_s", "reserve_timeout_s"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"router.{key} is {getattr(self, key)}; it must be above 0")
        check_liveness("router", self.liveness_timeout_s)
        for key in ("wait_for_members_s", "drain_timeout_s"):
            if getattr(self, key) < 0:
                raise ConfigError(f"router.{key} is {getattr(self, key)}; it must be at least 0")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"router.port is {self.port}; it must be in [0, 65535]")

    def relative_to(self, folder: pathlib.Path) -> RouterConfig:
        """With an absolute path of the key file, if there is one."""
        keys = self.api_keys_file
        return dataclasses.replace(self, api_keys_file=str((folder / keys).resolve()) if keys else "")

    def read_api_keys(self) -> tuple[str, ...]:
        """Raises ConfigError if a configured source has none: an empty file must not open the door."""
        keys: list[str] = []
        if self.api_keys_file:
            try:
                lines = pathlib.Path(self.api_keys_file).read_text().splitlines()
            except OSError as error:
                raise ConfigError(f"router.api_keys_file: {self.api_keys_file}: {error.strerror}") from error
            except UnicodeDecodeError as error:
                raise ConfigError(f"router.api_keys_file: {self.api_keys_file}: not UTF-8 text") from error
            found = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
            if not found:
                raise ConfigError(f"router.api_keys_file: {self.api_keys_file} holds no key")
            keys += found
        if self.api_keys_env:
            found = [key.strip() for key in os.environ.get(self.api_keys_env, "").split(",") if key.strip()]
            if not found:
                raise ConfigError(f"router.api_keys_env: the environment variable {self.api_keys_env} holds no key")
            keys += found
        return tuple(keys)
