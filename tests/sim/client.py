"""A client of the simulation: what it asks for, what it must get, and what it got."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

from core.errors import BatonError, DeadlineExceeded, NoMembers, Overloaded, Unavailable
from core.request import FinishReason, SamplingParams
from router.relay import Journey
from tests.sim.null_engine import EOS, continuation
from tests.sim.ranks import RouterProcess

if TYPE_CHECKING:
    from tests.sim.world import World

MANY_ATTEMPTS = 6
"""A request that hangs in one of them has no time for so many."""


class Client:
    """One request: what it asks for, and what it got."""

    def __init__(self, world: World, number: int, num_tokens: int = 0, max_tokens: int = 0) -> None:
        """0: as the world's seed has it."""
        rng = world.rng
        self.world, self.name = world, f"c{number}"
        self.prompt = tuple(rng.choices(range(2, 90), k=num_tokens or rng.randint(1, 11)))
        if world.clients and not num_tokens and rng.random() < 0.4:  # it goes on where another one is, or was
            self.prompt = rng.choice(world.clients).prompt[:12] + self.prompt[:4]
        self.sampling = SamplingParams(max_tokens=max_tokens or rng.randint(1, 9), seed=rng.randrange(100))
        self.expected = continuation(self.prompt, self.sampling)
        self.tokens: list[int] = []
        self.outcome = ""
        self.task: asyncio.Task[None] | None = None
        self.journey: Journey | None = None

    def start(self, at: RouterProcess) -> None:
        self.world.note(at, f"{self.name} asks: {len(self.prompt)} tokens, at most {self.sampling.max_tokens} more")
        self.task = self.world.loop.create_task(self._run(at))

    async def _run(self, at: RouterProcess) -> None:
        self.router = at
        outcome = "no end"
        try:
            async with at.service.admitted(1, len(self.prompt)):
                self.journey = at.service.new_journey(self.name, len(self.prompt))
                async with aclosing(at.service.sequence(self.journey, self.prompt, self.sampling)) as outputs:
                    async for output in outputs:
                        self.tokens += output.token_ids
                        if output.finish_reason is not None:
                            outcome = "ok"
                            expected = FinishReason.STOP if self.expected[-1] == EOS else FinishReason.LENGTH
                            assert output.finish_reason is expected, f"{self.name} ended by {output.finish_reason}"
        except BatonError as error:
            outcome = error.code
            self._check_error(error)
        except asyncio.CancelledError:
            outcome = "cancelled"
        assert not self.outcome, f"{self.name} ended twice: {self.outcome}, {outcome}"
        self.outcome = outcome
        self.world.note(at, f"{self.name} ends: {outcome} after {len(self.tokens)} tokens")

    def _check_error(self, error: BatonError) -> None:
        """A router may have too much to do. That all attempts fail, or so many that time is up, takes more than a few faults."""
        has_failed = isinstance(error, Unavailable) and not isinstance(error, NoMembers)
        is_late = isinstance(error, DeadlineExceeded) and self.journey is not None and self.journey.attempts >= MANY_ATTEMPTS
        is_worn_out = bool({"fails", "loses"} & set(self.world.faults)) and (has_failed or is_late)
        assert is_worn_out or isinstance(error, Overloaded), f"{self.name} ended with {error.code}: {error}"

    def check(self) -> None:
        assert self.outcome and self.outcome != "no end", f"{self.name} never ended"
        assert self.tokens == self.expected[: len(self.tokens)], f"{self.name} got {self.tokens}, not {self.expected}"
        assert self.outcome != "ok" or self.tokens == self.expected, f"{self.name} ended early: {self.tokens} of {self.expected}"
