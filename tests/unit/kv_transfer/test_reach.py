"""A receiver and a sender that is too busy to answer when their session begins."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kv_transfer.ending import Answer
from kv_transfer.receiver import Origin
from kv_transfer.receiving import KVReceiver


def reach(monkeypatch: pytest.MonkeyPatch, answers: list[Answer], ends_after: int) -> tuple[bool, int]:
    """Whether the sender counts as reached, and how many answers were asked for; the session ends with number `ends_after`."""
    session = SimpleNamespace(key="s", origin=Origin("127.0.0.1:1", 5, "link", was_reached=False))
    receiver = SimpleNamespace(_sessions={"s": session})
    asked = 0

    async def ask(origin: Origin, timeout_s: float) -> Answer:
        nonlocal asked
        assert origin.link == "", "a question about the session itself would end it"
        asked += 1
        if asked == ends_after:
            receiver._sessions.clear()
        return answers[asked - 1]

    monkeypatch.setattr("kv_transfer.receiving.ask", ask)
    monkeypatch.setattr("kv_transfer.receiving.ASK_TIMEOUT_S", 0.001)
    asyncio.run(KVReceiver._reach(cast(Any, receiver), cast(Any, session)))
    return session.origin.was_reached, asked


def test_a_busy_sender_is_asked_again_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reach(monkeypatch, [Answer.SILENCE, Answer.SILENCE, Answer.OVER], ends_after=9) == (True, 3)


def test_nobody_is_asked_after_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reach(monkeypatch, [Answer.SILENCE] * 9, ends_after=2) == (False, 2)
