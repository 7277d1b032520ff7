"""Chaos: a real cluster under mixed traffic, to which something happens every few seconds.

    with ChaosCluster(home) as cluster:
        report = asyncio.run(Chaos(cluster, seed=7).run(minutes=3))
    assert report.problems == []

What happens is drawn from the seed: kill -9 of a rank, the router or the controller; a rank or the router stopped for some seconds
(SIGSTOP: to the others a cut, shorter or longer than their patience); a storm of clients that leave. The cluster runs in checked mode,
with so few pages that requests wait and are preempted. In the second half the router and a rank of each role are spared what would end
them: they must outlive everybody else's deaths without keeping anything of them. What must hold is in the claims of `_judge`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import pathlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from core.errors import Unavailable
from deploy.folder import started
from tests.support.chaos_levels import Levels, excess, measure, table
from tests.support.chaos_traffic import Traffic, draw_scenarios, undisturbed
from tests.support.cluster import Cluster, rank_processes_of
from tests.support.patience import overload

HEALTH_TIMEOUT_S = 20.0

OVERRIDES = (
    "prefill.replicas=2",
    "decode.replicas=2",
    "transfer.checksum=true",
    "engine.max_model_len=1024",
    "prefill.num_pages=24",
    "decode.num_pages=5",
    "decode.expected_output=0.3",
    "router.wait_for_members_s=600",
    "router.request_timeout_s=900",
    "router.max_attempts=16",
    f"placement.health_timeout_s={HEALTH_TIMEOUT_S}",
    "placement.placement_timeout_s=60",
    "placement.restart_backoff_max_s=2",
)

EVENTS = {
    "kill prefill": 4,
    "kill decode": 4,
    "kill router": 2,
    "kill controller": 1,
    "stop prefill": 2,
    "stop decode": 2,
    "stop router": 1,
    "storm": 3,
}
"""With their weights."""

STOPS_S = ((0.3, 4.0), (6.0, 8.0), (HEALTH_TIMEOUT_S + 2, HEALTH_TIMEOUT_S + 4))
"""Shorter than the liveness timeout; longer, with some seconds left to answer the controller, more or less; so long that it replaces the
process."""

ROUTER_LOST_S = 3.0
"""How long after the loss of a router a connection may still break: until the next one listens."""

SPARED = ("prefill/0.0", "decode/0.0", "router/0.0")
"""Members that are not killed in the second half, nor stopped for longer than others wait."""

CALM_S = 90.0
"""After the last event everything must be back at the starting level within this time, stretched by what else this machine computes."""


class ChaosCluster(Cluster):
    """Up inside `with`. Its traffic takes all the cores that it gets, so whatever else runs here comes first."""

    prefix = ("nice", "-n", "5")

    def __init__(self, home: pathlib.Path) -> None:
        super().__init__(home, "chaos")

    def __enter__(self) -> ChaosCluster:
        try:
            self.up(*OVERRIDES)
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    problems: list[str]
    num_finished: int
    """Requests with a whole answer."""
    num_events: int


class Chaos:
    def __init__(
        self, cluster: Cluster, seed: int, *, num_clients: int = 6, num_scenarios: int = 28, say: Callable[[str], None] = print
    ) -> None:
        self._cluster, self._seed, self._num_clients, self._num_scenarios = cluster, seed, num_clients, num_scenarios
        self._random = Random(f"{seed}/events")
        self._say_line = say
        self._began = time.monotonic()
        self._pids: dict[str, int] = {}
        """Member -> process, as last seen."""
        self._doomed: dict[int, str] = {}
        """Processes whose end we caused, and how."""
        self._router_lost: list[tuple[float, float]] = []
        """From when to when a router was not there."""
        self._stopped: set[int] = set()
        self._is_second_half = False
        self._counts: collections.Counter[str] = collections.Counter()
        self._problems: list[str] = []

    async def run(self, minutes: float) -> Report:
        """The baseline, so many minutes of chaos, and what is left when it is over."""
        cluster = self._cluster
        self._say(f"seed {self._seed}: {minutes:g} minutes, {self._num_clients} clients, {self._num_scenarios} scenarios")
        url = f"http://127.0.0.1:{cluster.port}"
        scenarios = draw_scenarios(Random(f"{self._seed}/scenarios"), self._num_scenarios)
        expected = await undisturbed(url, scenarios)
        before = await self._levels_at_rest()
        self._say(f"undisturbed: {sum(map(len, expected))} requests, {sum(a.num_tokens for s in expected for _, a in s)} tokens")

        self._began = time.monotonic()
        traffic = Traffic(url, expected, self._seed, self._num_clients)
        running = asyncio.create_task(traffic.run())
        watching = asyncio.create_task(self._watch(traffic))
        background: set[asyncio.Task[None]] = set()
        while time.monotonic() < self._began + 60 * minutes and not running.done():
            await asyncio.sleep(self._random.uniform(2.0, 6.0))
            if not self._is_second_half and time.monotonic() > self._began + 30 * minutes:
                self._is_second_half = True
                self._say(f"second half: {', '.join(SPARED)} are spared")
            name = self._random.choices(list(EVENTS), list(EVENTS.values()))[0]
            background.add(asyncio.create_task(self._happen(name, Random(self._random.random()), traffic)))
        await asyncio.gather(*background)
        self._say(f"no more events; {traffic.num_asking} requests are running")
        traffic.stop()
        await running
        took = time.monotonic() - self._began
        self._say("all clients are done")
        after, left = await self._calm(before)
        watching.cancel()
        await asyncio.wait({watching})
        self._judge(traffic, left)
        events = ", ".join(f"{name} {count}" for name, count in sorted(self._counts.items()))
        counts = traffic.counts
        summary = [
            f"{took:.0f} s, events: {events}",
            f"requests: {counts['finished']} finished ({counts['tokens']} tokens), {counts['left']} left by their clients, "
            f"{counts['broken']} connections broken by a lost router and asked again; longest {traffic.longest_s:.1f} s",
            f"in the routers' logs: {self._logged()}",
            *table(before, after),
            f"problems: {len(self._problems)}",
            *self._problems,
        ]
        for line in summary:
            self._say(line)
        return Report(problems=self._problems, num_finished=counts["finished"], num_events=sum(self._counts.values()))

    def _logged(self) -> str:
        log = "".join(path.read_text(errors="replace") for path in self._cluster.folder.logs.glob("router-*.log"))
        words = {"relay.retried": "runs repeated", "relay.handed_on": "handed on", "relay.preempted": "preempted"}
        return ", ".join(f"{log.count(event)} {word}" for event, word in words.items())

    def _judge(self, traffic: Traffic, left: list[str]) -> None:
        """Finished requests have the tokens of the undisturbed run and none is lost (`traffic.problems`); a connection breaks only with
        its router; no process ends that nobody ended; and nothing stays behind."""
        self._problems += traffic.problems
        for found in traffic.breaks:
            if not any(begin - 0.5 <= found.ended and found.began <= end for begin, end in self._router_lost):
                when = found.ended - self._began
                self._problems.append(f"at {when:.1f} s: {found.case}: the connection broke, and no router was lost: {found.reason}")
        self._problems += [f"not back at the starting level: {one}" for one in left]

    async def _happen(self, name: str, random: Random, traffic: Traffic) -> None:
        how, _, role = name.partition(" ")
        if how == "storm":
            self._counts[name] += 1
            self._say(f"storm: {await traffic.storm(random, 12)} requests were cut")
        elif how == "kill":
            await self._kill(role, random)
        else:
            await self._stop(role, random)

    async def _kill(self, role: str, random: Random) -> None:
        victim = await self._victim(role, random, SPARED if self._is_second_half else ())
        if victim is None:
            return
        member, pid = victim
        self._counts[f"kill {role}"] += 1
        self._doomed[pid] = "killed"
        self._say(f"kill {member} ({pid})")
        began, living = time.monotonic(), started(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if role == "router" and living is not None:
            await self._lose_router(pid, living, began)

    async def _stop(self, role: str, random: Random) -> None:
        victim = await self._victim(role, random)
        if victim is None or victim[1] in self._stopped:
            return
        member, pid = victim
        is_spared = role == "router" or (self._is_second_half and member in SPARED)
        seconds = random.uniform(*random.choice(STOPS_S[:1] if is_spared else STOPS_S))
        if seconds > STOPS_S[0][1]:
            self._doomed[pid] = f"stopped for {seconds:.1f} s"
        self._counts[f"stop {role}"] += 1
        self._say(f"stop {member} ({pid}) for {seconds:.1f} s")
        self._stopped.add(pid)
        try:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(seconds)
            os.kill(pid, signal.SIGCONT)
            self._say(f"continue {member} ({pid})")
        except ProcessLookupError:
            self._say(f"{member} ({pid}) ended while it was stopped")
        finally:
            self._stopped.discard(pid)

    async def _lose_router(self, pid: int, living: str, began: float) -> None:
        """Note from when to when nobody listened. `living`: when the killed one began; it listens a little longer."""
        while started(pid) == living:
            await asyncio.sleep(0.1)
        while True:
            await asyncio.sleep(0.1)
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self._cluster.port)
                writer.close()
                break
        self._router_lost.append((began, time.monotonic() + ROUTER_LOST_S))
        self._say(f"a router listens again after {time.monotonic() - began:.1f} s")

    async def _victim(self, role: str, random: Random, spared: tuple[str, ...] = ()) -> tuple[str, int] | None:
        """A living process of the role, as far as we know."""
        if role == "controller":
            try:
                return role, await asyncio.to_thread(self._cluster.controller_pid)
            except (ProcessLookupError, FileNotFoundError):
                return None
        ours = await asyncio.to_thread(rank_processes_of, self._cluster.state.marker)  # a number may be another process's by now
        found = [
            (member, pid) for member, pid in sorted(self._pids.items()) if member.startswith(role) and member not in spared and pid in ours
        ]
        return random.choice(found) if found else None

    async def _watch(self, traffic: Traffic) -> None:
        """Keep `_pids`, see who ended without our doing, and say what the clients complain of."""
        num_said = 0
        while True:
            for problem in traffic.problems[num_said:]:
                self._say(f"PROBLEM {problem[:300]}")
                num_said += 1
            with contextlib.suppress(Unavailable, OSError):
                rows: dict[str, Any] = await asyncio.to_thread(self._cluster.rows)
                for member, row in rows.items():
                    old, new = self._pids.get(member, 0), int(row.pid)
                    if new and old and old != new and old not in self._doomed:
                        self._doomed[old] = "by itself"
                        self._problems.append(
                            f"at {time.monotonic() - self._began:.1f} s: {member} ({old}) ended, and nobody ended it: {row.note}"
                        )
                        self._say(self._problems[-1])
                        if member.startswith("router"):
                            self._router_lost.append((time.monotonic() - 30, time.monotonic() + ROUTER_LOST_S))
                    if new:
                        self._pids[member] = new
            await asyncio.sleep(0.5)

    async def _levels_at_rest(self) -> Levels:
        """Levels when no request is running."""
        await asyncio.to_thread(self._cluster.wait_until_settled, CALM_S)
        end = time.monotonic() + CALM_S * overload()
        while True:
            await asyncio.sleep(1.0)  # reports are up to health_interval_s old
            levels = await asyncio.to_thread(measure, self._cluster)
            if not levels.taken:
                return levels
            assert time.monotonic() < end, levels.taken

    async def _calm(self, before: Levels) -> tuple[Levels, list[str]]:
        """Levels when everything is back at the starting level, or CALM_S are over; and what is not back."""
        began = time.monotonic()
        await asyncio.to_thread(self._cluster.wait_until_settled, CALM_S)
        while True:
            await asyncio.sleep(1.0)
            after = await asyncio.to_thread(measure, self._cluster)
            left = excess(before, after)
            if not left or time.monotonic() > began + CALM_S * overload():
                self._say(f"{'calm' if not left else 'not calm'} after {time.monotonic() - began:.1f} s")
                return after, left

    def _say(self, line: str) -> None:
        self._say_line(f"{time.monotonic() - self._began:7.1f}  {line}")
