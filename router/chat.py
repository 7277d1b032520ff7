"""The three chat dialects: Chat Completions, Responses and Anthropic Messages.

deepseek-recipe converts a request, renders it in V4's prompt format and parses the output stream (reasoning, tool calls) back into
the dialect's events. What it does not know (top_k, penalties, n, ...) is read here; what the client set explicitly (temperature,
top_p) holds in thinking mode too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import deepseek_recipe as recipe
import orjson

from core.errors import InvalidRequest, ModelNotFound
from core.request import FinishReason, SamplingParams
from router.dialects import CHAT, MESSAGES, RESPONSES, Dialect, sse
from router.interleave import interleaved
from router.refusals import REFUSED, must_call, refusal, refuse_unenforceable, refuse_unservable, wants_single_call
from router.sampling import boolean, number, sampling_params
from router.service import Service
from router.tokens import StopMatcher

MAX_TOKENS = 2**31
"""What a client may ask for, before it is looked at how long a sequence may be."""

CALL_END = f"</{recipe.SpecialToken.Dsml.default_str()}invoke>"
"""How the model ends each call of a tool."""

_ENDINGS = {
    # The token that ends an answer is no text, and is counted: as in completions, and as other servers of open models do.
    FinishReason.STOP: (recipe.InferenceChunk.text("", 1), recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop)),
    FinishReason.LENGTH: (recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Length),),
}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    converted: recipe.ConversationRequest
    parsing: recipe.ParsingOptions
    prompt: tuple[int, ...]
    sampling: SamplingParams
    n: int
    is_single_call: bool
    """At most one tool is to be called."""
    stream: bool
    include_usage: bool
    echo: recipe.ResponsesEcho | None = None
    namespace_tools: Any = None
    repeated: Mapping[str, Any] = field(default_factory=dict)
    """Fields that a Response repeats, beside those of `echo`."""


class ChatFormat:
    """Rendering and parsing for one model; shared by all requests."""

    def __init__(self, service: Service, default_thinking: bool) -> None:
        self._service = service
        self._default_thinking = default_thinking
        self.tokenizer = recipe.Tokenizer.from_file(str(service.codec.path))
        self._encoding = recipe.DeepseekV4Encoding().with_tokenizer(self.tokenizer)

    def parse(self, body: Mapping[str, Any], dialect: Dialect) -> ChatRequest:
        """Raises InvalidRequest (or a kin) naming field and what is allowed."""
        service = self._service
        if not isinstance(body.get("model"), str):
            raise InvalidRequest(f"model must be a string; this server has {service.model!r}", param="model")
        if body["model"] != service.model:
            raise ModelNotFound(f"the model {body['model'][:100]!r} does not exist; this server has {service.model!r}", param="model")
        max_tokens_key = next((key for key in dialect.max_tokens_keys if body.get(key) is not None), dialect.max_tokens_keys[0])
        max_tokens = number(body, max_tokens_key, 1, MAX_TOKENS, None, integer=True)
        n = number(body, "n", 1, service.config.max_n if dialect is CHAT else 1, 1, integer=True)
        sampling = sampling_params(
            body, max_tokens=max_tokens or 1, num_logprobs=None, num_prompt_logprobs=None, vocab_size=service.codec.vocab_size
        )
        refuse_unservable(body, dialect)
        rest = {key: value for key, value in body.items() if key not in ("n", "seed", *dialect.max_tokens_keys)}
        if dialect is CHAT:  # OpenAI's newer word for the same
            rest["messages"] = [{**one, "role": "system"} if one.get("role") == "developer" else one for one in body["messages"]]
        if dialect is MESSAGES:
            rest["max_tokens"] = max_tokens or 1
        if dialect is RESPONSES and max_tokens is not None:
            rest["max_output_tokens"] = max_tokens  # the answer repeats it
        if dialect is RESPONSES and isinstance(wanted := body.get("include"), list) and "message.output_text.logprobs" in wanted:
            rest["top_logprobs"] = body.get("top_logprobs") or 0  # the library looks at this one only
        options = recipe.ConversionOptions(
            default_thinking_mode=self._wants_thinking(body),
            thinking_max_tokens_upper_bound=MAX_TOKENS,  # the longest sequence is the limit
            non_thinking_max_tokens_upper_bound=MAX_TOKENS,
        )
        options = options.with_model_versions_by_name({service.model: recipe.ModelVersion.DeepseekV4Pro})
        try:
            request = dialect.request(orjson.dumps(rest))
            echo = request.echo() if dialect is RESPONSES else None
            names = request.namespace_tool_map(options) if dialect is RESPONSES else None
            converted = request.convert(options)
            conversation, parsing = converted.conversation, converted.parsing_options
            if dialect is MESSAGES and must_call(body) and conversation.tool_choice == "auto":  # "any": the library takes it for "auto"
                conversation, parsing.starts_in_tool_calls = _with_call(conversation), True
            refuse_unenforceable(conversation, body, dialect)
            rendered = self._encoding.render_conversation(conversation).prompt
            service.codec.refuse_overlong(rendered, service.longest(), dialect.prompt_key)
            prompt = tuple(self._encoding.encode(conversation))
        except REFUSED as error:
            raise refusal(error, rest, dialect, options) from error
        inference = converted.inference_options
        sampling = dataclasses.replace(
            sampling,
            max_tokens=service.check_length(len(prompt), max_tokens, dialect.prompt_key, max_tokens_key),
            num_logprobs=(inference.top_logprobs or 0) if inference.logprobs else None,
        )
        include_usage = dialect is CHAT and bool((body.get("stream_options") or {}).get("include_usage"))  # the library looked at both
        is_single = wants_single_call(body, dialect)
        repeated = {"metadata": _metadata(body), "parallel_tool_calls": not is_single} if dialect is RESPONSES else {}
        return ChatRequest(converted, parsing, prompt, sampling, n, is_single, converted.stream, include_usage, echo, names, repeated)

    def _wants_thinking(self, body: Mapping[str, Any]) -> bool:
        """`chat_template_kwargs: {thinking: bool}` is how open-model servers are told; the dialects' own fields win over the default. An
        answer that must begin with a call cannot begin with a thought."""
        default, extra = self._default_thinking and not must_call(body), body.get("chat_template_kwargs")
        if extra is None:
            return default
        if not isinstance(extra, dict):
            raise InvalidRequest("chat_template_kwargs must be an object", param="chat_template_kwargs")
        return boolean(extra, "thinking", boolean(extra, "enable_thinking", default))


def _metadata(body: Mapping[str, Any]) -> dict[str, Any]:
    found = body.get("metadata")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InvalidRequest("metadata must be an object", param="metadata")
    return found


def _with_call(conversation: recipe.Conversation) -> recipe.Conversation:
    """The conversation, to be answered with a call of any of its tools. Raises InvalidRequest in thinking mode."""
    if conversation.thinking_mode:
        raise InvalidRequest(
            "tool_choice asks for a tool, which is not possible in thinking mode; allowed: auto, none", param="tool_choice"
        )
    tools, messages, effort = conversation.tools, conversation.messages, conversation.reasoning_effort
    return recipe.Conversation(messages, thinking_mode=False, tools=tools, tool_choice="required", reasoning_effort=effort)


class Chat:
    """Runs a parsed chat request: `events` for streaming, `response` for a whole answer."""

    def __init__(self, service: Service, form: ChatFormat, dialect: Dialect, request: ChatRequest, name: str) -> None:
        """name: of its own, for the answer's id and the log."""
        self._service, self._form, self._dialect, self._request = service, form, dialect, request
        self.id = dialect.id_prefix + name
        self._created = int(time.time())
        self._usage: list[dict[str, Any]] = []

    def _processor(self) -> recipe.StreamProcessor:
        generator = self._dialect.request.chunk_generator(self._request.converted, self.id, self._service.model)
        if self._dialect is RESPONSES:
            generator = generator.with_echo(self._request.echo).with_namespace_tool_map(self._request.namespace_tools or {})
        return recipe.StreamProcessor(generator, self._request.parsing, self._form.tokenizer)

    async def _chunks(self, index: int) -> AsyncGenerator[Any, None]:
        """The library's chunks of one choice."""
        processor, first_call = self._processor(), StopMatcher([CALL_END])
        sampling = dataclasses.replace(self._request.sampling, seed=(self._request.sampling.seed + index) % 2**64)
        usage = recipe.PromptUsage(prompt_tokens=len(self._request.prompt))
        opening = processor.push(recipe.InferenceChunk.ready(prompt_usage=usage))  # held: until a token is there, errors have a status
        journey = self._service.new_journey(f"{self.id}-{index}", len(self._request.prompt))
        async with aclosing(self._service.sequence(journey, self._request.prompt, sampling)) as outputs:
            async for output in outputs:
                for chunk in opening:
                    yield chunk
                opening = []
                ids, logprobs = list(output.token_ids), None
                if output.finish_reason is FinishReason.STOP:
                    ids = ids[:-1]
                if self._request.is_single_call:
                    ids = self._through_first_call(ids, first_call)
                if self._request.converted.inference_options.logprobs:
                    found = output.logprobs[: len(ids)]
                    logprobs = [(l.logprob, list(zip(l.top_ids, l.top_logprobs, strict=True))) for l in found]
                if ids:
                    for chunk in processor.push(recipe.InferenceChunk.tokens(ids, logprobs)):
                        yield chunk
                if first_call.matched is not None and not processor.finished:
                    for chunk in processor.push(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop)):
                        yield chunk
                if processor.finished:
                    journey.finish_reason = FinishReason.STOP  # at a stop sequence
                    return
                if output.finish_reason is not None:
                    for ending in _ENDINGS[output.finish_reason]:
                        for chunk in processor.push(ending):
                            yield chunk
        for chunk in processor.finish():
            yield chunk

    def _through_first_call(self, ids: list[int], first_call: StopMatcher) -> list[int]:
        """The tokens up to the one with which the first call of a tool is whole."""
        for place, token in enumerate(ids, 1):
            first_call.add(self._service.codec.spelling(token))
            if first_call.matched is not None:
                return ids[:place]
        return ids

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, ready to send."""
        request, response = self._request, self._dialect.response
        async with (
            self._service.admitted(request.n, len(request.prompt) * request.n),
            aclosing(interleaved(self._chunks(index) for index in range(request.n))) as chunks,
        ):
            async for index, chunk in chunks:
                text = self._event_text(index, chunk)
                if text is not None:
                    yield sse(text, response.sse_event_name(chunk))
        if request.include_usage:
            yield sse(orjson.dumps({**self._last_envelope(), "choices": [], "usage": total_usage(self._usage)}))
        done = response.sse_done_data()
        if done is not None:
            yield sse(done.encode())

    def _event_text(self, index: int, chunk: Any) -> bytes | None:
        """The chunk as JSON: for Chat Completions with its choice index, and usage set aside for the end; for Responses with what the
        library does not repeat."""
        text: str = chunk.to_json()
        if self._dialect is not CHAT:
            event = orjson.loads(text) if self._request.repeated and '"response":{' in text else {}
            if "response" not in event:
                return text.encode()
            event["response"].update(self._request.repeated)
            return orjson.dumps(event)
        event = orjson.loads(text)
        event["created"] = self._created
        usage = event.pop("usage", None)
        if usage:
            self._usage.append(usage)
        if not event["choices"]:
            return None
        for choice in event["choices"]:
            choice["index"] = index
        return orjson.dumps(event)

    def _last_envelope(self) -> dict[str, Any]:
        return {"id": self.id, "object": "chat.completion.chunk", "created": self._created, "model": self._service.model}

    async def response(self) -> dict[str, Any]:
        """The whole answer."""
        request = self._request

        async def one(index: int) -> dict[str, Any]:
            whole = self._dialect.response(self.id, self._service.model, self._created, len(request.prompt), 0)
            async with aclosing(self._chunks(index)) as chunks:
                async for chunk in chunks:
                    whole.accumulate(chunk)
            answer: dict[str, Any] = orjson.loads(whole.to_json())
            return answer

        async with self._service.admitted(request.n, len(request.prompt) * request.n):
            tasks = [asyncio.create_task(one(index)) for index in range(request.n)]
            try:
                answers = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        if request.n == 1:
            return {**answers[0], **request.repeated}
        merged = answers[0]
        merged["choices"] = [{**answer["choices"][0], "index": index} for index, answer in enumerate(answers)]
        merged["usage"] = total_usage([answer["usage"] for answer in answers])
        return merged


def total_usage(choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of a Chat Completions request, from those of its choices: one prompt, and the tokens of all."""
    first, completion = choices[0], sum(usage["completion_tokens"] for usage in choices)
    whole = {**first, "completion_tokens": completion, "total_tokens": first["prompt_tokens"] + completion}
    details: Counter[str] = Counter()
    for usage in choices:
        details.update(usage.get("completion_tokens_details", {}))  # of a thinking model only
    return whole | ({"completion_tokens_details": dict(details)} if details else {})
