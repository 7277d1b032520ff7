"""Work beside the main stream. The kernels of a small decode step fill no GPU: those that do not need each other run together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class SideStream:
    """Forks off while a CUDA graph is captured; anywhere else work is done in the order of the program, at its start or (`late`) its join.

    What the work reads must exist when it is started, and what it returns may be used after the join, by the stream that joins (the main
    one, or another side, which the main one joins later). Pieces of work on one side come after each other.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, work: Callable[[], T], late: bool = False) -> Callable[[], T]:
        """Begin; the function that is returned joins, and gives the result, as often as it is called."""
        if self._stream is None or not torch.cuda.is_current_stream_capturing():
            do = functools.cache(work)
            if not late:
                do()
            return do
        main, side = torch.cuda.current_stream(), self._stream
        side.wait_stream(main)
        with torch.cuda.stream(side):
            result, done = work(), side.record_event()

        def join() -> T:
            torch.cuda.current_stream().wait_event(done)
            return result

        return join
