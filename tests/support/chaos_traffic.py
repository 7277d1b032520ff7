"""Mixed traffic whose answers are known: scenarios drawn from a seed, and clients that hold every answer against the undisturbed one.

    scenarios = draw_scenarios(Random(1), 30)
    expected = await undisturbed(url, scenarios)          # once, while nothing happens to the cluster
    traffic = Traffic(url, expected, seed=1, num_clients=8)
    await traffic.run()                                   # until traffic.stop(); then traffic.problems, .breaks, .counts

A client plays a scenario (one request, or the turns of a conversation), sometimes leaves in the middle of a request, and repeats a
request whose connection broke. What it is told is compared to the bit: tokens, text, log-probabilities, finish reasons. Of an answer
that did not end, what had come must be the beginning of the undisturbed one.
"""

from __future__ import annotations

import asyncio
import collections
import json
import time
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx

REQUEST_LIMIT_S = 1000.0
"""A request that has not ended by then, all repetitions included, counts as lost."""

RETRY_S = 0.2
"""Pause of a client whose connection broke."""

LEAVE_SHARE = 0.15
"""Share of requests in the midst of which the client leaves."""

VOCABULARY = (20, 900)
"""Token ids of random prompts."""


@dataclass(frozen=True, slots=True)
class Case:
    """One request."""

    name: str
    path: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scenario:
    """Requests of one client in a row: a single one, or, with `turns`, what a user says in a conversation."""

    case: Case
    turns: tuple[str, ...] = ()


@dataclass(slots=True)
class Answer:
    """By choice: what came so far."""

    tokens: dict[int, list[str]] = field(default_factory=lambda: collections.defaultdict(list))
    logprobs: dict[int, list[float | None]] = field(default_factory=lambda: collections.defaultdict(list))
    texts: dict[int, str] = field(default_factory=lambda: collections.defaultdict(str))
    finished: dict[int, str] = field(default_factory=dict)

    def add(self, choice: dict[str, Any]) -> None:
        """One item of `choices`, of a stream or of a whole response, completion or chat."""
        index = choice["index"]
        said = choice.get("delta") or choice.get("message") or {}
        self.texts[index] += choice.get("text") or said.get("content") or ""
        found = choice.get("logprobs") or {}
        if "content" in found:
            self.tokens[index] += [item["token"] for item in found["content"]]
            self.logprobs[index] += [item["logprob"] for item in found["content"]]
        elif found:
            self.tokens[index] += found["tokens"]
            self.logprobs[index] += found["token_logprobs"]
        if choice.get("finish_reason"):
            self.finished[index] = choice["finish_reason"]

    def begins(self, whole: Answer) -> bool:
        """Whether `whole` begins with this."""
        return (
            all(whole.tokens[index][: len(tokens)] == tokens for index, tokens in self.tokens.items())
            and all(whole.logprobs[index][: len(values)] == values for index, values in self.logprobs.items())
            and all(whole.texts[index].startswith(text) for index, text in self.texts.items())
            and all(whole.finished[index] == reason for index, reason in self.finished.items())
        )

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens.values()))


@dataclass(frozen=True, slots=True)
class Break:
    """A connection that ended before the answer did. Times of time.monotonic()."""

    case: str
    began: float
    ended: float
    reason: str


class Wrong(Exception):
    """The server said something that it must not."""


async def ask(client: httpx.AsyncClient, case: Case, answer: Answer) -> None:
    """Adds to `answer` as it comes. Raises Wrong for an error, httpx.HTTPError for a connection that broke."""
    async with client.stream("POST", case.path, json=case.body) as response:
        if response.status_code != 200:
            raise Wrong(f"{response.status_code}: {(await response.aread()).decode(errors='replace')}")
        if not case.body.get("stream"):
            for choice in json.loads(await response.aread())["choices"]:
                answer.add(choice)
            return
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return
            if line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise Wrong(f"in the stream: {event['error']}")
                for choice in event["choices"]:
                    answer.add(choice)
        raise Wrong("the stream ended without [DONE]")


def draw_scenarios(random: Random, count: int) -> list[Scenario]:
    """Short and long prompts, short and long outputs, greedy and sampled, streamed and not, chats that end by themselves,
    conversations, several choices, scored prompts."""
    kinds = ["short", "long prompt", "long output", "chat", "conversation", "choices", "scored"]
    return [_draw(random, kinds[number % len(kinds)], number) for number in range(count)]


def _draw(random: Random, kind: str, number: int) -> Scenario:
    body: dict[str, Any] = {"model": "tiny", "seed": random.randrange(2**32), "stream": random.random() < 0.6}
    body |= random.choice([{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.2, "top_k": 40}])
    name = f"{number} {kind}"
    if kind in ("chat", "conversation"):
        body |= {"max_tokens": random.randint(20, 60), "logprobs": True}
        first = random.choice(["Hello!", "Who are you?", "What is 2 plus 3?", "Tell me a story.", "How is the weather?"])
        body["messages"] = [{"role": "user", "content": first}]
        turns = ("And what comes then?", "Thank you. Once more, please.") if kind == "conversation" else ()
        return Scenario(Case(name, "/v1/chat/completions", body), turns)
    long_prompt = kind == "long prompt" or (kind == "scored" and random.random() < 0.5)
    length = random.randint(400, 900) if long_prompt else random.randint(1, 80)
    if kind == "long output":
        length += 120  # then some outgrow a page
    body["prompt"] = [random.randrange(*VOCABULARY) for _ in range(length)]
    body |= {"logprobs": random.choice([0, 2]), "ignore_eos": True}
    body["max_tokens"] = random.randint(120, 240) if kind == "long output" else random.randint(1, 40)
    if kind == "choices":
        body["n"] = 3
    if kind == "scored":
        body["echo"] = True
    return Scenario(Case(name, "/v1/completions", body))


def new_client(url: str) -> httpx.AsyncClient:
    """A connection a request, as long as it takes."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(None, connect=10.0), limits=limits, trust_env=False)


async def undisturbed(url: str, scenarios: list[Scenario], concurrency: int = 4) -> list[list[tuple[Case, Answer]]]:
    """Each scenario's requests in order, the turns of a conversation among them, with their answers."""
    limit = asyncio.Semaphore(concurrency)

    async def play(scenario: Scenario) -> list[tuple[Case, Answer]]:
        async with limit:
            case, said = scenario.case, []
            for number in range(len(scenario.turns) + 1):
                answer = Answer()
                await ask(client, case, answer)
                said.append((case, answer))
                if number < len(scenario.turns):
                    further = [{"role": "assistant", "content": answer.texts[0]}, {"role": "user", "content": scenario.turns[number]}]
                    body = case.body | {"messages": case.body["messages"] + further}
                    case = Case(f"{scenario.case.name}, turn {number + 2}", case.path, body)
            return said

    async with new_client(url) as client:
        return list(await asyncio.gather(*map(play, scenarios)))


class Traffic:
    """Clients of one cluster. The problems found are sentences; an empty list is what we want."""

    def __init__(self, url: str, expected: list[list[tuple[Case, Answer]]], seed: int, num_clients: int) -> None:
        self._url, self._expected, self._seed, self._num_clients = url, expected, seed, num_clients
        self._asking: set[asyncio.Task[None]] = set()
        self._is_over = False
        self.problems: list[str] = []
        self.breaks: list[Break] = []
        self.counts: collections.Counter[str] = collections.Counter()
        """ "finished", "left", "broken", "tokens" (of finished requests)."""
        self.longest_s = 0.0

    async def run(self) -> None:
        """Until `stop`; then every client finishes what it has asked for."""
        async with new_client(self._url) as self._client:
            await asyncio.gather(*(self._be_client(Random(f"{self._seed}/{number}")) for number in range(self._num_clients)))

    def stop(self) -> None:
        self._is_over = True

    @property
    def num_asking(self) -> int:
        return len(self._asking)

    async def storm(self, random: Random, count: int) -> int:
        """Many more requests at once, and after a moment these and all others are cut. Returns how many were."""
        cases = [random.choice(self._expected)[0] for _ in range(count)]
        many = [asyncio.create_task(self._finish(case, answer, leave_after_s=None, may_repeat=False)) for case, answer in cases]
        await asyncio.sleep(random.uniform(0.1, 2.5))
        cut = list(self._asking)
        for task in cut:
            task.cancel()
        await asyncio.gather(*many)
        return len(cut)

    async def _be_client(self, random: Random) -> None:
        while not self._is_over:
            for case, answer in random.choice(self._expected):
                leave_after_s = random.choice([0.0, random.uniform(0, 1), random.uniform(1, 5)]) if random.random() < LEAVE_SHARE else None
                await self._finish(case, answer, leave_after_s)

    async def _finish(self, case: Case, expected: Answer, leave_after_s: float | None, *, may_repeat: bool = True) -> None:
        """Ask until there is a whole answer, or the client leaves."""
        began = time.monotonic()
        while True:
            asked, answer = time.monotonic(), Answer()
            task = asyncio.create_task(ask(self._client, case, answer))
            self._asking.add(task)
            limit_s = REQUEST_LIMIT_S if leave_after_s is None else leave_after_s
            await asyncio.wait({task}, timeout=max(began + limit_s - time.monotonic(), 0.0))
            is_late = not task.done()
            task.cancel()
            await asyncio.wait({task})
            self._asking.discard(task)
            error = None if task.cancelled() else task.exception()
            is_whole = not task.cancelled() and error is None
            if not answer.begins(expected) or (is_whole and answer != expected):
                self.problems.append(f"{case.name}: answered {answer} instead of {expected}; asked: {case.body}")
            if task.cancelled():
                if is_late and leave_after_s is None:
                    self.problems.append(f"{case.name}: not over after {REQUEST_LIMIT_S} s, {answer.num_tokens} tokens had come")
                self.counts["left"] += 1
                return
            if error is None:
                self.counts["finished"] += 1
                self.counts["tokens"] += answer.num_tokens
                self.longest_s = max(self.longest_s, time.monotonic() - began)
                return
            if not isinstance(error, httpx.HTTPError):
                self.problems.append(f"{case.name}: {error!r} after {time.monotonic() - asked:.1f} s")
                return
            self.counts["broken"] += 1
            self.breaks.append(Break(case.name, asked, time.monotonic(), repr(error)))
            if not may_repeat:
                return
            await asyncio.sleep(RETRY_S)
