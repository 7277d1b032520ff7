"""Ranks of a group as threads of one process: real connections over loopback, no processes to start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from engine.parallel.group import Group, Limits, Rendezvous, Seat

T = TypeVar("T")

LIMITS = Limits(start_s=20.0, step_s=20.0)


def seats(size: int, name: str = "decode/0") -> tuple[Rendezvous, list[Seat]]:
    rendezvous = Rendezvous("127.0.0.1")
    return rendezvous, [Seat(rank=rank, size=size, name=name, host="127.0.0.1", rendezvous=rendezvous.address) for rank in range(size)]


def run_group(size: int, work: Callable[[Group], T], limits: Limits = LIMITS) -> list[T]:
    """What `work(group)` returns on each rank, in order. Raises the first rank's error, if any."""
    rendezvous, places = seats(size)
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def run(seat: Seat) -> None:
        try:
            results[seat.rank] = work(Group.join(seat, limits, rendezvous if seat.rank == 0 else None))
        except BaseException as error:
            errors[seat.rank] = error

    threads = [threading.Thread(target=run, args=(seat,)) for seat in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for rank in sorted(errors):
        raise errors[rank]
    return [results[rank] for rank in range(size)]
