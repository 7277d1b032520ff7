"""Events with key=value fields on standard error, one line each.

    log = get_logger("prefill")
    log.info("prefill.started", request_id="r1", num_tokens=812)
    ->  2026-11-21T04:12:09.113482Z INFO  prefill prefill.started request_id=r1 num_tokens=812

Names come in pairs (`x.started`, `x.done` or `x.failed`). info: once per request or state change; debug: per step and per write, which
is what a timeline of one request is drawn from (`tests/benchmarks/timeline.py`). Processes of one machine share the time axis.
"""

from __future__ import annotations

import datetime
import logging
import os
import sys
from typing import Any

from core.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        stamp = when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        line = f"{stamp} {record.levelname:<5} {record.name.removeprefix('baton.')} {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _quote(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return repr(text) if not text or any(c.isspace() or c in "\"'" for c in text) else text


class EventLogger:
    def __init__(self, logger: logging.Logger, fields: tuple[tuple[str, Any], ...] = ()) -> None:
        self._logger = logger
        self._fields = fields

    def bind(self, **fields: Any) -> EventLogger:
        """A logger that adds these fields to every event."""
        return EventLogger(self._logger, self._fields + tuple(fields.items()))

    def _emit(self, level: int, event: str, fields: dict[str, Any], exc_info: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            pairs = (*self._fields, *fields.items())
            line = " ".join([event, *(f"{key}={_quote(value)}" for key, value in pairs)])
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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    root = logging.getLogger("baton")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
