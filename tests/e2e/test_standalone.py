"""`python -m` of the three roles: started, restarted, ended, and started wrongly."""

from __future__ import annotations

import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from tests.support.cluster import free_ports
from tests.support.stand_alone import FILE, ROOT, Parts, complete


@pytest.fixture
def parts(tmp_path: pathlib.Path) -> Iterator[Parts]:
    found = Parts(tmp_path)
    try:
        yield found
    finally:
        found.kill_all()


def test_three_processes_serve_without_a_cluster_and_a_restarted_rank_is_found_again(parts: Parts) -> None:
    prefill, decode, http = free_ports(3)
    parts.start("router", f"router.port={http}", "--prefill", f"127.0.0.1:{prefill}", "--decode", f"127.0.0.1:{decode}")
    parts.start("prefill_worker", "--port", str(prefill))
    parts.start("decode_worker", "--port", str(decode))
    with httpx.Client(base_url=f"http://127.0.0.1:{http}", trust_env=False, timeout=60) as client:
        text = complete(client, parts)
        assert len(text) > 4
        parts.end("decode_worker", signal.SIGKILL)
        parts.start("decode_worker", "--port", str(decode))
        assert complete(client, parts) == text
    assert [parts.end(name) for name in ("router", "prefill_worker", "decode_worker")] == [0, 0, 0], parts.log()
    assert "Traceback" not in parts.log()


@pytest.mark.parametrize("name", ["router", "prefill_worker", "decode_worker"])
def test_what_is_wrong_is_one_sentence(name: str, parts: Parts) -> None:
    places = ["--prefill", "127.0.0.1:1", "--decode", "127.0.0.1:1"] if name == "router" else []
    section = name.removesuffix("_worker")
    command = [sys.executable, "-m", name, FILE, f"{section}.prot=1", *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"unknown key 'prot' in {section}" in done.stderr and "Traceback" not in done.stderr
