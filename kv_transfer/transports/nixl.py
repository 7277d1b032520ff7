"""NIXL over UCX: NVLink, RDMA, shared memory or TCP, as UCX finds them.

Each side's pages and slots form one prepared descriptor list (pieces 0..num_pages-1 are pages, then come the slots), so a write is two
index arrays. There is no progress thread: it would spin a core; both sides poll instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import TransferFailed
from core.log import get_logger
from kv_transfer.config import TransferConfig
from kv_transfer.transport import Polled, Region, Write

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
        config.apply_to_environment()
        from nixl_cu13._api import nixl_agent, nixl_agent_config  # after the environment is set

        self._agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, num_threads=config.num_threads, backends=["UCX"]))
        self._own: Any = None
        self._num_pages = 0
        self._registered: list[Any] = []
        self._peers: dict[str, _Peer] = {}
        self._writes: dict[int, tuple[str, Any]] = {}
        self._finished: list[tuple[int, bool]] = []
        self._next_write = 0

    def register(self, pages: Region, slots: Region) -> bytes:
        assert self._own is None, "registered once, never freed: a peer with old metadata could crash this process"
        for region in (pages, slots):
            descriptors = [(region.address, region.num_bytes, region.device_id, "")]
            self._registered.append(self._agent.register_memory(descriptors, mem_type=region.memory))
        self._num_pages = pages.num_pieces
        self._own = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", _strided(pages, slots), mem_type=pages.memory)
        metadata: bytes = self._agent.get_agent_metadata()
        return metadata

    def connect(self, peer: str, agent: bytes, pages: Region, slots: Region) -> None:
        try:
            name = self._agent.add_remote_agent(agent)
            name = name.decode() if isinstance(name, bytes) else name
            pieces = self._agent.prep_xfer_dlist(name, _strided(pages, slots), mem_type=pages.memory)
        except Exception as error:  # the bindings raise their own exception types, all derived from Exception
            raise TransferFailed(f"cannot connect to {peer}: {error}") from error
        self._peers[peer] = _Peer(name, pieces, pages.num_pieces)

    def disconnect(self, peer: str) -> None:
        known = self._peers.pop(peer, None)
        if known is None:
            return
        for write_id in [write_id for write_id, (owner, _) in self._writes.items() if owner == peer]:
            self._finish(write_id, False)
        for release in (known.pieces.release, lambda: self._agent.remove_remote_agent(known.agent)):
            try:
                release()
            except Exception as error:  # a dead peer's endpoint may already be gone; nothing more can be done about it
                log.debug("nixl.disconnect", peer=peer, error=repr(error))

    def write(self, peer: str, write: Write) -> int:
        known = self._peers.get(peer)
        if known is None:
            raise TransferFailed(f"not connected to {peer}")
        local = [page for page, _ in write.pages]
        remote = [page for _, page in write.pages]
        if write.slot is not None:
            local.append(self._num_pages + write.slot[0])
            remote.append(known.num_pages + write.slot[1])
        try:
            handle = self._agent.make_prepped_xfer(
                "WRITE",
                self._own,
                np.array(local, dtype=np.int32),
                known.pieces,
                np.array(remote, dtype=np.int32),
                write.notification,
            )
            state = self._agent.transfer(handle)
        except Exception as error:
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
            except Exception as error:
                log.warning("nixl.write_failed", peer=peer, error=repr(error))
                state = "ERR"
            if state != "PROC":
                self._finish(write_id, state == "DONE")
        received = self._agent.get_new_notifs()
        finished, self._finished = tuple(self._finished), []
        return Polled(finished, tuple(note for notes in received.values() for note in notes))

    def _finish(self, write_id: int, succeeded: bool) -> None:
        _, handle = self._writes.pop(write_id)
        try:
            handle.release()
        except Exception as error:  # still active on a broken endpoint: the handle is kept alive by the bindings
            log.debug("nixl.release", error=repr(error))
        self._finished.append((write_id, succeeded))

    def close(self) -> None:
        for peer in list(self._peers):
            self.disconnect(peer)
