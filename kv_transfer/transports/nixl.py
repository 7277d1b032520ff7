"""NIXL over UCX: NVLink, RDMA, shared memory or TCP, as UCX finds them.

Each side's pages and slots form one prepared descriptor list (pieces 0..num_pages-1 are pages, then come the slots), so a write is two
index arrays. There is no progress thread: it would spin a core; both sides poll instead.

Measured with 1.5.1 over TCP: releasing a handle and `remove_remote_agent` stop nothing, on neither side (1,200 of 1,200 pages still
landed); destroying the agent does (on the receiver no page landed any more, on the sender 20 to 30, from socket buffers). Hence `reset`.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import ConfigError, TransferFailed
from core.log import get_logger
from core.region import Region
from kv_transfer.config import TransferConfig
from kv_transfer.transport import Polled, Write
from kv_transfer.transports.ucx_lanes import endpoints, lanes_of

log = get_logger("nixl")


def _strided(pages: Region, slots: Region) -> np.ndarray:
    rows = [(r.address, r.piece_bytes, r.device_id, r.piece_bytes, r.num_pieces) for r in (pages, slots)]
    return np.array(rows, dtype=np.uint64)


@dataclass(slots=True)
class _Peer:
    agent: str
    pieces: Any
    num_pages: int


class NixlTransport:
    def __init__(self, config: TransferConfig, name: str) -> None:
        self._config, self._name = config, name
        self._num_resets = 0
        self._agent: Any = None
        self._own: Any = None
        self._regions: tuple[Region, Region] | None = None
        self._peers: dict[str, _Peer] = {}
        self._writes: dict[int, tuple[str, Any]] = {}
        self._finished: list[tuple[int, bool]] = []
        self._next_write = 0

    def register(self, pages: Region, slots: Region) -> bytes:
        assert self._agent is None, "registered once"
        assert pages.memory == slots.memory, f"{pages.memory=} {slots.memory=}"
        self._config.apply_to_environment()
        try:
            from nixl_cu13._api import nixl_agent, nixl_agent_config  # after the environment is set
        except ImportError as error:
            raise ConfigError("transfer.transport is 'nixl', but the package nixl-cu13 is not installed") from error
        settings = nixl_agent_config(enable_prog_thread=False, num_threads=self._config.num_threads, backends=["UCX"])
        self._agent = nixl_agent(f"{self._name}/{self._num_resets}", settings)
        for region in (pages, slots):
            self._agent.register_memory([(region.address, region.num_bytes, region.device_id, "")], mem_type=region.memory)
        self._regions = (pages, slots)
        self._own = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", _strided(pages, slots), mem_type=pages.memory)
        metadata: bytes = self._agent.get_agent_metadata()
        return metadata

    def connect(self, peer: str, agent: bytes, pages: Region, slots: Region) -> tuple[str, ...]:
        before = endpoints()
        try:
            name = self._agent.add_remote_agent(agent)
            name = name.decode() if isinstance(name, bytes) else name
            pieces = self._agent.prep_xfer_dlist(name, _strided(pages, slots), mem_type=pages.memory)
        except Exception as error:  # the bindings raise their own exception types, all derived from Exception
            raise TransferFailed(f"cannot connect to {peer}: {error}") from error
        self._peers[peer] = _Peer(name, pieces, pages.num_pieces)
        return lanes_of(endpoints() - before)

    def disconnect(self, peer: str) -> None:
        known = self._peers.pop(peer, None)
        if known is None:
            return
        unfinished = [write_id for write_id, (owner, _) in self._writes.items() if owner == peer]
        assert not unfinished, f"writes {unfinished} to {peer} are unfinished"
        for release in (known.pieces.release, lambda: self._agent.remove_remote_agent(known.agent)):
            try:
                release()
            except Exception as error:  # a dead peer's endpoint may already be gone; nothing more can be done about it
                log.debug("nixl.disconnect", peer=peer, error=repr(error))

    def write(self, peer: str, write: Write) -> int:
        known = self._peers.get(peer)
        if known is None:
            raise TransferFailed(f"not connected to {peer}")
        assert self._regions is not None, "register comes first"
        local = [page for page, _ in write.pages]
        remote = [page for _, page in write.pages]
        if write.slot is not None:
            local.append(self._regions[0].num_pieces + write.slot[0])
            remote.append(known.num_pages + write.slot[1])
        here, there = np.array(local, dtype=np.int32), np.array(remote, dtype=np.int32)
        try:
            handle = self._agent.make_prepped_xfer("WRITE", self._own, here, known.pieces, there, write.notification)
            state = self._agent.transfer(handle)
        except Exception as error:  # see connect
            raise TransferFailed(f"write to {peer} refused: {error}") from error
        write_id = self._next_write
        self._next_write += 1
        self._writes[write_id] = (peer, handle)
        if state != "PROC":
            self._finish(write_id, state == "DONE")
        return write_id

    def poll(self) -> Polled:
        for write_id, (peer, handle) in list(self._writes.items()):
            try:
                state = self._agent.check_xfer_state(handle)
            except Exception as error:  # see connect
                log.warning("nixl.write_failed", peer=peer, error=repr(error))
                state = "ERR"
            if state != "PROC":
                self._finish(write_id, state == "DONE")
        received = self._agent.get_new_notifs()
        finished, self._finished = tuple(self._finished), []
        return Polled(finished, tuple(note for notes in received.values() for note in notes))

    def _finish(self, write_id: int, succeeded: bool) -> None:
        _, handle = self._writes.pop(write_id)
        _release(handle)
        self._finished.append((write_id, succeeded))

    def reset(self) -> bytes:
        assert self._regions is not None, "register comes first"
        self.close()
        self._num_resets += 1
        return self.register(*self._regions)

    def close(self) -> None:
        """Destroy the agent, and with it every connection. The memory stays allocated."""
        for _, handle in self._writes.values():
            _release(handle)
        for peer in self._peers.values():
            _release(peer.pieces)
        if self._own is not None:
            _release(self._own)
        self._writes.clear()
        self._peers.clear()
        self._finished.clear()
        self._own = self._agent = None
        gc.collect()  # the bindings destroy an agent with its last reference, and handles refer to it


def _release(handle: Any) -> None:
    try:
        handle.release()
    except Exception as error:  # still active, or its endpoint is broken: it goes with the agent
        log.debug("nixl.release", error=repr(error))
