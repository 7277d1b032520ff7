"""What the connection to a peer travels over, and whether something faster was to be expected. Pure, but for `this_machine`.

A *lane* is one transport on one device that UCX chose for a connection, written as UCX does: "tcp/lo", "cma/memory",
"rc_mlx5/mlx5_0:1", "cuda_ipc/cuda". A connection has several; its *path* is the fastest of them.
"""

from __future__ import annotations

import enum
import functools
import pathlib
from dataclasses import dataclass

BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")
RDMA_DEVICES = pathlib.Path("/sys/class/infiniband")


class Path(enum.StrEnum):
    CUDA_IPC = "cuda_ipc"
    """From GPU to GPU: NVLink, or PCIe where there is none."""
    RDMA = "rdma"
    SHARED_MEMORY = "shared_memory"
    TCP = "tcp"
    UNKNOWN = "unknown"
    """The transport cannot say."""


_PATHS = {
    "cuda_ipc": Path.CUDA_IPC,
    "rc": Path.RDMA,
    "dc": Path.RDMA,
    "ud": Path.RDMA,
    "srd": Path.RDMA,
    "gga": Path.RDMA,
    "sysv": Path.SHARED_MEMORY,
    "posix": Path.SHARED_MEMORY,
    "cma": Path.SHARED_MEMORY,
    "knem": Path.SHARED_MEMORY,
    "xpmem": Path.SHARED_MEMORY,
    "tcp": Path.TCP,
}
"""By the name of the transport, up to its first "_" where the whole is not listed ("rc_mlx5", "ud_verbs")."""


@dataclass(frozen=True, slots=True)
class Machine:
    identity: str
    """Equal in all processes of a running kernel, across containers and network namespaces; "" if it cannot be told."""
    has_rdma: bool
    """A port of an RDMA device is up."""


@functools.cache
def this_machine() -> Machine:
    states = RDMA_DEVICES.glob("*/ports/*/state")
    return Machine(BOOT_ID.read_text().strip() if BOOT_ID.exists() else "", any("ACTIVE" in state.read_text() for state in states))


def path_of(lanes: tuple[str, ...]) -> Path:
    """The fastest of them; UNKNOWN if none is known here."""
    found = set()
    for lane in lanes:
        name = lane.partition("/")[0]
        found.add(_PATHS.get(name) or _PATHS.get(name.partition("_")[0], Path.UNKNOWN))
    return next((path for path in Path if path in found), Path.UNKNOWN)


def expected_path(*, memory: str, is_same_machine: bool, has_rdma: bool) -> Path:
    """The least that two ranks should get. `memory`: "VRAM" if both ends are, else "DRAM"."""
    if is_same_machine:
        return Path.CUDA_IPC if memory == "VRAM" else Path.SHARED_MEMORY
    return Path.RDMA if has_rdma else Path.TCP


def is_slower(path: Path, expected: Path) -> bool:
    """Whether `path` is known and slower than `expected`."""
    order = list(Path)
    return path is not Path.UNKNOWN and order.index(path) > order.index(expected)
