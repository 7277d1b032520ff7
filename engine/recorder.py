"""CUDA graphs, and copies that the host does not wait for. All on the current stream, in the order of the calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy.typing as npt
import torch


class Graph(Protocol):
    def replay(self) -> None: ...


class Recorder(Protocol):
    """What `DecodeGraphs` asks of a device."""

    def record(self, body: Callable[[], None]) -> Graph:
        """`body` uses only memory that lasts, and its own."""
        ...

    def put(self, into: torch.Tensor, values: npt.NDArray[Any]) -> None:
        """Copy to the device, into contiguous memory. `values` may change as soon as this returns."""
        ...

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host, to be read when a later `mark` has been waited for."""
        ...

    def mark(self) -> Callable[[], None]:
        """A function that waits until all is done that was asked for before."""
        ...


class CudaRecorder:
    """Memory that the graphs use while they run is shared between them."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        """One for all bodies: torch keeps 32 MiB for cuBLAS for each stream that it was called on."""

    def record(self, body: Callable[[], None]) -> Graph:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            body()  # compiles what is not compiled yet
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            body()
        return graph

    def put(self, into: torch.Tensor, values: npt.NDArray[Any]) -> None:
        assert into.is_contiguous(), "a copy into strided memory takes memory of its own"
        into.copy_(torch.from_numpy(values).pin_memory(), non_blocking=True)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record()
        return event.synchronize
