"""What is used up comes back: no room for logs, no file descriptors left."""

from __future__ import annotations

import contextlib
import os
import pathlib
import resource
from collections.abc import Iterator

import httpx
import pytest

from tests.support.stand_alone import Parts, complete

pytestmark = pytest.mark.e2e


@pytest.fixture
def new_parts() -> Iterator[list[Parts]]:
    made: list[Parts] = []
    yield made
    for parts in made:
        parts.kill_all()


def num_unanswered(url: str, count: int, within_s: float) -> int:
    """Of so many new connections, held open at once."""
    unanswered = 0
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(httpx.Client(base_url=url, trust_env=False, verify=False, timeout=within_s))
            try:
                client.get("/health")
            except httpx.TransportError:
                unanswered += 1
    return unanswered


def test_a_full_disk_costs_log_lines_and_nothing_else(tmp_path: pathlib.Path, new_parts: list[Parts]) -> None:
    parts = Parts(tmp_path, output="/dev/full")
    new_parts.append(parts)
    with httpx.Client(base_url=parts.start_all(), trust_env=False, timeout=60) as client:
        text = complete(client, parts)
        assert len(text) > 4
        assert complete(client, parts) == text
    assert all(process.poll() is None for process in parts.running.values())


def test_processes_without_file_descriptors_go_on_with_what_they_have_and_recover(tmp_path: pathlib.Path, new_parts: list[Parts]) -> None:
    parts = Parts(tmp_path)
    new_parts.append(parts)
    url = parts.start_all()
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        text = complete(client, parts)
        limits = {}
        for name, process in parts.running.items():
            limits[name] = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
            in_use = max(int(number) for number in os.listdir(f"/proc/{process.pid}/fd")) + 1
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (in_use, limits[name][1]))
        for _ in range(3):
            assert complete(client, parts) == text, "sessions and connections that are open serve on"
        assert num_unanswered(url, 40, within_s=0.3) > 0, "the descriptors that were left are used up"
        for name, process in parts.running.items():
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits[name])
    assert num_unanswered(url, 40, within_s=20) == 0
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        assert complete(client, parts) == text
    assert all(process.poll() is None for process in parts.running.values())
