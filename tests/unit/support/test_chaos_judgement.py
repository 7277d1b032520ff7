"""The harness of tests/support/chaos.py sees what it is there to see: a changed token, a lost request, what is left behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from tests.support import chaos_traffic
from tests.support.chaos_levels import FD_SLACK, RSS_SLACK_BYTES, Level, Levels, excess, program_of
from tests.support.chaos_traffic import Answer, Case, Traffic

CASE = Case("one", "/v1/completions", {"stream": True})
TOKENS = ["a", "b", "c", "d"]


def event(tokens: list[str], finish_reason: str | None = None) -> bytes:
    logprobs = {"tokens": tokens, "token_logprobs": [-1.0] * len(tokens)}
    choice = {"index": 0, "text": "".join(tokens), "logprobs": logprobs, "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


WHOLE = [*(event([token]) for token in TOKENS[:-1]), event(TOKENS[-1:], "length"), b"data: [DONE]\n\n"]
EXPECTED = Answer()
for piece in WHOLE[:-1]:
    EXPECTED.add(json.loads(piece[6:])["choices"][0])


class Said(httpx.AsyncByteStream):
    def __init__(self, pieces: list[bytes], then: Exception | None = None, gap_s: float = 0.0) -> None:
        self._pieces, self._then, self._gap_s = pieces, then, gap_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
            await asyncio.sleep(self._gap_s)
        if self._then is not None:
            raise self._then


def serve(monkeypatch: pytest.MonkeyPatch, *responses: Callable[[], httpx.Response]) -> Traffic:
    """A client whose requests are answered by these, in turn; it stops after the last."""
    traffic = Traffic("http://x", [[(CASE, EXPECTED)]], seed=1, num_clients=1)
    left = list(responses)

    def answer(_: httpx.Request) -> httpx.Response:
        if len(left) == 1:
            traffic.stop()
        return left.pop(0)()

    monkeypatch.setattr(chaos_traffic, "new_client", lambda url: httpx.AsyncClient(base_url=url, transport=httpx.MockTransport(answer)))
    monkeypatch.setattr(chaos_traffic, "RETRY_S", 0.0)
    monkeypatch.setattr(chaos_traffic, "LEAVE_SHARE", 0.0)
    return traffic


def ok(pieces: list[bytes], then: Exception | None = None, **options: Any) -> Callable[[], httpx.Response]:
    return lambda: httpx.Response(200, stream=Said(pieces, then, **options))


def test_the_undisturbed_answer_is_no_problem_also_after_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = serve(monkeypatch, ok(WHOLE), ok(WHOLE[:2], httpx.ReadError("reset")), ok(WHOLE))
    asyncio.run(traffic.run())
    assert traffic.problems == [] and traffic.counts["finished"] == 2 and len(traffic.breaks) == 1


@pytest.mark.parametrize(
    ("pieces", "then", "reason"),
    [
        ([WHOLE[0], event(["x"]), *WHOLE[2:]], None, "instead of"),
        ([*WHOLE[:3], WHOLE[-1]], None, "instead of"),
        ([WHOLE[0], WHOLE[0], *WHOLE[1:]], None, "instead of"),
        ([WHOLE[0], event(["x"])], httpx.ReadError("reset"), "instead of"),
        (WHOLE[:-1], None, "without [DONE]"),
        ([WHOLE[0], b'data: {"error": {"code": "MemberLost"}}\n\n'], None, "MemberLost"),
    ],
    ids=["another token", "a token short", "a token twice", "another token before a break", "no end", "an error"],
)
def test_any_other_answer_is_a_problem(monkeypatch: pytest.MonkeyPatch, pieces: list[bytes], then: Exception | None, reason: str) -> None:
    traffic = serve(monkeypatch, ok(pieces, then), ok(WHOLE), ok(WHOLE))
    asyncio.run(traffic.run())
    assert len(traffic.problems) == 1 and reason in traffic.problems[0]


def test_an_error_status_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = serve(monkeypatch, lambda: httpx.Response(503, text="no decode rank"))
    asyncio.run(traffic.run())
    assert "503: no decode rank" in traffic.problems[0]


def test_a_request_that_does_not_end_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_traffic, "REQUEST_LIMIT_S", 0.05)
    traffic = serve(monkeypatch, ok(WHOLE, gap_s=0.04))
    asyncio.run(traffic.run())
    assert len(traffic.problems) == 1 and "not over after" in traffic.problems[0]


def levels(*, num_fds: int = 50, rss_bytes: int = 1 << 29, count: int = 2, shared: str = "", taken: str = "") -> Levels:
    found = tuple(Level("decode", pid, rss_bytes, num_fds, 30) for pid in range(count))
    return Levels(found, frozenset({"before", shared} - {""}), (taken,) if taken else ())


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (levels(num_fds=51 + FD_SLACK), "file descriptors"),
        (levels(rss_bytes=(1 << 29) + RSS_SLACK_BYTES + 1), "MiB"),
        (levels(count=3), "3 processes"),
        (levels(count=1), "1 processes"),
        (levels(shared="psm_1"), "/dev/shm: psm_1"),
        (levels(taken="decode/0.0: 3 pages, 1 slots"), "3 pages"),
    ],
    ids=["descriptors", "memory", "more processes", "fewer processes", "shared memory", "pages"],
)
def test_what_is_left_behind_is_named(after: Levels, reason: str) -> None:
    assert excess(levels(), levels(num_fds=50 + FD_SLACK)) == []
    (found,) = excess(levels(), after)
    assert reason in found


@pytest.mark.parametrize(
    ("words", "program"),
    [
        (["ray::IDLE", "", ""], "ray::IDLE"),
        (["ray::RankActor.run more words"], "ray::RankActor.run"),
        (["/a folder/.venv/bin/python", "-u", "/a folder/dashboard/agent.py", "--port=1"], "agent.py"),
        (["/a folder/core/gcs_server", "--config_list=" + "e" * 5000, "--log_dir=/a folder/logs"], "gcs_server"),
        (["python3", "-c", "from multiprocessing.spawn import spawn_main"], "from"),
        (["/usr/bin/python3", "-q"], "python"),
        ([""], "python"),
    ],
)
def test_a_process_is_known_by_its_program_or_script(words: list[str], program: str) -> None:
    assert program_of(words) == program
