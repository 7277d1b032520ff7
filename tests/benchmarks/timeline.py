"""One prompt of several chunks through a prefill rank, its hand-off and a decode rank, on one time axis, as JSON and a picture.

    python -m tests.benchmarks.timeline --out results/x                                           the demo model, on CPU
    python -m tests.benchmarks.timeline --devices cuda:0,cuda:1 --model deploy/model_shapes/v4_flash --layers 32 --out results/x

Starts a prefill rank, a decode rank and a router as processes (`python -m prefill_worker` and its kin) that log every step and write
(BATON_LOG_LEVEL=debug), sends prompts of random token ids one at a time, and reads from the logs what happened when. Every prompt is sent
twice: the second time the decode rank still holds its whole pages, so that no page travels while the prompt is computed. The difference of
the two times to first token is what the hand-off adds to prefill alone; pairs alternate, and the first ones warm up. The picture shows
the request whose time to the first decode step is the median.

Writes OUT.json and OUT.png, and prints a summary.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import statistics
import tempfile
import time
from typing import Any

import httpx

from kv_transfer.config import TransferConfig
from tests.benchmarks.bench_engine import cut_shape
from tests.benchmarks.command_line import command, commit
from tests.benchmarks.timeline_parts import Parts
from tests.benchmarks.timeline_story import Story, draw, read_story

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEMO = ROOT / "deploy" / "demo_model" / "checkpoint"


def send(client: httpx.Client, token_ids: list[int], output_len: int) -> tuple[str, float]:
    """The request's id and its time to first token, in seconds."""
    body = {"model": "timeline", "prompt": token_ids, "max_tokens": output_len, "ignore_eos": True, "stream": True, "temperature": 0}
    began, first, request_id = time.monotonic(), 0.0, ""
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                if not first and event["choices"] and (event["choices"][0].get("text") is not None):
                    first, request_id = time.monotonic(), event["id"]
    return request_id, first - began


def ms(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": round(statistics.median(values) * 1e3, 3), "q1": round(low * 1e3, 3), "q3": round(high * 1e3, 3)}


def summary(new: list[Story], again: list[Story], new_ttft: list[float], again_ttft: list[float]) -> dict[str, Any]:
    """Milliseconds. What the hand-off adds is taken pair by pair."""
    return {
        "time to first token": ms(new_ttft),
        "time to first token, prefill alone (pages are there already)": ms(again_ttft),
        "added to the time to first token": ms([a - b for a, b in zip(new_ttft, again_ttft, strict=True)]),
        "prefill, from first chunk to last": ms([story.computing for story in new]),
        "prefill alone, from first chunk to last": ms([story.computing for story in again]),
        "added to prefill": ms([a.computing - b.computing for a, b in zip(new, again, strict=True)]),
        "from the last chunk to the commit": ms([story.committed - story.computed for story in new]),
        "from the last chunk to the start of the first decode step": ms([story.decoding - story.computed for story in new]),
        "share of the pages' bytes that were out before the last chunk was computed": round(
            statistics.median(story.share_overlapped for story in new), 3
        ),
    }


def measure(parts: Parts, arguments: argparse.Namespace, vocab: int) -> dict[str, Any]:
    rng = random.Random(arguments.seed)
    sent: dict[str, list[tuple[str, float]]] = {"new": [], "again": []}
    with httpx.Client(base_url=parts.url, timeout=600, trust_env=False) as client:
        for _ in range(arguments.warm_ups + arguments.repeats):
            prompt = [rng.randrange(4, vocab) for _ in range(arguments.tokens)]
            for kind in ("new", "again"):
                sent[kind].append(send(client, prompt, arguments.output_len))
                parts.wait_until_idle()
    for kind in sent:
        sent[kind] = sent[kind][arguments.warm_ups :]
    events = parts.events()
    stories = {kind: [read_story(events, request_id) for request_id, _ in pairs] for kind, pairs in sent.items()}
    assert all(not story.num_pages_posted_while_computing for story in stories["again"]), "the decode rank did not keep the pages"
    found = summary(stories["new"], stories["again"], *([ttft for _, ttft in sent[kind]] for kind in ("new", "again")))
    by_length = sorted(stories["new"], key=lambda story: story.decoding - story.began)
    typical = by_length[len(by_length) // 2]
    return {"ms": found, "path": parts.path(), "events": typical.as_rows(), "story": typical}


def main() -> None:
    parser = argparse.ArgumentParser(description="A timeline of one request.")
    parser.add_argument("--devices", default="cpu,cpu", help="of the prefill and of the decode rank: cpu, or cuda:0,cuda:1")
    parser.add_argument("--model", type=pathlib.Path, default=DEMO, help="a checkpoint, or with --layers a shape with dummy weights")
    parser.add_argument("--layers", type=int, default=None, help="the first so many layers of the shape, as many as a GPU holds")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--output-len", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warm-ups", type=int, default=2)
    parser.add_argument("--poll-interval-ms", type=float, default=TransferConfig().poll_interval_ms)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="without a suffix")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model.resolve()
        if arguments.layers is not None:
            model = cut_shape(model, arguments.layers, pathlib.Path(folder))
        vocab = min(json.loads((path / "config.json").read_text())["vocab_size"] for path in (model, DEMO))
        with Parts(pathlib.Path(folder), model, DEMO, arguments) as parts:
            report = measure(parts, arguments, vocab)
    story = report.pop("story")
    report = {"command": command(), "commit": commit(), "devices": parts.devices, **report}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    where = f"{', '.join(parts.devices)}, {report['path']}, {report['commit']}"
    title = f"{arguments.tokens:,} tokens in chunks of {arguments.chunk:,}, {where}"
    draw(story, title, arguments.out.with_suffix(".png"))
    for what, value in report["ms"].items():
        print(f"{what}: {value}")


if __name__ == "__main__":
    main()
