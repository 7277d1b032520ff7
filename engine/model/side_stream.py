"""Work beside the main stream. The kernels of a small decode step fill no GPU: those that do not need each other run together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class SideStream:
    """Forks off while a CUDA graph is captured; anywhere else work is done at once, in the order of the program.

    What the work reads must exist when it is started, and what it returns may be used after the join, by the stream that joins (the main
    one, or another side, which the main one joins later). Pieces of work on one side come after each other.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, work: Callable[[], T]) -> Callable[[], T]:
        """Begin; the function that is returned joins, and gives the result."""
        if self._stream is None or not torch.cuda.is_current_stream_capturing():
            result = work()
            return lambda: result
        main, side = torch.cuda.current_stream(), self._stream
        side.wait_stream(main)
        with torch.cuda.stream(side):
            result, done = work(), side.record_event()

        def join() -> T:
            torch.cuda.current_stream().wait_event(done)
            return result

        return join
