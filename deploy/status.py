"""What `baton status` prints, from a control_pb2.ClusterStatus. Pure text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HEADER = ("MEMBER", "STATE", "NODE", "PID", "UPTIME", "RESTARTS", "RUNNING", "WAITING", "PAGES", "SLOTS", "ADDRESS", "NOTE")
RIGHT = {"PID", "UPTIME", "RESTARTS", "RUNNING", "WAITING", "PAGES", "SLOTS"}
MAX_EVENTS = 5


def render(status: Any) -> str:
    """The whole page, without a newline at the end."""
    wanted = status.desired_replicas
    counts = []
    for role in ("router", "prefill", "decode"):
        rows = [row for row in (*status.routers, *status.ranks) if row.member.role == role]
        ready = len({row.member.replica for row in rows if row.member.state == "ready"})
        counts.append(f"{role} {ready}/{wanted[role]}")
    state = "settled" if status.settled else "changing"
    lines = [
        f"{status.name}: {status.model}, {', '.join(counts)} ready, {state}, controller up {duration(status.controller_uptime_s)}",
        "",
        *table(HEADER, [_row(row) for row in sorted((*status.routers, *status.ranks), key=_order)]),
    ]
    if status.problems:
        lines += ["", "problems:", *(f"  {problem}" for problem in status.problems)]
    if status.events:
        lines += ["", "latest events:", *(f"  {event}" for event in status.events[-MAX_EVENTS:])]
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; columns that are empty throughout are left out."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)] or [0]
    widths = [max(len(header[i]), *(len(row[i]) for row in rows)) if rows else len(header[i]) for i in kept]

    def line(cells: Sequence[str]) -> str:
        padded = (cells[i].rjust(w) if header[i] in RIGHT else cells[i].ljust(w) for i, w in zip(kept, widths, strict=True))
        return "  ".join(padded).rstrip()

    return [line(header), *(line(row) for row in rows)]


def duration(seconds: float) -> str:
    """ "42s", "3m12s", "5h07m", "2d03h"."""
    whole = int(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 60:
        return f"{whole}s"
    if hours == 0:
        return f"{minutes}m{whole % 60:02}s"
    return f"{hours}h{minutes % 60:02}m" if days == 0 else f"{days}d{hours % 24:02}h"


def _order(row: Any) -> tuple[int, int, int]:
    return ("router", "prefill", "decode").index(row.member.role), row.member.replica, row.member.rank


def _row(row: Any) -> tuple[str, ...]:
    load, is_up = row.load, row.pid > 0
    return (
        f"{row.member.role}/{row.member.replica}.{row.member.rank}",
        row.member.state,
        row.node,
        str(row.pid) if is_up else "",
        duration(row.uptime_s) if is_up else "",
        str(row.restarts),
        str(load.num_running) if is_up else "",
        str(load.num_waiting) if is_up else "",
        f"{load.pages_free}/{load.pages_total}" if load.pages_total else "",
        f"{load.slots_free}/{load.slots_total}" if load.slots_total else "",
        row.member.address,
        " ".join(row.note.split())[:120],
    )
