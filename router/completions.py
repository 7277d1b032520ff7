"""/v1/completions: text or token ids in, text out, with everything the OpenAI dialect has for it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import orjson

from core.errors import InvalidRequest
from core.request import FinishReason, SamplingParams, TokenLogprobs
from router.dialects import sse
from router.interleave import interleaved
from router.relay import Output
from router.sampling import MAX_LOGPROBS, boolean, number, sampling_params, text_list
from router.service import Service
from router.tokens import Detokenizer, StopMatcher

KNOWN = frozenset(
    (
        "model",
        "prompt",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "stream",
        "stream_options",
        "logprobs",
        "echo",
        "stop",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "seed",
        "ignore_eos",
        "stop_token_ids",
        "user",
        "best_of",
        "suffix",
    )
)
MAX_PROMPTS = 128


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    prompts: tuple[tuple[int, ...], ...]
    sampling: SamplingParams
    n: int
    stops: tuple[str, ...]
    echo: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    """Each event says how many tokens its sequence has so far, and there is one for each step, with or without text."""
    logprobs: int | None
    echo_only: bool
    """max_tokens 0 with echo: the prompt is scored and nothing is generated."""


def parse(body: Mapping[str, Any], service: Service) -> CompletionRequest:
    """Raises InvalidRequest naming field and limit."""
    for key in ("suffix", "best_of"):
        if body.get(key) not in (None, 1 if key == "best_of" else None):
            raise InvalidRequest(f"{key} is not supported", param=key)
    prompts = _prompts(body.get("prompt"), service)
    max_tokens = number(body, "max_tokens", 0, 2**31, 16, integer=True)
    echo = boolean(body, "echo", False)
    if max_tokens == 0 and not echo:
        raise InvalidRequest("max_tokens is 0; it must be at least 1 unless echo is true", param="max_tokens")
    longest = max(len(prompt) for prompt in prompts)
    service.check_length(longest, max(max_tokens, 1), "prompt")
    logprobs = number(body, "logprobs", 0, MAX_LOGPROBS, None, integer=True)
    options = {} if body.get("stream_options") is None else body["stream_options"]
    if not isinstance(options, dict):
        raise InvalidRequest("stream_options must be an object", param="stream_options")
    return CompletionRequest(
        prompts=prompts,
        sampling=sampling_params(
            body,
            max_tokens=max(max_tokens, 1),
            num_logprobs=logprobs,
            num_prompt_logprobs=logprobs if echo else None,
            vocab_size=service.codec.vocab_size,
        ),
        n=number(body, "n", 1, service.config.max_n, 1, integer=True),
        stops=text_list(body, "stop"),
        echo=echo,
        stream=boolean(body, "stream", False),
        include_usage=boolean(options, "include_usage", False),
        continuous_usage=boolean(body, "stream", False) and boolean(options, "continuous_usage_stats", False),
        logprobs=logprobs,
        echo_only=max_tokens == 0,
    )


def _prompts(value: Any, service: Service) -> tuple[tuple[int, ...], ...]:
    """One prompt or several, each text or token ids."""
    many = value if isinstance(value, list) and value and isinstance(value[0], (str, list)) else [value]
    if len(many) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt has {len(many)} items; at most {MAX_PROMPTS} are allowed", param="prompt")
    vocab = service.codec.vocab_size
    prompts = []
    for item in many:
        if isinstance(item, str):
            try:
                service.codec.refuse_overlong(item, service.longest(), "prompt")
                ids = service.codec.encode(item)
            except UnicodeEncodeError as error:
                raise InvalidRequest("prompt holds a lone surrogate: it is not valid text", param="prompt") from error
        elif isinstance(item, list):
            bad = next((token for token in item if type(token) is not int or not 0 <= token < vocab), None)
            if bad is not None:
                raise InvalidRequest(f"prompt: {str(bad)[:40]!r} is not a token id in [0, {vocab})", param="prompt")
            ids = item
        else:
            raise InvalidRequest("prompt must be a string, a list of strings, a list of token ids or a list of such lists", param="prompt")
        if not ids:
            raise InvalidRequest("prompt is empty; it needs at least one token", param="prompt")
        prompts.append(tuple(ids))
    return tuple(prompts)


@dataclass(slots=True)
class _Choice:
    """One sequence on its way to text."""

    index: int
    text: str = ""
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)
    offset: int = 0
    num_tokens: int = 0
    finish_reason: str | None = None

    def take(self) -> dict[str, Any]:
        """The choice as an event or response item; what was taken is cleared."""
        logprobs = None
        if self.tokens:
            logprobs = {
                "tokens": self.tokens,
                "token_logprobs": self.token_logprobs,
                "top_logprobs": self.top_logprobs,
                "text_offset": self.text_offset,
            }
        item = {"index": self.index, "text": self.text, "logprobs": logprobs, "finish_reason": self.finish_reason}
        self.text, self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset = "", [], [], [], []
        return item


def usage_of(num_prompt: int, num_output: int) -> dict[str, int]:
    return {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}


class Completion:
    """Runs a parsed request: `events` for streaming, `response` for a whole answer."""

    def __init__(self, service: Service, request: CompletionRequest, name: str) -> None:
        """name: of its own, for the answer's id and the log."""
        self._service, self._request = service, request
        self.id = f"cmpl-{name}"
        self._created = int(time.time())
        self.num_output_tokens = 0

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self._request.prompts)

    def usage(self) -> dict[str, Any]:
        return usage_of(self.num_prompt_tokens, self.num_output_tokens)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, ready to send."""
        async with aclosing(self.choices()) as items:
            async for item in items:
                usage = item.pop("usage", None)
                yield sse(orjson.dumps(self._envelope([item]) | ({} if usage is None else {"usage": usage})))
        if self._request.include_usage:
            yield sse(orjson.dumps(self._envelope([]) | {"usage": self.usage()}))
        yield sse(b"[DONE]")

    async def response(self) -> dict[str, Any]:
        """The whole answer."""
        pieces: dict[int, list[dict[str, Any]]] = {}
        async with aclosing(self.choices()) as items:
            async for item in items:
                pieces.setdefault(item["index"], []).append(item)
        return self._envelope([_whole(pieces[index]) for index in sorted(pieces)]) | {"usage": self.usage()}

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self._created, "model": self._service.model, "choices": choices}

    async def choices(self) -> AsyncGenerator[dict[str, Any], None]:
        """Items of `choices`, interleaved over all sequences. Raises the first error of any; closing it cancels the rest."""
        request = self._request
        jobs = [(p * request.n + k, prompt, k) for p, prompt in enumerate(request.prompts) for k in range(request.n)]
        async with (
            self._service.admitted(len(jobs), self.num_prompt_tokens * request.n),
            aclosing(interleaved(self._one(_Choice(index), prompt, self._sampling(k)) for index, prompt, k in jobs)) as items,
        ):
            async for _, item in items:
                yield item

    def _sampling(self, k: int) -> SamplingParams:
        """Of a prompt's k-th choice."""
        sampling = self._request.sampling
        return dataclasses.replace(sampling, seed=(sampling.seed + k) % 2**64)

    async def _one(self, choice: _Choice, prompt: tuple[int, ...], sampling: SamplingParams) -> AsyncGenerator[dict[str, Any], None]:
        request, codec = self._request, self._service.codec
        text, matcher = Detokenizer(codec), StopMatcher(request.stops)
        if request.echo:  # held until a token is there: before that errors have a status, and nobody waits outside of `sequence`
            choice.text = codec.decode(prompt)
            if request.logprobs is None:
                choice.offset = len(choice.text)
            else:
                self._add_logprobs(choice, prompt[:1], (None,))
                choice.offset += len(codec.spelling(prompt[0]))
        journey = self._service.new_journey(f"{self.id}-{choice.index}", len(prompt))
        async with aclosing(self._service.sequence(journey, prompt, sampling)) as outputs:
            async for output in outputs:
                if output.prompt_logprobs:
                    start = output.prompt_start
                    for token, found in zip(prompt[start:], output.prompt_logprobs, strict=False):
                        self._add_logprobs(choice, (token,), (found,))
                        choice.offset += len(codec.spelling(token))
                    continue
                if request.echo_only:
                    choice.finish_reason, journey.finish_reason = "length", FinishReason.LENGTH
                    break
                self._add(choice, output, text, matcher)
                if matcher.matched is not None:
                    choice.finish_reason, journey.finish_reason = "stop", FinishReason.STOP
                if choice.text or choice.tokens or choice.finish_reason or request.continuous_usage:
                    item = choice.take()
                    yield item | {"usage": usage_of(len(prompt), choice.num_tokens)} if request.continuous_usage else item
                if choice.finish_reason:
                    return
        yield choice.take()

    def _add(self, choice: _Choice, output: Output, text: Detokenizer, matcher: StopMatcher) -> None:
        for place, token in enumerate(output.token_ids):
            is_end = output.finish_reason is FinishReason.STOP and place == len(output.token_ids) - 1
            choice.num_tokens += 1
            self.num_output_tokens += 1
            fresh = "" if is_end else matcher.add(text.add(token))
            if self._request.logprobs is not None and output.logprobs:
                self._add_logprobs(choice, (token,), (output.logprobs[place],))
            choice.text += fresh
            choice.offset += len(fresh)
            if matcher.matched is not None:
                return
        if output.finish_reason is not None:
            choice.finish_reason = output.finish_reason.value
            rest = matcher.add(text.finish()) + matcher.finish()
            choice.text += rest
            choice.finish_reason = "stop" if matcher.matched is not None else choice.finish_reason

    def _add_logprobs(self, choice: _Choice, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs | None, ...]) -> None:
        spelling = self._service.codec.spelling
        for token, found in zip(tokens, logprobs, strict=True):
            choice.tokens.append(spelling(token))
            choice.text_offset.append(choice.offset)
            choice.token_logprobs.append(None if found is None else found.logprob)
            choice.top_logprobs.append(None if found is None else _by_spelling(token, found, spelling))


def _whole(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A choice of its items."""
    found = [item["logprobs"] for item in items if item["logprobs"]]
    logprobs = {key: [value for some in found for value in some[key]] for key in found[0]} if found else None
    text = "".join(item["text"] for item in items)
    return {"index": items[0]["index"], "text": text, "logprobs": logprobs, "finish_reason": items[-1]["finish_reason"]}


def _by_spelling(token: int, found: TokenLogprobs, spelling: Callable[[int], str]) -> dict[str, float]:
    """The most likely tokens and the token itself. Of those that look alike, parts of characters, the most likely one."""
    tops: dict[str, float] = {}
    for other, logprob in (*zip(found.top_ids, found.top_logprobs, strict=True), (token, found.logprob)):
        tops.setdefault(spelling(other), logprob)
    return tops
