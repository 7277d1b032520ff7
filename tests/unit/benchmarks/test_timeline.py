from __future__ import annotations

import logging
import pathlib
from typing import Any

import pytest

from core.errors import ConfigError
from core.log import _Formatter, get_logger, set_up_logging
from tests.benchmarks.timeline_story import Event, draw, parse, read_story

STEP = "2026-11-21T10:00:00.{us:06d}Z DEBUG prefill prefill.step request_ids=cmpl-ab-0.1.1 num_tokens=512 seconds={seconds}"
LINES = [
    "2026-11-21T10:00:00.000000Z INFO  decode decode.accepted request_id=cmpl-ab-0.1.1/1 epoch=4 num_pages=5 num_kept_pages=0",
    "2026-11-21T10:00:00.001000Z INFO  prefill prefill.accepted request_id=cmpl-ab-0.1.1 num_tokens=1024",
    STEP.format(us=21000, seconds=0.02),
    "2026-11-21T10:00:00.022000Z DEBUG sender transfer.posted request_id=cmpl-ab-0.1.1/1 "
    "write_id=7 num_pages=2 has_slot=False num_bytes=3000000 seconds=0.0005",
    "Traceback (most recent call last):",
    "2026-11-21T10:00:00.023500Z DEBUG sender transfer.out request_id=cmpl-ab-0.1.1/1 write_id=7 succeeded=True",
    "2026-11-21T10:00:00.030000Z DEBUG prefill prefill.step request_ids=cmpl-zz-0.1.1 num_tokens=9 seconds=0.001",
    STEP.format(us=41000, seconds=0.018),
    "2026-11-21T10:00:00.041500Z DEBUG sender transfer.posted request_id=cmpl-ab-0.1.1/1 "
    "write_id=8 num_pages=1 has_slot=True num_bytes=1000000 seconds=0.0001",
    "2026-11-21T10:00:00.042000Z DEBUG receiver transfer.committed request_id=cmpl-ab-0.1.1/1 epoch=4",
    "2026-11-21T10:00:00.042200Z DEBUG sender transfer.out request_id=cmpl-ab-0.1.1/1 write_id=8 succeeded=True",
    "2026-11-21T10:00:00.055000Z DEBUG decode decode.started request_id=cmpl-ab-0.1.1/1 seconds=0.0125",
    "2026-11-21T10:00:00.056000Z INFO  prefill prefill.done request_id=cmpl-ab-0.1.1 queue_s=0.0001 note='with spaces'",
]


def events() -> list[Event]:
    return [event for event in map(parse, LINES) if event is not None]


def test_a_story_has_every_moment_of_its_request_and_none_of_others(tmp_path: pathlib.Path) -> None:
    found = events()
    assert len(found) == len(LINES) - 1
    story = read_story(found, "cmpl-ab")
    assert [tokens for _, _, tokens in story.chunks] == [512, 512]
    assert story.computing == pytest.approx(0.040, abs=2e-6)
    assert story.num_pages_posted_while_computing == 2 and story.share_overlapped == pytest.approx(0.75)
    assert story.committed - story.computed == pytest.approx(0.001, abs=2e-6)
    assert story.decoding - story.computed == pytest.approx(0.0015, abs=2e-6)
    rows = {row["what"]: row for row in story.as_rows()}
    assert rows["pages"]["ms"] == 21.5 and rows["pages"]["until ms"] == 23.5 and rows["slot and commit"]["pages"] == 1
    assert [row["ms"] for row in story.as_rows()] == sorted(row["ms"] for row in story.as_rows())
    draw(story, "a title", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_what_is_missing_is_named() -> None:
    with pytest.raises(KeyError, match=r"transfer\.committed"):
        read_story([event for event in events() if event.name != "transfer.committed"], "cmpl-ab")


def test_the_log_writes_what_the_story_reads(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "baton"):
        get_logger("sender").debug("transfer.posted", request_id="a b", seconds=0.00012345678, has_slot=True)
    event = parse(_Formatter().format(caplog.records[-1]))
    assert event is not None and event.name == "transfer.posted"
    assert event.fields == {"request_id": "a b", "seconds": "0.000123457", "has_slot": "True"}
    assert event.time == pytest.approx(caplog.records[-1].created, abs=2e-6)


def test_the_level_is_that_of_the_environment_and_a_wrong_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    logger: Any = logging.getLogger("baton")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        for value, level in (("debug", logging.DEBUG), ("error", logging.ERROR)):
            monkeypatch.setenv("BATON_LOG_LEVEL", value)
            set_up_logging()
            assert logger.level == level
        monkeypatch.setenv("BATON_LOG_LEVEL", "loud")
        with pytest.raises(ConfigError, match="BATON_LOG_LEVEL is 'loud'; allowed: debug, info"):
            set_up_logging()
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
