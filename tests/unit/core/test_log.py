"""When lines are written, and by whom."""

from __future__ import annotations

import io
import logging
import threading

import pytest

from core.log import DelayedHandler


def record(level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord("baton.x", level, __file__, 1, text, (), None)


class Stream(io.StringIO):
    """Remembers which threads wrote, and says when one did."""

    def __init__(self) -> None:
        super().__init__()
        self.writers: list[str] = []
        self.written = threading.Event()

    def write(self, text: str) -> int:
        self.writers.append(threading.current_thread().name)
        count = super().write(text)
        self.written.set()
        return count


def test_a_line_below_warning_is_written_by_a_thread_of_its_own() -> None:
    stream = Stream()
    handler = DelayedHandler(stream)
    handler.handle(record(logging.INFO, "one"))
    assert stream.written.wait(10)
    assert (stream.getvalue(), stream.writers) == ("one\n", ["log"])


def test_a_warning_is_there_when_the_call_returns_and_after_what_was_said_before_it() -> None:
    stream = Stream()
    handler = DelayedHandler(stream)
    for number in range(50):
        handler.handle(record(logging.DEBUG, str(number)))
    handler.handle(record(logging.WARNING, "last"))
    assert stream.getvalue().split() == [*map(str, range(50)), "last"]


def test_while_nobody_reads_who_has_more_to_say_writes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.log.DELAY_S", 60.0)
    monkeypatch.setattr("core.log.MOST_WAITING", 3)
    stream = Stream()
    handler = DelayedHandler(stream)
    for number in range(4):
        handler.handle(record(logging.INFO, str(number)))
    assert stream.getvalue().split() == ["0", "1", "2", "3"]
    assert stream.writers == [threading.current_thread().name]


def test_a_stream_that_cannot_be_written_to_costs_its_lines_and_nothing_else() -> None:
    class Full(Stream):
        def write(self, text: str) -> int:
            raise OSError(28, "no space left")

    handler = DelayedHandler(Full())
    handler.handle(record(logging.ERROR, "lost"))
    handler.setStream(Stream())
    handler.handle(record(logging.ERROR, "kept"))
    assert handler.stream.getvalue() == "kept\n"
