"""A group of ranks: one replica of a role, each rank a process (in tests a thread) with one device and its own sequences.

    rendezvous = Rendezvous("10.0.0.7")                     # in the process of rank 0
    group = Group.join(Seat(rank=0, size=4, name="decode/0", host="10.0.0.7", rendezvous=rendezvous.address), limits, rendezvous)

Rank 0 keeps a key-value store; the controller tells every rank its address. A new life of the group has a new store, so a rank of an
earlier life cannot join. Nothing here is global: several ranks, of several groups, may live in one process.
"""

from __future__ import annotations

import contextlib
import datetime
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]  # exported, but not said so

from core.errors import GroupLost


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long a rank waits for its peers, in seconds; then it gives itself up."""

    start_s: float
    step_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """A rank's place in its group."""

    rank: int
    size: int
    name: str
    """Of the group: "decode/0"."""
    host: str
    """Address under which the peers reach this rank."""
    rendezvous: str
    """host:port of rank 0's store."""

    @property
    def member(self) -> str:
        return self.member_of(self.rank)

    def member_of(self, rank: int) -> str:
        """The name of a rank as everyone else knows it: "decode/0.1"."""
        return f"{self.name}.{rank}"


class Rendezvous:
    """The store of a group, in the process of rank 0; listens on `host` only. Lives as long as the rank."""

    def __init__(self, host: str) -> None:
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512)
        port = int(listener.getsockname()[1])
        self.address = f"{host}:{port}"
        self.store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


class Group:
    """Owner of a rank's connections to its peers for tensors. Collective calls: every rank makes them in the same order."""

    def __init__(self, seat: Seat, store: TCPStore, limits: Limits) -> None:
        self.seat, self.store, self.limits = seat, store, limits
        self._backends: dict[tuple[str, int], Any] = {}
        self._closers: list[Callable[[], None]] = []
        self._mourners: list[Callable[[], None]] = []
        self._gathered = 0

    @staticmethod
    def join(seat: Seat, limits: Limits, rendezvous: Rendezvous | None = None) -> Group:
        """Returns when all ranks are there. `rendezvous`: that of rank 0. Raises GroupLost after `limits.start_s`."""
        timeout = datetime.timedelta(seconds=limits.start_s)
        with _lost(seat, f"did not form within {limits.start_s:g} s"):
            if rendezvous is None:
                host, _, port = seat.rendezvous.rpartition(":")
                store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)
            else:
                store = rendezvous.store
                store.set_timeout(timeout)
            group = Group(seat, store, limits)
            group.backend(torch.device("cpu"))
        return group

    @property
    def rank(self) -> int:
        return self.seat.rank

    @property
    def size(self) -> int:
        return self.seat.size

    def backend(self, device: torch.device, part: int = 0) -> Any:
        """The process group for tensors of a device: gloo for the CPU, NCCL for GPUs. `part`: of the `part` ranks that follow each other
        from a multiple of it on, and that this rank is one of; 0: of all. Made at the first call, which is collective."""
        if (device.type, part) not in self._backends:
            size = part or self.size
            store = PrefixStore(f"{device.type}/{part}/{self.rank // size}", self.store)
            timeout = datetime.timedelta(seconds=self.limits.step_s)
            make = self._nccl if device.type == "cuda" else self._gloo
            self._backends[device.type, part] = make(store, self.rank % size, size, timeout)
        return self._backends[device.type, part]

    def _gloo(self, store: PrefixStore, rank: int, size: int, timeout: datetime.timedelta) -> Any:
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=self.seat.host)]
        options._timeout = datetime.timedelta(seconds=self.limits.start_s)
        backend: Any = ProcessGroupGloo(store, rank, size, options)
        backend.barrier().wait()
        backend.set_timeout(timeout)
        return backend

    def _nccl(self, store: PrefixStore, rank: int, size: int, timeout: datetime.timedelta) -> Any:
        from torch.distributed import ProcessGroupNCCL

        options: Any = ProcessGroupNCCL.Options()
        options._timeout = timeout
        return ProcessGroupNCCL(store, rank, size, options)

    def close(self) -> None:
        """Leave: peers that are waiting, or will, raise GroupLost."""
        for key in [(device, part) for device, part in self._backends if part and device == "cpu"]:
            del self._backends[key]  # a rank that waits for another's word has to be free for what closers do together
        while self._closers:
            self._closers.pop()()
        self._backends.clear()

    def before_close(self, close: Callable[[], None]) -> None:
        """Have something closed that uses the group, the latest first."""
        self._closers.append(close)

    def when_lost(self, call: Callable[[], None]) -> None:
        """Have something called when a rank is known to be gone, or this one goes, from any thread: what waits on a device is to end. It
        may be called several times."""
        self._mourners.append(call)

    def lose(self) -> None:
        """A rank is gone, or stuck, or is leaving."""
        for call in self._mourners:
            call()

    def exchange_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """int64 [size] on the CPU: how many rows go to each rank -> how many come from each."""
        assert counts.shape == (self.size,) and counts.dtype == torch.int64, f"{counts.shape} {counts.dtype}"
        received = torch.empty_like(counts)
        with self.working("the exchange of row counts"):
            self.backend(counts.device).alltoall_base(received, counts, [], []).wait()
        return received

    def all_to_all(self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """rows: [sum(sent), ...] in the order of their destinations -> [sum(received), ...] in the order of their sources."""
        assert len(rows) == sum(sent), f"{len(rows)} rows, {sent}"
        out = rows.new_empty(sum(received), *rows.shape[1:])
        with self.working("the exchange of rows"):
            self.backend(rows.device).alltoall_base(out, rows.contiguous(), list(received), list(sent)).wait()
        return out

    def swap(self, parts: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> Callable[[], None]:
        """parts[r] goes to rank r, into[r] comes from it, for all ranks but this one, whose own entries are left alone. All contiguous.
        What is returned waits for it, on a GPU the current stream, and raises GroupLost if it does not come."""
        backend = self.backend(parts[0].device)
        others = [rank for rank in range(self.size) if rank != self.rank]
        what = "the exchange of parts"
        with self.working(what):
            if parts[0].is_cuda:
                nothing = parts[0].new_empty(0)  # neither sent nor waited for
                sent, received = ([one[rank] if rank in others else nothing for rank in range(self.size)] for one in (parts, into))
                works = [backend.alltoall(received, sent)]
            else:
                works = [backend.recv([into[rank]], rank, 0) for rank in others] + [backend.send([parts[rank]], rank, 0) for rank in others]

        def wait() -> None:
            with self.working(what):
                for work in works:
                    work.wait()

        return wait

    def gather_bytes(self, name: str, mine: bytes) -> list[bytes]:
        """Everybody's, in the order of ranks; for the opening of things, over the store. Waits for `limits.start_s`. Raises GroupLost."""
        self._gathered += 1
        key = f"{name}/{self._gathered}"
        with _lost(self.seat, f"lost a rank, or waited over {self.limits.start_s:g} s, in the gathering of {name}"):
            self.store.set(f"{key}/{self.rank}", mine)  # type: ignore[arg-type]  # bytes are taken, too
            return [bytes(self.store.get(f"{key}/{rank}")) for rank in range(self.size)]

    def barrier(self) -> None:
        """All ranks are here, within `limits.step_s`. Raises GroupLost."""
        with self.working("the wait for all ranks"):
            self.backend(torch.device("cpu")).barrier().wait()

    def working(self, what: str) -> contextlib.AbstractContextManager[None]:
        """What is done inside needs all peers; a failure of the connections raises GroupLost."""
        return _lost(self.seat, f"lost a rank, or waited over {self.limits.step_s:g} s, in {what}")


@contextlib.contextmanager
def _lost(seat: Seat, what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:  # torch.distributed raises RuntimeError for closed connections and deadlines alike
        raise GroupLost(f"{seat.member}: the group of {seat.size} {what}: {str(error).splitlines()[0][:200]}") from error
