"""The HTTP surface on a loopback port with no rank behind it: what is refused, how, and that it is never a 500."""

from __future__ import annotations

import asyncio
import json
import pathlib
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from router.config import RouterConfig
from router.metrics import MAX_FIELDS
from router.server import Router

MODEL = pathlib.Path(__file__).resolve().parents[3] / "deploy" / "demo_model" / "checkpoint"
STRANGER = {"authorization": "Bearer nobody"}
HELLO = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 4},
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("# operators\nalpha\nbeta\n")
    config = RouterConfig(port=0, default_thinking=False, wait_for_members_s=0.0, api_keys_file=str(keys), max_body_bytes=20_000)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(20)

    router = Router(config=config, served_name="demo", tokenizer_folder=MODEL, max_model_len=512, members=[])
    run(router.start())
    headers = {"authorization": "Bearer beta"}
    with httpx.Client(base_url=f"http://127.0.0.1:{router.port}", headers=headers, trust_env=False, timeout=20) as client:
        yield client
    assert router.num_requests == 0
    run(router.stop())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def message_of(path: str, response: httpx.Response) -> str:
    """The sentence of an error in the shape of the route's dialect."""
    body = response.json()
    if path.startswith("/v1/messages"):
        assert body["type"] == "error" and set(body["error"]) == {"type", "message"}
    else:
        assert set(body["error"]) == {"message", "type", "param", "code"}
    message: str = body["error"]["message"]
    return message


@pytest.mark.parametrize("path", [*BODIES, "/v1/models", "/health", "/nowhere"])
def test_every_reply_has_a_name_of_its_own_and_a_refusal_is_in_the_log_under_it(
    client: httpx.Client, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "baton.http")
    replies = [client.request("POST" if path in BODIES else "GET", path, json={}, headers=headers) for headers in ({}, STRANGER)]
    names = [reply.headers["x-request-id"] for reply in replies]
    assert len(set(names)) == 2 and names == [reply.headers["request-id"] for reply in replies]
    statuses = [reply.status_code for reply in replies]
    assert statuses == {"/health": [200, 200], "/nowhere": [404, 404], "/v1/models": [200, 401]}.get(path, [400, 401])
    said = [record.getMessage() for record in caplog.records if "http.refused" in record.getMessage()]
    refused = [f"id={name} path={path} status={status}" for name, status in zip(names, statuses, strict=True) if status >= 400]
    assert len(said) == len(refused) and all(part in line for part, line in zip(refused, said, strict=True))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_without_a_rank_every_dialect_answers_503_streamed_or_not(client: httpx.Client, path: str, stream: bool) -> None:
    response = client.post(path, json={"model": "demo", "stream": stream, **BODIES[path]})
    assert response.status_code == 503
    assert "no prefill rank" in message_of(path, response)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe{}", b'{"model": NaN}', b'{"model": "demo", "n": 1e999}', b"[" * 5000]
)
def test_a_body_that_is_no_json_object_is_400(client: httpx.Client, path: str, content: bytes) -> None:
    response = client.post(path, content=content)
    assert response.status_code == 400
    assert message_of(path, response)


@pytest.mark.parametrize("path", BODIES)
def test_limits_model_and_route_are_named(client: httpx.Client, path: str) -> None:
    large = client.post(path, content=b" " * 20_001)
    assert (large.status_code, "20000" in message_of(path, large)) == (413, True)
    other = client.post(path, json={"model": "other", **BODIES[path]})
    assert (other.status_code, "'other'" in message_of(path, other)) == (404, True)
    for refused, status in ((client.post(path + "/x", json={}), 404), (client.get(path), 405)):
        assert refused.status_code == status
        assert message_of(path, refused).startswith("no route ")
        assert path.startswith("/v1/messages") or refused.json()["error"]["code"] == "NoRoute"
        assert (refused.headers.get("allow"), "allowed: POST" in refused.text) == (("POST", True) if status == 405 else (None, False))
        assert ("/docs" in refused.text) is (status == 404)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("num_words", [1000, 9000])  # tokenised as a whole, and given up after the first piece
def test_a_prompt_that_is_too_long_is_400_and_named_as_openai_names_it(client: httpx.Client, path: str, num_words: int) -> None:
    field = next(iter(BODIES[path]))
    text = "a " * num_words
    value = [{"role": "user", "content": text}] if field == "messages" else text
    refused = client.post(path, json={"model": "demo", **BODIES[path], field: value})
    assert (refused.status_code, "512" in message_of(path, refused)) == (400, True), refused.text
    assert "prompt is too long" in refused.text and "this model's maximum context length is" in refused.text, "what clients look for"
    if path != "/v1/messages":
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert refused.json()["error"]["param"] == field


IMAGES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"type": "image_url", "image_url": {"url": "http://host/a.png"}},
    "/v1/responses": {"type": "input_image", "image_url": "http://host/a.png"},
    "/v1/messages": {
        "type": "tool_result",
        "tool_use_id": "a",
        "content": [{"type": "image", "source": {"type": "url", "url": "http://h"}}],
    },
}


@pytest.mark.parametrize("path", IMAGES)
def test_an_image_is_refused_wherever_it_stands(client: httpx.Client, path: str) -> None:
    field = "input" if path == "/v1/responses" else "messages"
    words = {"type": "input_text" if path == "/v1/responses" else "text", "text": "a"}
    for parts, status in (([words, IMAGES[path]], 400), ([words], 503)):
        response = client.post(path, json={"model": "demo", "max_tokens": 4, field: [{"role": "user", "content": parts}]})
        assert response.status_code == status, response.text
    deep: dict[str, Any] = IMAGES[path]
    for _ in range(200):
        deep = {"role": "user", "content": [deep]}
    refused = client.post(path, json={"model": "demo", "max_tokens": 4, field: [deep]})
    assert (refused.status_code, "images" in message_of(path, refused)) == (400, True)


@pytest.mark.parametrize("field", [{"previous_response_id": "resp_1"}, {"conversation": "conv_1"}, {"background": True}])
def test_a_stateful_response_is_refused_by_name(client: httpx.Client, field: dict[str, Any]) -> None:
    response = client.post("/v1/responses", json={"model": "demo", "input": "Hello", **field})
    assert response.status_code == 400
    assert response.json()["error"]["param"] in field
    assert client.post("/v1/responses", json={"model": "demo", "input": "Hello", **dict.fromkeys(field)}).status_code == 503


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("stream", [False, True])
def test_dialects_without_choices_refuse_n(client: httpx.Client, path: str, stream: bool) -> None:
    response = client.post(path, json={"model": "demo", "n": 2, "stream": stream, **BODIES[path]})
    assert response.status_code == 400
    assert message_of(path, response).startswith("n ")


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("headers", "is_known"),
    [
        ({"authorization": ""}, False),
        ({"authorization": "Bearer gamma"}, False),
        ({"authorization": "Bearer"}, False),
        ({"authorization": "Bearer alphabeta"}, False),
        ({"authorization": "alpha"}, False),
        ({"authorization": "Basic alpha"}, False),
        ({"authorization": "Bearer alpha"}, True),
        ({"authorization": "bearer alpha"}, True),
        ({"authorization": "", "x-api-key": "beta"}, True),
        ({"authorization": "", "x-api-key": "# operators"}, False),
        ({"authorization": "", "x-api-key": ""}, False),
        ({"authorization": "Bearer alpha", "x-api-key": "of another server"}, True),
    ],
)
def test_only_known_keys_open_v1(client: httpx.Client, path: str, headers: dict[str, str], is_known: bool) -> None:
    response = client.post(path, json={"model": "demo", **BODIES[path]}, headers=headers)
    assert response.status_code == (503 if is_known else 401)
    assert message_of(path, response)
    assert is_known or answered(client, "/v1")["401"] > 0
    assert client.get("/health", headers={"authorization": ""}).status_code == 200


def test_every_example_of_the_documentation_is_accepted(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    examples = {path: routes["post"]["requestBody"] for path, routes in paths.items() if "post" in routes}
    assert set(examples) >= set(BODIES)
    for path, body in examples.items():
        response = client.post(path, json=body["content"]["application/json"]["example"])
        assert response.status_code == (200 if path.endswith("count_tokens") else 503), f"{path}: {response.text}"


def test_health_ready_models_and_metrics(client: httpx.Client) -> None:
    assert client.get("/health").status_code == 200
    assert client.get("/ready").json() == {"ready": False, "ranks": {"prefill": 0, "decode": 0}}
    first, second = (client.get("/v1/models").json() for _ in range(2))
    assert first == second and [model["id"] for model in first["data"]] == ["demo"]
    client.post("/v1/completions", json={"model": "demo", "prompt": "a"})
    page = client.get("/metrics").text
    assert "_created" not in page
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert any(s.labels == {"route": "/v1/completions", "status": "503"} for s in families["baton_router_requests"].samples)


def test_names_that_clients_make_up_do_not_fill_the_metrics(client: httpx.Client) -> None:
    body = {"model": "demo", "prompt": "a"}
    for part in range(3):
        client.post("/v1/completions", json=body | {f"made_up_{part}_{number}": 1 for number in range(100)})
    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    counts = {s.labels["field"]: s.value for s in families["baton_router_ignored_fields"].samples}
    assert len(counts) <= MAX_FIELDS + 1 and sum(counts.values()) >= 300 and counts["other"] >= 200


@pytest.mark.parametrize("path", BODIES)
def test_a_full_router_refuses_a_request_before_it_looks_into_it(client: httpx.Client, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"model": "demo", **BODIES[path], "temperature": "hot"}
    assert client.post(path, json=body).status_code == 400
    monkeypatch.setattr("router.admission.Room.fits", lambda room, amount: False)
    response = client.post(path, json=body)
    assert response.status_code == 429 and 1 <= int(response.headers["retry-after"]) <= 60
    assert "requests are in progress, the limit is 1024" in message_of(path, response)
    assert client.post("/v1/messages/count_tokens", json={"model": "demo", "messages": HELLO}).status_code == 200, "it takes no room"


def answered(client: httpx.Client, path: str) -> dict[str, float]:
    """Requests of a route by status."""
    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    samples = [sample for sample in families["baton_router_requests"].samples if sample.labels["route"] == path]
    return {sample.labels["status"]: sample.value for sample in samples}


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_that_never_begins_is_counted_once_as_what_it_ends_in(client: httpx.Client, path: str) -> None:
    before = answered(client, path)
    client.post(path, json={"model": "demo", "stream": True, **BODIES[path]})
    after = answered(client, path)
    assert {status: count - before.get(status, 0) for status, count in after.items() if count != before.get(status, 0)} == {"503": 1}


def test_a_stream_that_breaks_ends_in_an_error_of_its_dialect(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *arguments: Any) -> None: ...

        async def events(self) -> AsyncIterator[bytes]:
            yield b"data: {}\n\n"
            raise ZeroDivisionError("a bug")

    monkeypatch.setattr("router.app.Chat", Broken)
    paths = ("/v1/chat/completions", "/v1/messages")
    found = {path: client.post(path, json={"model": "demo", "stream": True, **BODIES[path]}).text for path in paths}
    begun = "data: {}\n\n"
    assert found["/v1/chat/completions"].startswith(begun + 'data: {"error":{"message":"internal error: ZeroDivisionError"')
    assert found["/v1/messages"].startswith(begun + 'event: error\ndata: {"type":"error","error":{"type":"api_error"')


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20) | st.sampled_from([1, 2, 3, 16]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    (
        "model", "prompt", "messages", "input", "max_tokens", "max_completion_tokens", "max_output_tokens", "temperature",
        "top_p", "top_k", "min_p", "n", "stop", "stop_sequences", "stream", "stream_options",
        "logprobs", "top_logprobs", "echo", "seed", "presence_penalty", "repetition_penalty", "logit_bias", "ignore_eos",
        "stop_token_ids", "tools", "tool_choice", "response_format", "thinking", "reasoning", "reasoning_effort", "chat_template_kwargs",
        "system", "instructions", "text", "metadata", "previous_response_id", "conversation", "background",
    )
)  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(sorted(BODIES)), changes=st.dictionaries(FIELDS, VALUES, min_size=1, max_size=3))
def test_no_value_of_any_field_is_a_500(client: httpx.Client, path: str, changes: dict[str, Any]) -> None:
    content = json.dumps({"model": "demo", **BODIES[path], **changes}).encode()
    response = client.post(path, content=content)
    assert 400 <= response.status_code < 500 or response.status_code == 503, f"{response.status_code}: {response.text}"
    message_of(path, response)
