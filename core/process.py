"""What `python -m prefill_worker`, `python -m decode_worker` and `python -m router` have in common: arguments, file, signals.

Each checks its own sections of the cluster file and takes the others as they are.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pathlib
import resource
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from core.errors import BatonError
from core.log import get_logger, set_up_logging
from core.rank_worker import Place

log = get_logger("process")


class Part(Protocol):
    """What a process runs: a rank or a router."""

    async def start(self) -> Any: ...

    async def stop(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherSections:
    """The keys of a cluster file. A process declares anew, with their types, those that it reads."""

    name: Any = None
    model: Any = None
    engine: Any = None
    prefill: Any = None
    decode: Any = None
    router: Any = None
    transfer: Any = None
    placement: Any = None


def new_parser(folder: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {folder}", description=description)
    parser.add_argument("file", type=pathlib.Path, help="cluster file (YAML)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="change keys of the file")
    return parser


def port_number(text: str) -> int:
    """Raises ArgumentTypeError outside of [0, 65535]: gRPC would listen on another port without a word."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; it must be in [0, 65535]")
    return int(text)


def host_and_port(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no address; it must be HOST:PORT")
    return text


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on, and for others to connect to (default: %(default)s)")
    parser.add_argument("--port", type=port_number, default=0, help="0: any free one; the log names it")
    parser.add_argument("--replica", type=int, default=0, help="number in the rank's name, e.g. decode/0.0")


def place_of(options: argparse.Namespace) -> Place:
    """What `add_rank_arguments` asked for."""
    return Place(host=options.host.strip("[]"), port=options.port, replica=options.replica)


async def serve(part: Part) -> None:
    """Run the part until SIGTERM or SIGINT. One that is still starting ends the process at once: a thread that reads a model for minutes
    cannot be told to stop, and nobody is served yet. So does a second signal: what a thread of the part does may not end."""
    told, signals = asyncio.Event(), (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    starting, ending = asyncio.ensure_future(part.start()), asyncio.ensure_future(told.wait())
    await asyncio.wait((starting, ending), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        log.warning("process.stopping", pid=os.getpid(), reason="a signal, before it was ready")
        os._exit(0)
    await starting
    await ending
    log.info("process.stopping", pid=os.getpid())
    for number in signals:
        asyncio.get_running_loop().add_signal_handler(number, os._exit, 1)
    await part.stop()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Exit status: 0 stopped by a signal, 1 with the reason on standard error."""
    try:
        set_up_logging()
        raise_file_limit()
        asyncio.run(main())
    except BatonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before it served
        return 130
    return 0


def raise_file_limit() -> None:
    """As many open files as the process may have: each client is one, and most shells leave 1,024 of them. Ray does it for its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:  # the hard limit is above the kernel's own, fs.nr_open
        log.warning("process.file_limit", limit=soft, reason=error)


def die(reason: str) -> NoReturn:
    """`on_death` of a rank that is a process of its own, or a router's that cannot go on: whoever started it sees it end."""
    log.error("process.failed", reason=reason)
    os._exit(1)
