"""What a signal does to a process that serves, or is about to."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import asyncio, sys, time
from core.process import run, serve

class Part:
    async def start(self):
        print("starting", flush=True)
        await asyncio.to_thread(time.sleep, float(sys.argv[1]))
        print("ready", flush=True)

    async def stop(self):
        if len(sys.argv) > 2:
            print("stopping", flush=True)
            await asyncio.to_thread(time.sleep, float(sys.argv[2]))
        print("stopped", flush=True)

sys.exit(run(lambda: serve(Part())))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("start_s", "said"), [(60.0, ""), (0.0, "stopped\n")], ids=["while it reads a model", "while it serves"])
def test_a_signal_ends_a_process_at_once(number: int, start_s: float, said: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(start_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "starting\n"
        assert start_s or process.stdout.readline() == "ready\n"
        process.send_signal(number)
        try:
            assert process.wait(20) == 0
        finally:
            process.kill()
        assert process.stdout.read() == said
        assert "process.stopping" in process.stderr.read()


def test_a_second_signal_ends_a_process_that_does_not_stop() -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT, "0", "60"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for number, said in ((signal.SIGTERM, "ready\n"), (signal.SIGINT, "stopping\n")):
                while process.stdout.readline() not in (said, ""):
                    pass
                process.send_signal(number)
            assert process.wait(20) == 1
        finally:
            process.kill()
        assert process.stdout.read() == ""
