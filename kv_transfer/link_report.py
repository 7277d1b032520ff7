"""What each link of a prefill rank travels over: logged when it is made, kept as a metric and as a line for `baton status`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from core.log import get_logger
from kv_transfer.lanes import Machine, Path, expected_path, is_slower, path_of
from kv_transfer.metrics import SenderMetrics

log = get_logger("sender")


LARGE_BYTES, LEAST_RATE = 16 * 2**20, 1e9
"""A write of so many bytes over CUDA IPC or RDMA that makes fewer bytes/s does not really travel there: its memory could not be mapped."""


@dataclass(frozen=True, slots=True)
class _Made:
    peer: str
    path: Path
    expected: Path


class LinkReport:
    """Owner of what is known about the links. Belongs to the sender's thread; `summary` may be read by any."""

    def __init__(self, metrics: SenderMetrics, machine: Machine, memory: str) -> None:
        """`memory`: where this end's pages lie, "DRAM" or "VRAM"."""
        self._metrics, self._machine, self._memory = metrics, machine, memory
        self._links: dict[str, _Made] = {}
        self._crawling: dict[str, float] = {}
        """Link -> bytes/s, of those that are slower than their path can be."""
        self.summary = ""
        """"decode/1.0 over tcp (cuda_ipc expected), decode/2.0 over cuda_ipc at 0.3 GB/s, 2 links over cuda_ipc"; "" without a link
        whose path is known."""

    def made(self, link: str, peer: str, lanes: tuple[str, ...], machine: str, memory: str) -> None:
        """A link to a decode rank. `machine` and `memory` are the peer's; machine "": it did not say."""
        both = "VRAM" if self._memory == memory == "VRAM" else "DRAM"
        expected = expected_path(
            memory=both, is_same_machine=bool(machine) and machine == self._machine.identity, has_rdma=self._machine.has_rdma
        )
        path = path_of(lanes)
        log.info("transfer.connected", peer=peer, path=str(path), lanes=",".join(lanes), memory=both)
        if is_slower(path, expected):
            log.warning("transfer.slow_path", peer=peer, path=str(path), expected=str(expected), lanes=",".join(lanes))
        if path is not Path.UNKNOWN:
            self._links[link] = _Made(peer, path, expected)
            self._show()

    def wrote(self, link: str, num_bytes: int, seconds: float) -> None:
        """A write is out, so long after it was posted."""
        made = self._links.get(link)
        if made is None or made.path not in (Path.CUDA_IPC, Path.RDMA) or link in self._crawling:
            return
        if num_bytes >= LARGE_BYTES and num_bytes < LEAST_RATE * seconds:
            self._crawling[link] = num_bytes / seconds
            log.warning("transfer.slow_rate", peer=made.peer, path=str(made.path), num_bytes=num_bytes, seconds=seconds)
            self._show()

    def gone(self, link: str) -> None:
        self._crawling.pop(link, None)
        if self._links.pop(link, None) is not None:
            self._show()

    def _show(self) -> None:
        self._metrics.links.clear()
        slow, good = [], Counter[Path]()
        for link, made in self._links.items():
            self._metrics.links.labels(made.peer, str(made.path)).set(1)
            if is_slower(made.path, made.expected):
                slow.append(f"{made.peer} over {made.path} ({made.expected} expected)")
            elif link in self._crawling:
                slow.append(f"{made.peer} over {made.path} at {self._crawling[link] / 1e9:.1f} GB/s")
            else:
                good[made.path] += 1
        self._metrics.slow_links.set(len(slow))
        self.summary = ", ".join([*sorted(slow), *(f"{count} link{'s' * (count > 1)} over {path}" for path, count in sorted(good.items()))])
