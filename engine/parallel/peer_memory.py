"""Memory of every rank's GPU that all ranks of a group on one host can write: `PeerMemory(group, num_bytes, driver)`.

Each rank takes memory with cuMemAlloc, tells the others its handle over the group's store, and maps theirs (CUDA driver API, "Interprocess
communication"). Kernels then use `addresses` as they use their own memory; the GPUs carry it over NVLink, or PCIe where there is none.
A rank needs to see no GPU but its own.
"""

from __future__ import annotations

import ctypes
import pathlib
from typing import Any

from core.errors import ConfigError, GroupLost
from core.log import get_logger
from engine.parallel.group import Group

log = get_logger("peers")

ENABLE_PEER_ACCESS = 1
"""CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS"""
GRANULE = 2**21
"""What the driver hands out at a time: nothing else shares what the peers map."""
BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")
"""Equal in all containers of a host, and on no other."""


class _Handle(ctypes.Structure):
    """CUipcMemHandle"""

    _fields_ = [("reserved", ctypes.c_char * 64)]


class PeerMemory:
    """Owner of a rank's memory and of its views of the others'."""

    def __init__(self, group: Group, num_bytes: int, driver: Any, host: str = "") -> None:
        """Collective. `driver`: libcuda, with the context of this rank's GPU current; `host`: what names it, "" is the boot's id. Every
        byte is 0xFF. Raises ConfigError on all ranks alike, saying what is in the way; GroupLost."""
        self._group, self._driver = group, driver
        self._size = -(-num_bytes // GRANULE) * GRANULE
        self._mine = 0
        self._context = ctypes.c_void_p()
        """CUcontext; current in the thread that opens, and not in every one that closes."""
        self._peers: dict[int, int] = {}
        try:
            self._open((host or BOOT_ID.read_text().strip()).encode())
        except ConfigError:
            self.close()
            raise
        self.addresses = tuple(self._peers.get(rank, self._mine) for rank in range(group.size))
        """Of the first byte, by rank."""

    def close(self) -> None:
        """Collective, in any thread: a view ends when nobody uses it any more, and memory when it has no views. If a rank is gone, the
        process's end gives both back."""
        try:
            self._group.barrier()
            self._call("cuCtxSetCurrent", self._context)
            self._call("cuCtxSynchronize")
            for rank, address in self._peers.items():
                self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address), of=rank)
            self._group.barrier()
        except GroupLost as error:
            log.info("peers.left", member=self._group.seat.member, error=error)
            return
        if self._mine:
            self._call("cuMemFree_v2", ctypes.c_uint64(self._mine))

    def _open(self, host: bytes) -> None:
        try:
            handle = self._export()
        except ConfigError as error:
            self._agreed(str(error), b"")
            raise AssertionError("a reason is an agreement to leave it")  # _agreed has raised
        found = self._agreed("", host + b" " + handle)
        hosts = [one[: -len(handle) - 1] for one in found]
        if set(hosts) != {host}:
            raise ConfigError("the ranks are on several hosts")
        reason = ""
        try:
            for rank, one in enumerate(found):
                if rank != self._group.rank:
                    self._peers[rank] = self._import(rank, one[-len(handle) :])
        except ConfigError as error:
            reason = str(error)
        self._agreed(reason, b"")

    def _agreed(self, reason: str, mine: bytes) -> list[bytes]:
        """Everybody's. Raises ConfigError on all ranks if one has a reason against it."""
        message = b"-" + reason.encode() if reason else b"+" + mine
        found = self._group.gather_bytes("peer_memory", message)
        reasons = [f"{self._group.seat.member_of(rank)}: {one[1:].decode()}" for rank, one in enumerate(found) if one[:1] == b"-"]
        if reasons:
            raise ConfigError("; ".join(reasons))
        return [one[1:] for one in found]

    def _export(self) -> bytes:
        address, handle = ctypes.c_uint64(), _Handle()
        self._call("cuCtxGetCurrent", ctypes.byref(self._context))
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(self._size))
        self._mine = address.value
        self._call("cuMemsetD8_v2", address, ctypes.c_ubyte(0xFF), ctypes.c_size_t(self._size))
        self._call("cuCtxSynchronize")
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return ctypes.string_at(ctypes.addressof(handle), ctypes.sizeof(handle))

    def _import(self, rank: int, handle: bytes) -> int:
        address = ctypes.c_uint64()
        copy = _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), copy, ctypes.c_uint(ENABLE_PEER_ACCESS), of=rank)
        return address.value

    def _call(self, name: str, *arguments: Any, of: int | None = None) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            whose = "" if of is None else f" for the memory of rank {of}"
            raise ConfigError(f"{name} failed with CUDA error {status}{whose}")
