"""The edge of `steps`: votes and decisions over small TCP connections, each rank to rank 0.

    steps = GroupSteps(group, budget_of, clock)
    steps.start(wake, stuck)
    while ...:
        budget = steps.agreed(wanted)        # never waits; `wake()` is called when the answer may have changed
        if budget is not None:
            steps.begin(next_wanted)         # the vote for the next step travels while this one computes
            runner.step(chunks)              # of at most `budget` tokens, perhaps none

A message is 13 bytes: kind, step, value. A rank whose process ends closes its connection, and all others know at once.
"""

from __future__ import annotations

import enum
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from core.clock import Clock
from core.errors import GroupLost
from core.log import get_logger
from engine.parallel.group import Group
from engine.parallel.steps import Go, StepBoard

log = get_logger("group")

STUCK_LIMITS = 3
"""A step that takes so many times what a rank may wait for its peers does not end."""

_MESSAGE = struct.Struct("!BQI")


class _Kind(enum.IntEnum):
    HELLO = 1
    """value: the rank that has connected."""
    VOTE = 2
    """step, wanted tokens."""
    GO = 3
    """step, budget."""
    LOST = 4
    """value: the rank that is dead or stuck."""
    CHANGE = 6
    """As GO; what was prepared comes into force before the step."""
    BYE = 5
    """The group is being ended on purpose."""


class Steps(Protocol):
    is_shared: bool
    """Whether a step without work of one's own must be taken when it is agreed."""
    is_ending: bool
    """Whether a rank has left on purpose: no step will follow."""
    waited_s: float
    """Time that this rank had work and waited for its peers between steps."""

    def start(self, wake: Callable[[], None], stuck: Callable[[str], None]) -> None:
        """`wake()` is called from another thread whenever `agreed` may have another answer, `stuck(reason)` when a step does not end."""
        ...

    def agreed(self, wanted: int, is_computing: bool = False) -> int | None:
        """The budget of the step to be taken now; None: not yet. `wanted`: tokens that this rank would compute. `is_computing`: the last
        step that was begun has not ended. Raises GroupLost."""
        ...

    def begin(self, next_wanted: int) -> None:
        """The step is being taken; the one after it will compute about so many tokens here."""
        ...

    def close(self) -> None: ...


class SoloSteps:
    """A rank alone steps whenever it wants to."""

    is_shared, is_ending, waited_s = False, False, 0.0

    def __init__(self, budget: int) -> None:
        self._budget = budget

    def start(self, wake: Callable[[], None], stuck: Callable[[str], None]) -> None:
        pass

    def agreed(self, wanted: int, is_computing: bool = False) -> int | None:
        return self._budget if wanted else None

    def begin(self, next_wanted: int) -> None:
        pass

    def close(self) -> None:
        pass


class GroupSteps:
    """`agreed` and `begin` belong to one thread; another one reads the connections."""

    is_shared = True

    def __init__(self, group: Group, budget_of: Callable[[Sequence[int]], int], clock: Clock) -> None:
        """Connects; collective. Raises GroupLost. What it opens is closed with the group, at the latest."""
        self._seat, self._limit_s, self._clock, self._lose = group.seat, group.limits.step_s, clock, group.lose
        self._lock = threading.Lock()
        self._step = 0
        self._voted: int | None = None
        self._waiting_since: float | None = None
        self._stepping_since: float | None = None
        self._go: Go | None = None
        self._lost = ""
        self.is_ending = False
        self.waited_s = 0.0
        self.on_change: Callable[[], None] = lambda: None
        """Called in the thread of `begin`, on all ranks before the same step, after `request_change` on rank 0."""
        self._is_change_wanted = False
        self._board = StepBoard(group.size, budget_of) if group.rank == 0 else None
        self._links: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._stop_sender, self._stop_receiver = socket.socketpair()
        self._selector.register(self._stop_receiver, selectors.EVENT_READ, None)
        self._thread: threading.Thread | None = None
        group.before_close(self._hang_up)
        with group.working("the connection for votes"):
            self._connect(group)
        for peer, link in self._links.items():
            self._selector.register(link, selectors.EVENT_READ, peer)

    def start(self, wake: Callable[[], None], stuck: Callable[[str], None]) -> None:
        self._thread = threading.Thread(target=self._read, args=(wake, stuck), name="votes", daemon=True)
        self._thread.start()

    def agreed(self, wanted: int, is_computing: bool = False) -> int | None:
        with self._lock:
            if not is_computing:
                self._stepping_since = None
            if self._lost:
                raise GroupLost(self._lost)
            if self.is_ending:
                return None
            if self._go is None and self._is_news(wanted):
                self._vote(wanted)
            if self._go is None:
                self._check_deadline(wanted)
                return None
            return self._go.budget

    def begin(self, next_wanted: int) -> None:
        with self._lock:
            assert self._go is not None and self._go.step == self._step, f"step {self._step} is not agreed: {self._go}"
            if self._waiting_since is not None:
                self.waited_s += self._clock.now() - self._waiting_since
                self._waiting_since = None
            is_change = self._go.is_change
            self._step, self._go = self._step + 1, None
            self._stepping_since = self._clock.now()
            self._vote(next_wanted)
        if is_change:
            self.on_change()

    @property
    def number(self) -> int:
        """Of steps that have begun."""
        return self._step

    def request_change(self) -> None:
        """On rank 0, when all ranks have prepared the same change: with the next step that is decided it comes into force."""
        assert self._board is not None, "rank 0 decides"
        with self._lock:
            self._is_change_wanted = True

    def close(self) -> None:
        """Tell the others, and leave. Once. A step that is under way here is not waited for: not all ranks may have begun it."""
        with self._lock:
            self.is_ending = True
            self._send_all(_Kind.BYE, 0, self._seat.rank)
        self._lose()
        self._hang_up()

    def _hang_up(self) -> None:
        """Without a word, unless `close` has said it: for the peers this rank is gone."""
        self._stop_sender.close()
        if self._thread is not None:
            self._thread.join()
        for link in (*self._links.values(), self._stop_receiver):
            link.close()
        self._selector.close()

    # -- under the lock --------------------------------------------------------------------------------------------------------

    def _is_news(self, wanted: int) -> bool:
        return self._voted is None or wanted > self._voted or (wanted == 0) != (self._voted == 0)

    def _vote(self, wanted: int) -> None:
        self._voted = wanted
        if self._board is None:
            self._send_all(_Kind.VOTE, self._step, wanted)
        else:
            self._count(self._seat.rank, self._step, wanted)

    def _count(self, rank: int, step: int, wanted: int) -> None:
        assert self._board is not None
        decided = self._board.vote(rank, step, wanted, self._clock.now())
        if decided is not None:
            kind = _Kind.CHANGE if self._is_change_wanted else _Kind.GO
            self._send_all(kind, decided.step, decided.budget)
            self._go = Go(decided.step, decided.budget, self._is_change_wanted)
            self._is_change_wanted = False

    def _check_deadline(self, wanted: int) -> None:
        """Rank 0 knows who is late, so it speaks first; the others wait a little longer, for a rank 0 that says nothing itself."""
        now = self._clock.now()
        if not wanted:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = now
        late: tuple[int, ...] = ()
        if self._board is not None:
            late = self._board.overdue(now, self._limit_s)
        elif self._waiting_since is not None and now - self._waiting_since > 1.25 * self._limit_s:
            late = (0,)
        if late:
            self._send_all(_Kind.LOST, self._step, late[0])
            names = ", ".join(map(self._seat.member_of, late))
            raise GroupLost(f"{self._seat.member}: step {self._step} did not begin within {self._limit_s:g} s: no word from {names}")

    def _send_all(self, kind: _Kind, step: int, value: int) -> None:
        message = _MESSAGE.pack(kind, step, value)
        for link in self._links.values():
            try:
                link.sendall(message)
            except OSError as error:  # the reader finds the same, and says whose connection it was
                log.debug("votes.unsent", member=self._seat.member, error=error)

    # -- connections -----------------------------------------------------------------------------------------------------------

    def _connect(self, group: Group) -> None:
        limit_s = group.limits.start_s
        if group.rank == 0:
            family = socket.AF_INET6 if ":" in group.seat.host else socket.AF_INET
            with socket.create_server((group.seat.host, 0), family=family, backlog=group.size) as listener:
                listener.settimeout(limit_s)
                group.store.set("votes", str(listener.getsockname()[1]))
                while len(self._links) < group.size - 1:
                    link = self._prepared(listener.accept()[0])
                    rank = _rank_that_said_hello(link)
                    if rank in self._links or not 0 < rank < group.size:
                        log.warning("votes.refused", member=self._seat.member, rank=rank)
                        link.close()
                        continue
                    self._links[rank] = link
        else:
            port = int(group.store.get("votes"))
            link = self._prepared(socket.create_connection((group.seat.rendezvous.rpartition(":")[0], port), limit_s))
            link.sendall(_MESSAGE.pack(_Kind.HELLO, 0, group.rank))
            self._links[0] = link

    def _prepared(self, link: socket.socket) -> socket.socket:
        link.settimeout(self._limit_s)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return link

    def _read(self, wake: Callable[[], None], stuck: Callable[[str], None]) -> None:
        while True:
            for key, _ in self._selector.select(min(self._limit_s / 4, 1.0)):
                if key.data is None:
                    return
                self._read_from(key.data, self._links[key.data])
                wake()
            if self._is_stuck():
                stuck(f"{self._seat.member}: a step takes over {STUCK_LIMITS * self._limit_s:g} s")
                return

    def _is_stuck(self) -> bool:
        """The exchange of rows has deadlines of its own. This is for what waits without one, on a GPU."""
        with self._lock:
            since = self._stepping_since
            return since is not None and self._clock.now() - since > STUCK_LIMITS * self._limit_s

    def _read_from(self, peer: int, link: socket.socket) -> None:
        try:
            kind, step, value = _MESSAGE.unpack(_read_exactly(link))
        except OSError as error:
            kind, step, value = _Kind.LOST, 0, peer
            log.info("votes.ended", member=self._seat.member, peer=self._seat.member_of(peer), error=error)
            self._selector.unregister(link)
        with self._lock:
            if kind == _Kind.VOTE:
                self._count(peer, step, value)
            elif kind in (_Kind.GO, _Kind.CHANGE):
                self._go = Go(step, value, kind == _Kind.CHANGE)
            elif kind == _Kind.BYE:
                self.is_ending = True
                self._lose()
                if self._board is not None:
                    self._send_all(_Kind.BYE, 0, value)
            elif not self.is_ending and not self._lost:
                self._lost = f"{self._seat.member}: {self._seat.member_of(value)} of its group is gone or stuck"
                self._lose()
                if self._board is not None:
                    self._send_all(_Kind.LOST, 0, value)


def _rank_that_said_hello(link: socket.socket) -> int:
    """-1 for whoever is none: ports are scanned, and probed."""
    try:
        kind, _, rank = _MESSAGE.unpack(_read_exactly(link))
    except OSError:
        return -1
    return int(rank) if kind == _Kind.HELLO else -1


def _read_exactly(link: socket.socket) -> bytes:
    """One message. Raises OSError."""
    found = b""
    while len(found) < _MESSAGE.size:
        part = link.recv(_MESSAGE.size - len(found))
        if not part:
            raise ConnectionResetError("the connection was closed")
        found += part
    return found
