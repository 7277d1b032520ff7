"""InboxThread: a thread that owns some state. Whatever happens to that state happens in it, one thing at a time.

    self._thread = InboxThread("prefill-loop", self._turn, self._died)
    self._thread.put(lambda: self._accept(request))      # from any thread

It runs the orders that were put, then takes a turn, and so on. A turn does what can be done now and returns for how many seconds the
thread may wait for the next order: 0 if there is more to do.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class InboxThread:
    def __init__(self, name: str, turn: Callable[[], float], died: Callable[[Exception], None]) -> None:
        """`died(error)` is called in the thread when an order or a turn raised: it ends, since the state can no longer be trusted."""
        self._turn, self._died = turn, died
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._num_ended, self._is_busy = 0, False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, order: Callable[[], None]) -> None:
        """Run it in the thread, after those that were put before."""
        self._orders.put(order)

    def end(self) -> None:
        """Let the thread end after the orders that were put before."""
        self._orders.put(None)

    def join(self) -> None:
        """Returns when the thread has ended."""
        self._thread.join()

    @property
    def name(self) -> str:
        return self._thread.name

    @property
    def progress(self) -> int | None:
        """Orders and turns that have ended, while there is one that has not; None while the thread waits, and before and after its life."""
        return self._num_ended if self._is_busy else None

    def _run(self) -> None:
        wait_s = 0.0
        try:
            while self._run_orders(wait_s):
                wait_s = self._turn()
                self._num_ended += 1
        except Exception as error:  # outermost
            self._died(error)
        finally:
            self._is_busy = False

    def _run_orders(self, wait_s: float) -> bool:
        """False when told to end."""
        self._is_busy = False
        try:
            order = self._orders.get(timeout=wait_s) if wait_s > 0 else self._orders.get_nowait()
            self._is_busy = True
            while order is not None:
                order()
                self._num_ended += 1
                order = self._orders.get_nowait()
            return False
        except queue.Empty:
            self._is_busy = True  # with the turn
            return True
