"""Stories with a plot: what must survive what (section 8 of the architecture), each with the lines that its transcript must have.

python -m tests.sim --scenario "decode dies before its first step"
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from tests.sim.client import Client
from tests.sim.patches import run_world
from tests.sim.ranks import Rank
from tests.sim.world import World


@dataclass(frozen=True)
class Scenario:
    set_up: Callable[[World], None]
    lines: tuple[str, ...]
    """Parts of lines, in this order; other lines may come between."""
    never: str = ""
    """What no line may have."""


def _ask(world: World, *, num_tokens: int = 9, max_tokens: int = 9, at: float = 0.1) -> Client:
    client = Client(world, len(world.clients), num_tokens, max_tokens)
    while len(client.expected) < max_tokens:  # one that goes on to its limit
        client = Client(world, len(world.clients), num_tokens, max_tokens)
    world.clients.append(client)
    world.plan(at, functools.partial(world.ask, client))
    return client


def _rank(world: World, name: str) -> Rank:
    return next(rank for rank in world.living() if rank.name == name)


def prefill_dies_before_the_commit(world: World) -> None:
    world.make_cluster(2, 1, 1)
    _ask(world, num_tokens=20)
    world.when("prefill.accepted", lambda: world.loop.at(world.loop.time() + 0.06, lambda: world.kill(_rank(world, "prefill0"), False)))


def prefill_dies_between_the_last_page_and_the_commit(world: World) -> None:
    """Pages and slot are on the wire; the commit behind them dies with the sender."""
    world.make_cluster(2, 1, 1)
    _ask(world, num_tokens=20)

    def look() -> None:
        rank = _rank(world, "prefill0")
        flights = [flight for flight in rank.transport.flights if flight.write.slot is not None and not flight.pieces]
        if flights and flights[0].num_on_wire:
            world.note(rank, "the last page has left, the commit has not")
            world.kill(rank, False)
        elif rank.is_alive:
            world.loop.at(world.loop.time() + 0.0005, look)

    world.when("prefill.accepted", look)


def decode_dies_before_its_first_step(world: World) -> None:
    world.make_cluster(1, 2, 1)
    _ask(world)
    world.when("prefill.handed_off", lambda: world.kill(_rank(world, "decode0"), False))


def decode_dies_while_prefill_computes(world: World) -> None:
    world.make_cluster(1, 2, 1)
    _ask(world, num_tokens=20)
    world.when("prefill.accepted", lambda: world.kill(_rank(world, "decode0"), False))


def decode_dies_in_mid_stream(world: World) -> None:
    world.make_cluster(1, 2, 1)
    _ask(world)
    world.when("prefill.handed_off", lambda: world.loop.at(world.loop.time() + 0.1, lambda: world.kill(_rank(world, "decode0"), False)))


def a_decode_rank_comes_back_under_its_address(world: World) -> None:
    world.make_cluster(1, 1, 1)
    _ask(world)
    world.when(
        "transfer.session_opened", lambda: world.loop.at(world.loop.time() + 0.06, lambda: world.kill(_rank(world, "decode0"), True))
    )


def a_router_dies(world: World) -> None:
    world.make_cluster(1, 1, 1)
    _ask(world)
    world.when("prefill.handed_off", world.kill_router)


def prefill_and_decode_are_cut_off(world: World) -> None:
    world.make_cluster(2, 1, 1)
    _ask(world, num_tokens=20)
    world.when("prefill.accepted", lambda: world.cut(_rank(world, "prefill0"), _rank(world, "decode0"), 8.0))


def a_client_leaves_during_the_transfer(world: World) -> None:
    world.make_cluster(1, 1, 1)
    _ask(world)
    world.when("transfer.session_opened", lambda: world.loop.at(world.loop.time() + 0.05, world.cancel))


def prefill_is_stopped_in_mid_write(world: World) -> None:
    world.make_cluster(2, 1, 1)
    _ask(world, num_tokens=20)

    def stop() -> None:
        rank = _rank(world, "prefill0")
        world.note(rank, "*** stopped for 7 s")
        world.faults.append("stopped")
        rank.stop(7.0)

    world.when("transfer.session_opened", lambda: world.loop.at(world.loop.time() + 0.06, stop))


def a_session_breaks_and_its_sender_is_stopped_in_mid_write(world: World) -> None:
    world.make_cluster(2, 1, 1)
    _ask(world, num_tokens=20)

    def look() -> None:
        if any(flight.pieces for flight in world.wire.flights):
            rank, receiver = _rank(world, "prefill0"), _rank(world, "decode0")
            (link,) = (link for link in world.links if [end.process for end in link.ends] == [rank, receiver])
            world.break_off(link, 0.0, 7.0)
        else:
            world.loop.at(world.loop.time() + 0.0005, look)

    world.when("transfer.session_opened", look)


def a_session_breaks_in_mid_write(world: World) -> None:
    """Nobody is stopped, and so nobody else's hand-offs are disturbed."""
    world.make_cluster(1, 1, 1)
    _ask(world, num_tokens=20)
    world.when("transfer.session_opened", lambda: world.loop.at(world.loop.time() + 0.06, world.links[-1].reset))


def a_session_breaks_while_a_write_hangs(world: World) -> None:
    """It keeps the lost connection from ending, and there is no other decode rank to go to."""
    world.make_cluster(1, 1, 1)
    _ask(world, num_tokens=8)
    _ask(world, at=0.4)

    def look() -> None:
        if any(flight.pieces for flight in world.wire.flights):
            world.hang_write()
            world.links[-1].reset()
        else:
            world.loop.at(world.loop.time() + 0.0005, look)

    world.when("transfer.session_opened", look)


def more_than_there_is_room_for(world: World) -> None:
    world.make_cluster(1, 1, 1)
    for number in range(14):
        _ask(world, num_tokens=8, max_tokens=8, at=0.1 + 0.001 * number)


SCENARIOS = {
    "prefill dies before the commit": Scenario(
        prefill_dies_before_the_commit,
        ("prefill0     *** killed", "relay.retried", "prefill1     prefill.accepted", "ends: ok after 9 tokens"),
    ),
    "prefill dies between the last page and the commit": Scenario(
        prefill_dies_between_the_last_page_and_the_commit,
        (
            "the last page has left, the commit has not",
            "killed",
            "relay.retried",
            "prefill1     prefill.accepted",
            "ends: ok after 9 tokens",
        ),
    ),
    "decode dies before its first step": Scenario(
        decode_dies_before_its_first_step,
        ("prefill.handed_off", "decode0      *** killed", "relay.handed_on", "prefill.handed_off", "ends: ok after 9 tokens"),
    ),
    "decode dies while prefill computes": Scenario(
        decode_dies_while_prefill_computes,
        ("decode0      *** killed", "relay.handed_on", "prefill.handed_on", "prefill.handed_off", "ends: ok after 9 tokens"),
    ),
    "decode dies in mid-stream": Scenario(
        decode_dies_in_mid_stream,
        ("decode0      *** killed", "relay.retried", "prefill0     prefill.accepted", "ends: ok after 9 tokens"),
    ),
    "a decode rank comes back under its address": Scenario(
        a_decode_rank_comes_back_under_its_address,
        ("decode0      *** killed", "decode0'     starts at the address", "relay.handed_on", "ends: ok after 9 tokens"),
    ),
    "a router dies": Scenario(a_router_dies, ("router0      *** killed", "ends: cancelled")),
    "prefill and decode are cut off": Scenario(
        prefill_and_decode_are_cut_off,
        ("prefill0     *** cut off from decode0", "transfer.peer_lost", "ends: ok after 9 tokens"),
    ),
    "a client leaves during the transfer": Scenario(a_client_leaves_during_the_transfer, ("c0 leaves", "ends: cancelled")),
    "prefill is stopped in mid-write": Scenario(
        prefill_is_stopped_in_mid_write,
        ("*** stopped", "relay.retried", "prefill1     prefill.accepted", "ends: ok after 9 tokens", "transfer.fenced"),
    ),
    "a session breaks, and its sender is stopped in mid-write": Scenario(
        a_session_breaks_and_its_sender_is_stopped_in_mid_write,
        (
            "prefill0     *** broken off from decode0",
            "transfer.sender_lost",
            "answer=silence is_over=False",
            "prefill1     prefill.accepted",
            "ends: ok after 9 tokens",
            "transfer.fenced",
            "prefill0     goes on in the middle of its writes",
        ),
    ),
    "a session breaks in mid-write": Scenario(
        a_session_breaks_in_mid_write,
        ("transfer.sender_lost", "answer=under_way", "answer=over is_over=True", "ends: ok after 9 tokens"),
        "transfer.fenced",
    ),
    "a session breaks while a write hangs": Scenario(
        a_session_breaks_while_a_write_hangs,
        ("hangs", "c1 asks", "transfer.reset", "transfer.session_opened", "ends: ok after 9 tokens", "ends: ok after 9 tokens"),
        "relay.retried",
    ),
    "more than there is room for": Scenario(more_than_there_is_room_for, ("ends: Overloaded after 0 tokens", "ends: ok after 8 tokens")),
}


def run_scenario(name: str, tell: Callable[[str], None]) -> None:
    """Raises AssertionError when a rule is broken, or a line of the plot does not come."""
    scenario, told = SCENARIOS[name], list[str]()

    def note(line: str) -> None:
        told.append(line)
        tell(line)

    run_world(1, note, scenario.set_up)
    lines = iter(told)
    for expected in scenario.lines:
        assert any(expected in line for line in lines), f"{name}: {expected!r} did not happen, or too early"
    assert not scenario.never or not any(scenario.never in line for line in told), f"{name}: {scenario.never!r} must not happen"
