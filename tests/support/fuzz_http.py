"""Hostile HTTP traffic: malformed, mistyped, oversized, slow and cut requests. Seeded; bounded in number and time.

    python -m tests.support.fuzz_http --url http://127.0.0.1:8000 --count 10000 --seed 1

prints how many requests got which status. A server in order answers with 4xx (or 200, where a mutation happened to leave a good
request) and never with 5xx, and answers every connection that was not cut by the client.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import sys
import time
import urllib.parse
from dataclasses import dataclass
from typing import Any

ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/messages/count_tokens")
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1e308, -1e308, 2**63, 2**64, -(2**63), 10**30, 0.5, "", "x", "\x00", "é" * 50, "\ud83d", [], {}, [[]],
    [None], [{}], {"a": 1}, [1, "2"], "1", [-1], [10**9], [True], [[1], ["a"]], {"type": 5}, "nan", [[[[]]]],
)  # fmt: skip
FIELDS = [
    "model",
    "prompt",
    "messages",
    "input",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "stop_sequences",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "echo",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "ignore_eos",
    "stop_token_ids",
    "tools",
    "tool_choice",
    "response_format",
    "thinking",
    "reasoning_effort",
    "chat_template_kwargs",
    "system",
    "suffix",
    "best_of",
    "user",
    "metadata",
]


@dataclass(frozen=True, slots=True)
class Attack:
    """`payload` is sent as it is; `cut`: the client leaves after it without reading; `pause_s`: it waits half-way."""

    kind: str
    payload: bytes
    cut: bool = False
    pause_s: float = 0.0


def good_body(rng: random.Random, route: str, model: str) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "max_tokens": 1, "temperature": 0}
    if route == "/v1/completions":
        body["prompt"] = rng.choice(("Once", [5, 6, 7], ["a", "b"]))
    elif route == "/v1/responses":
        body["input"] = "Hi"
        body["max_output_tokens"] = body.pop("max_tokens")
    else:
        body["messages"] = [{"role": "user", "content": "Hi"}]
    return body


def http(route: str, content: bytes, *, method: str = "POST", length: int | None = None) -> bytes:
    size = len(content) if length is None else length
    head = f"{method} {route} HTTP/1.1\r\nhost: fuzz\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {size}\r\n\r\n".encode() + content


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


def attack(rng: random.Random, model: str, max_body_bytes: int) -> Attack:
    route = rng.choice(ROUTES)
    body = good_body(rng, route, model)
    text = json.dumps(body).encode()
    kind = rng.choice(
        ("types",) * 8
        + ("missing", "bytes", "cut_json", "deep", "ids", "oversize", "utf8", "roles", "empty", "route", "slow", "cut", "huge", "protocol")
    )
    if kind == "types":
        for field in rng.sample(FIELDS, rng.randint(1, 3)):
            body[field] = rng.choice(ODD_VALUES)
        return Attack(kind, http(route, json.dumps(body).encode()))
    if kind == "missing":
        del body[rng.choice(list(body))]
        body["model"] = rng.choice((model, "other", 5))
        return Attack(kind, http(route, json.dumps(body).encode()))
    if kind == "bytes":
        damaged = bytearray(text)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        return Attack(kind, http(route, bytes(damaged)))
    if kind == "cut_json":
        return Attack(kind, http(route, text[: rng.randrange(len(text))]))
    if kind == "deep":
        return Attack(kind, http(route, text[:-1] + b', "metadata": ' + deep(rng.choice((50, 5000, 50000))).encode() + b"}"))
    if kind == "ids":
        ids = [rng.choice((-1, 10**6, 2**31, 2**63, 5)) for _ in range(rng.randint(1, 5))]
        return Attack(kind, http("/v1/completions", json.dumps({"model": model, "prompt": ids, "max_tokens": 1}).encode()))
    if kind == "oversize":
        prompt = [5] * rng.choice((9000, 20000))
        return Attack(kind, http("/v1/completions", json.dumps({"model": model, "prompt": prompt, "max_tokens": 1}).encode()))
    if kind == "utf8":
        return Attack(kind, http(route, text[:-2] + rng.randbytes(8) + text[-2:]))
    if kind == "roles":
        message = {"role": rng.choice(("user", "nobody", 5, None, "tool", "assistant")), "content": rng.choice(ODD_VALUES)}
        body = {"model": model, "max_tokens": 1, "messages": [message] * rng.randint(0, 3)}
        return Attack(kind, http(rng.choice(ROUTES[1:3]), json.dumps(body).encode()))
    if kind == "empty":
        return Attack(kind, http(route, rng.choice((b"", b"null", b"[]", b"0", b'""', b"{}", b"\xef\xbb\xbf{}"))))
    if kind == "route":
        odd = rng.choice(("/", "/v1", "/v1/modelz", "/v1/models/%ff", "/v1/completions/x", "/%00", "/v1/models/" + "a" * 3000))
        return Attack(kind, http(odd, text, method=rng.choice(("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "BREW"))))
    if kind == "slow":
        return Attack(kind, http(route, text[:-1]), pause_s=0.2)
    if kind == "cut":
        whole = http(route, text)
        return Attack(kind, whole[: rng.randint(1, len(whole))], cut=True)
    if kind == "huge":
        return Attack(kind, http(route, b"{", length=max_body_bytes + rng.randint(1, 10**9)) + b" " * 1000, cut=True)
    lines = (
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
        rng.randbytes(60) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 5000 + b"\r\n",
    )
    return Attack(kind, rng.choice(lines))


async def strike(host: str, port: int, one: Attack, timeout_s: float) -> str:
    """Send one attack; returns the status, "cut" (we left), "closed" (the server hung up without a word) or "stuck"."""
    reader, writer = await asyncio.open_connection(host, port, limit=2**16)
    try:
        if one.pause_s:
            half = len(one.payload) // 2
            writer.write(one.payload[:half])
            await writer.drain()
            await asyncio.sleep(one.pause_s)
            writer.write(one.payload[half:])
            writer.write_eof()  # a body shorter than announced
        else:
            writer.write(one.payload)
        await writer.drain()
        if one.cut:
            return "cut"
        if not one.pause_s:
            writer.write_eof()
        async with asyncio.timeout(timeout_s):
            line = await reader.readline()
            while await reader.read(65536):
                pass
        return line.split()[1].decode() if line.startswith(b"HTTP/") else "closed"
    except TimeoutError:
        return "stuck"
    except (ConnectionError, OSError):
        return "closed"
    finally:
        writer.close()


async def fuzz(
    url: str, count: int, seed: int, *, model: str, max_body_bytes: int = 33_554_432, concurrency: int = 32, timeout_s: float = 60.0
) -> dict[str, collections.Counter[str]]:
    """Counts of statuses by kind of attack."""
    address = urllib.parse.urlsplit(url)
    assert address.hostname in ("127.0.0.1", "localhost", "::1"), "only servers on this machine"
    rng = random.Random(seed)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    attacks = (attack(rng, model, max_body_bytes) for _ in range(count))

    async def worker() -> None:
        for one in attacks:
            counts[one.kind][await strike(address.hostname or "", address.port or 80, one, timeout_s)] += 1

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return dict(counts)


def main() -> int:
    parser = argparse.ArgumentParser(description="Send hostile requests to a router on this machine.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="baton-demo")
    arguments = parser.parse_args()
    began = time.monotonic()
    counts = asyncio.run(fuzz(arguments.url, arguments.count, arguments.seed, model=arguments.model))
    for kind, statuses in sorted(counts.items()):
        print(f"{kind:<10}", dict(sorted(statuses.items())))
    print(f"{time.monotonic() - began:.1f} s, seed {arguments.seed}")
    total = sum(counts.values(), collections.Counter())
    return int(any(status.startswith("5") or status == "stuck" for status in total))


if __name__ == "__main__":
    sys.exit(main())
