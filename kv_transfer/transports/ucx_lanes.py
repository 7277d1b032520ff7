"""Which lanes UCX chose for a connection. NIXL does not say it, so UCX is asked directly, in the process and about NIXL's own endpoints:

    before = endpoints()
    agent.add_remote_agent(...)              # makes endpoints
    lanes_of(endpoints() - before)           # ("tcp/lo", "cma/memory")

`ucp_ep_query` is UCX's public call for it (since 1.14). The endpoints' addresses come from UCX's tree
of live objects (`ucs_vfs_path_list_dir`, which serves UCX's debugging file system), where each has an entry with its address for a name.
Where either is missing the answer is empty, never wrong. Tried with UCX 1.23 as NIXL 1.5.1 brings it. To be called from the thread that
owns the NIXL agent.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import re

MAX_LANES = 64
TRANSPORTS = 1 << 3
"""UCP_EP_ATTR_FIELD_TRANSPORTS: fill in `transports` only."""
OK = 0
LIBRARY = re.compile(r"/lib(ucp|ucs)[-.][^/]*$")
ADDRESS = re.compile(r"0x[0-9a-f]+")
NOT_ON_THE_WAY = {"counters", "keepalive", "memory_address"}

_Visit = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
"""UCX calls it with (name, argument) and its own lock held. It must run no Python code: that might hand the interpreter's lock to another
agent's thread, which would wait for UCX's with it, for ever. So it is a list's `append`, which takes the name and leaves the argument."""


class _Lane(ctypes.Structure):
    """ucp_transport_entry_t"""

    _fields_ = [("transport", ctypes.c_char_p), ("device", ctypes.c_char_p)]


class _Attributes(ctypes.Structure):
    """ucp_ep_attr_t: mask, name, two socket addresses, the transports, user data."""

    _fields_ = [
        ("mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_address", ctypes.c_char * 128),
        ("remote_address", ctypes.c_char * 128),
        ("lanes", ctypes.POINTER(_Lane)),
        ("num_lanes", ctypes.c_uint),
        ("lane_bytes", ctypes.c_size_t),
        ("user_data", ctypes.c_void_p),
    ]


@functools.cache
def _library(name: str) -> ctypes.PyDLL | None:
    """The "ucp" or "ucs" that NIXL has loaded; None if there is no such, or if there are several. Calls keep the interpreter's lock: UCX
    calls `visit` with a lock of its own held, which another agent's thread of this process may wait for with the interpreter's."""
    mapped = {line.split(maxsplit=5)[-1] for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if "/libuc" in line}
    paths = [path for path in mapped if (match := LIBRARY.search(path)) and match[1] == name]
    bundled = [path for path in paths if "nixl" in path]
    found = bundled or paths
    return ctypes.PyDLL(found[0]) if len(found) == 1 else None


def endpoints() -> frozenset[int]:
    """Addresses of this process's UCX endpoints."""
    ucs = _library("ucs")
    if ucs is None or not hasattr(ucs, "ucs_vfs_path_list_dir"):
        return frozenset()
    found: set[int] = set()
    paths = ["/ucp/context"]
    while paths:
        path = paths.pop()
        found_here: list[bytes] = []
        if ucs.ucs_vfs_path_list_dir(path.encode(), _Visit(found_here.append), None) != OK:
            continue  # a file
        names = [name.decode() for name in found_here]
        if path.endswith("/ep"):
            found.update(int(name, 16) for name in names if ADDRESS.fullmatch(name))
        else:
            paths += [f"{path}/{name}" for name in names if name not in NOT_ON_THE_WAY]
    return frozenset(found)


def lanes_of(some_endpoints: frozenset[int]) -> tuple[str, ...]:
    """Those of living endpoints, each once: "transport/device"."""
    ucp = _library("ucp")
    if ucp is None or not hasattr(ucp, "ucp_ep_query"):
        return ()
    found: dict[str, None] = {}
    for address in sorted(some_endpoints):
        lanes = (_Lane * MAX_LANES)()
        asked = _Attributes(mask=TRANSPORTS, lanes=lanes, num_lanes=MAX_LANES, lane_bytes=ctypes.sizeof(_Lane))
        if ucp.ucp_ep_query(ctypes.c_void_p(address), ctypes.byref(asked)) == OK:
            found.update((f"{lane.transport.decode()}/{lane.device.decode()}", None) for lane in lanes[: asked.num_lanes])
    return tuple(found)
