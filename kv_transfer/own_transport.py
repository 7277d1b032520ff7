"""OwnTransport: a rank's transport and the thread that owns it, for either end of a transfer."""

from __future__ import annotations

import asyncio
import concurrent.futures

from core.inbox import InboxThread
from core.region import Region
from core.request import Member
from kv_transfer.config import TransferConfig
from kv_transfer.transport import Transport
from kv_transfer.transports import open_transport


class OwnTransport:
    """Opened in the thread, used by it alone, and closed when it has ended."""

    transport: Transport
    """From `start` on."""
    agent: bytes
    """What a peer needs to connect."""

    def __init__(self, thread: InboxThread, config: TransferConfig, member: Member, pages: Region, slots: Region) -> None:
        """`thread` is one that was not started yet."""
        self._thread, self._config, self._member, self._regions = thread, config, member, (pages, slots)
        self._opened: concurrent.futures.Future[None] = concurrent.futures.Future()

    async def start(self) -> None:
        """Start the thread, too. Raises what keeps the transport from starting; the thread has ended then."""
        self._thread.put(self._open)
        self._thread.start()
        await asyncio.wrap_future(self._opened)

    def reset(self) -> None:
        """See `Transport.reset`."""
        self.agent = self.transport.reset()

    async def close(self) -> None:
        """Returns when the thread has ended, with its transport."""
        self._thread.end()
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self.transport.close)

    def _open(self) -> None:
        name = f"{self._member.name}#{self._member.incarnation}"
        try:
            self.transport, self.agent = open_transport(self._config, name, *self._regions)
        except Exception as error:  # whatever it is, `start` raises it
            self._thread.end()
            self._opened.set_exception(error)
        else:
            self._opened.set_result(None)
