"""How many files a process by hand may have open."""

from __future__ import annotations

import asyncio
import logging
import resource
import subprocess
import sys

import pytest

from core.process import run

SCRIPT = """
import resource, sys
from core.process import run

async def main():
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])

_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
sys.exit(run(main))
"""


def test_a_process_may_have_more_clients_than_the_shell_that_started_it_leaves_files() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) == resource.getrlimit(resource.RLIMIT_NOFILE)[1] != 64


def test_a_limit_that_cannot_be_raised_is_told_and_no_reason_not_to_serve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(which: int, limits: tuple[int, int]) -> None:
        raise PermissionError("not permitted")

    monkeypatch.setattr("core.process.set_up_logging", lambda: None)
    monkeypatch.setattr("core.process.resource.setrlimit", refuse)
    with caplog.at_level(logging.WARNING, logger="baton.process"):
        assert run(lambda: asyncio.sleep(0)) == 0
    assert "process.file_limit" in caplog.text and "not permitted" in caplog.text
