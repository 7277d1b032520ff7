"""Many worlds, one after another in one process: quicker than one by one, and with a count of what happened in them."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tests.sim.patches import simulated
from tests.sim.world import World

WORLDS_BETWEEN = 30
"""A world is one large cycle of references. Garbage is looked for after so many, while it is still in the caches, and not within them."""


@dataclass
class Tally:
    num_worlds: int = 0
    num_events: int = 0
    virtual_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    """Of requests."""
    faults: Counter[str] = field(default_factory=Counter)
    repairs: Counter[str] = field(default_factory=Counter)
    """What the routers had to do, and what it cost."""
    broken: dict[int, str] = field(default_factory=dict)
    """Seed -> the rule."""

    def count(self, world: World) -> None:
        self.num_worlds += 1
        self.num_events += world.loop.num_events
        self.virtual_s += world.loop.time()
        self.outcomes.update(client.outcome for client in world.clients)
        self.faults.update(world.faults)
        journeys = [client.journey for client in world.clients if client.journey is not None]
        self.repairs["runs"] += sum(journey.num_runs for journey in journeys)
        self.repairs["hand-ons"] += sum(journey.hand_ons for journey in journeys)
        self.repairs["preemptions"] += sum(journey.num_preemptions for journey in journeys)
        self.repairs["retries"] += sum(journey.num_migrations for journey in journeys)
        self.repairs["kept pages"] += world.num_kept_pages

    def add(self, other: Tally) -> None:
        self.num_worlds += other.num_worlds
        self.num_events += other.num_events
        self.virtual_s += other.virtual_s
        self.outcomes.update(other.outcomes)
        self.faults.update(other.faults)
        self.repairs.update(other.repairs)
        self.broken.update(other.broken)


def run_many(seeds: Iterable[int], stop: Callable[[str], bool] = lambda rule: False) -> Tally:
    """A world that breaks a rule is in `broken`; it is the last one if `stop` says so of the rule."""
    tally = Tally()
    gc.collect()
    gc.freeze()  # what is there already need not be looked at again
    gc.disable()
    try:
        with simulated():
            for number, seed in enumerate(seeds, 1):
                world = World(seed)
                try:
                    world.run()
                    tally.count(world)
                    world.forget()
                except AssertionError as error:
                    tally.broken[seed] = str(error)
                    if stop(str(error)):
                        break
                except Exception as error:
                    error.add_note(f"in world {seed}")
                    raise
                if number % WORLDS_BETWEEN == 0:
                    gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return tally
