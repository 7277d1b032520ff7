"""`python -m` of the three roles: started, restarted, ended, and started wrongly."""

from __future__ import annotations

import concurrent.futures
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import grpc
import httpx
import pytest

from tests.support.patience import overload
from tests.support.ports import free_ports
from tests.support.stand_alone import FILE, ROOT, Parts, complete


@pytest.fixture
def parts(tmp_path: pathlib.Path) -> Iterator[Parts]:
    found = Parts(tmp_path)
    try:
        yield found
    finally:
        found.kill_all()


def status_of(client: httpx.Client, path: str, parts: Parts) -> int:
    """As soon as somebody listens."""
    began = time.monotonic()
    while True:
        try:
            return client.get(path).status_code
        except httpx.TransportError as error:
            problem = repr(error)
        assert time.monotonic() < began + 60 * overload(), f"{problem}\n{parts.log()}"
        time.sleep(0.05)


def test_three_processes_serve_without_a_cluster_and_a_restarted_rank_is_found_again(parts: Parts) -> None:
    prefill, decode, http = free_ports(3)
    parts.start("router", f"router.port={http}", "--prefill", f"127.0.0.1:{prefill}", "--decode", f"127.0.0.1:{decode}")
    with httpx.Client(base_url=f"http://127.0.0.1:{http}", trust_env=False, timeout=60) as client:
        assert status_of(client, "/ready", parts) == 503, "the router has its port before there are ranks"
        assert client.get("/health").status_code == 200
        early = client.post("/v1/completions", json={"model": "baton-demo", "prompt": "x"})
        assert early.status_code == 503 and "not every rank has answered" in early.text
        parts.start("prefill_worker", "--port", str(prefill))
        parts.start("decode_worker", "--port", str(decode))
        text = complete(client, parts)
        assert len(text) > 4
        parts.end("decode_worker", signal.SIGKILL)
        parts.start("decode_worker", "--port", str(decode))
        assert complete(client, parts) == text
    assert [parts.end(name) for name in ("router", "prefill_worker", "decode_worker")] == [0, 0, 0], parts.log()
    assert "Traceback" not in parts.log()


def test_a_router_that_finds_something_else_at_its_addresses_ends_with_the_reason(parts: Parts) -> None:
    stranger = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    port = stranger.add_insecure_port("127.0.0.1:0")
    stranger.start()
    try:
        parts.start("router", "router.port=0", "--prefill", f"127.0.0.1:{port}", "--decode", f"127.0.0.1:{port}")
        assert parts.running.pop("router").wait(60 * overload()) == 1, parts.log()
    finally:
        stranger.stop(None).wait()
    assert "rank that fits this router" in parts.log() and "Traceback" not in parts.log()


@pytest.mark.parametrize("name", ["router", "prefill_worker", "decode_worker"])
def test_what_is_wrong_is_one_sentence(name: str) -> None:
    places = ["--prefill", "127.0.0.1:1", "--decode", "127.0.0.1:1"] if name == "router" else []
    section = name.removesuffix("_worker")
    command = [sys.executable, "-m", name, FILE, f"{section}.prot=1", *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 * overload())
    assert done.returncode == 1, done
    assert f"unknown key 'prot' in {section}" in done.stderr and "Traceback" not in done.stderr
