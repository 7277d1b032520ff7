"""Events with key=value fields on standard error, one line each.

    log = get_logger("prefill")
    log.info("prefill.accepted", request_id="r1", num_tokens=812)
    ->  2026-11-21T04:12:09.113482Z INFO  prefill prefill.accepted request_id=r1 num_tokens=812

Names come in pairs (`x.started`, `x.done` or `x.failed`). info: once per request or state change; debug: per step and per write, which
is what a timeline of one request is drawn from (`tests/benchmarks/timeline.py`). Processes of one machine share the time axis.

Warnings and errors are written at once. Lines below are written by a thread some ms later: who writes waits for the reader of the pipe
and lets the process's other threads go first, which is not for the midst of a step or a hand-off.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import logging
import os
import sys
import threading
import time
from collections import deque
from typing import Any

from core.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")

DELAY_S = 0.01
"""Of lines below warning: those of so long are written together."""

MOST_WAITING = 10_000
"""Lines. While nobody reads, who has more to say waits."""


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        stamp = when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        line = f"{stamp} {record.levelname:<5} {record.name.removeprefix('baton.')} {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class DelayedHandler(logging.StreamHandler[Any]):
    """Writes as the module says, in the order of the calls. A process that is killed loses its last lines, but for what came before a
    warning; one that exits does not."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._records: deque[logging.LogRecord] = deque()
        self._wake = threading.Event()
        self._writing = threading.RLock()  # a signal's handler may have something to say in the midst of it
        threading.Thread(target=self._run, name="log", daemon=True).start()
        atexit.register(self.flush)

    def handle(self, record: logging.LogRecord) -> bool:
        self._records.append(record)
        if record.levelno >= logging.WARNING or len(self._records) > MOST_WAITING:
            self.flush()
        elif not self._wake.is_set():
            self._wake.set()
        return True

    def flush(self) -> None:
        """Returns when all that was said before is written."""
        with self._writing:
            lines = []
            while self._records:
                lines.append(self.format(self._records.popleft()) + self.terminator)
            if lines:
                with contextlib.suppress(OSError, ValueError):  # the disk is full, or nobody reads any more, or the stream is closed
                    self.stream.write("".join(lines))
                    self.stream.flush()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(DELAY_S)
            self._wake.clear()
            self.flush()


def _quote(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return repr(text) if not text or any(c.isspace() or c in "\"'" for c in text) else text


class EventLogger:
    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def _emit(self, level: int, event: str, fields: dict[str, Any], exc_info: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            line = " ".join([event, *(f"{key}={_quote(value)}" for key, value in fields.items())])
            self._logger.log(level, "%s", line, exc_info=exc_info)

    def debug(self, event: str, **fields: Any) -> None:
        self._emit(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._emit(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._emit(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._emit(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """As `error`, with the traceback of the exception being handled."""
        self._emit(logging.ERROR, event, fields, exc_info=True)


def get_logger(name: str) -> EventLogger:
    return EventLogger(logging.getLogger(f"baton.{name}"))


def set_up_logging(default: str = "info") -> None:
    """Send baton's events to standard error, from the level in the environment's BATON_LOG_LEVEL on, one of LEVELS. Called once, by a
    process's entry point. Raises ConfigError."""
    level = os.environ.get("BATON_LOG_LEVEL", default)
    if level not in LEVELS:
        raise ConfigError(f"BATON_LOG_LEVEL is {level!r}; allowed: {', '.join(LEVELS)}")
    handler = DelayedHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    root = logging.getLogger("baton")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


def write_out() -> None:
    """Returns when all that this process has said is written: for one that is about to be killed."""
    for handler in logging.getLogger("baton").handlers:
        handler.flush()
