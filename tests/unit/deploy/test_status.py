"""What `baton status` and the commands that wait say about a cluster."""

from __future__ import annotations

import pytest

from core.request import Member
from deploy import lifecycle
from deploy.control import misfits
from deploy.status import duration, render, table
from protos import common_pb2, control_pb2


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59, "59s"), (192, "3m12s"), (18_420, "5h07m"), (183_600, "2d03h")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_tables_line_up_and_drop_empty_columns() -> None:
    assert table(["MEMBER", "PID", "NOTE"], [("a", "1", ""), ("long", "12345", "")]) == ["MEMBER    PID", "a           1", "long    12345"]


def row(role: str, state: str = "ready", **fields: object) -> control_pb2.RankStatus:
    member = common_pb2.Member(role=role, replica=0, rank=0, state=state, address="127.0.0.1:1")
    return control_pb2.RankStatus(member=member, **fields)


def test_the_status_page_shows_members_problems_and_events() -> None:
    load = common_pb2.Load(num_running=3, pages_free=7, pages_total=8)
    page = render(
        control_pb2.ClusterStatus(
            name="demo",
            model="m",
            ranks=[row("decode", pid=77, uptime_s=61, load=load), row("prefill", "backoff", note="no\nroom")],
            routers=[row("router", pid=5)],
            desired_replicas={"router": 1, "prefill": 1, "decode": 1},
            problems=["prefill/0: no room"],
            events=[f"event {i}" for i in range(9)],
        )
    )
    assert page.startswith("demo: m, router 1/1, prefill 0/1, decode 1/1 ready, changing")
    lines = page.splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["router/0.0", "prefill/0.0", "decode/0.0"]
    assert "no room" in lines[4] and "7/8" in lines[5] and "1m01s" in lines[5]
    assert "  prefill/0: no room" in lines and lines[-1] == "  event 8" and "  event 3" not in lines


def test_only_changes_are_said() -> None:
    said: list[str] = []
    seen: dict[str, str] = {}
    for state in ("starting", "starting", "ready"):
        lifecycle.say_changes(control_pb2.ClusterStatus(ranks=[row("decode", state)], routers=[row("router")]), seen, said.append)
    lifecycle.say_changes(control_pb2.ClusterStatus(routers=[row("router")]), seen, said.append)
    assert said == ["  decode/0.0 starting", "  decode/0.0 ready", "  decode/0.0 gone"]


def test_ranks_that_fit_nobody_are_named() -> None:
    def member(role: str, fingerprint: str) -> Member:
        return Member(role=role, replica=0, rank=0, address="", incarnation=1, fingerprint=fingerprint)

    assert misfits([member("prefill", "a"), member("decode", "a"), member("router", "")]) == []
    assert misfits([member("prefill", "a")]) == []
    assert misfits([member("prefill", "a"), member("decode", "b")]) == [
        "prefill/0.0: KV layout a fits no decode rank (b)",
        "decode/0.0: KV layout b fits no prefill rank (a)",
    ]
