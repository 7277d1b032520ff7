"""What people are told of a process that died."""

from __future__ import annotations

import pytest

from deploy.replica_life import died_of

CRASH = """The actor died unexpectedly before finishing this task.
\tclass_name: RankActor
\tnamespace: baton-local_cpu
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with \
a connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer due to high memory \
usage, (2) ray stop --force is called."""


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (CRASH, "Worker unexpectedly exits with a connection error code 2. End of file."),
        ("The actor is dead\nbecause it was killed by `ray.kill`.", "because it was killed by `ray.kill`."),
        ("", ""),
        (f"exit: {'x' * 500}", f"exit: {'x' * 194}"),
    ],
)
def test_a_death_is_reported_without_guesses(report: str, sentence: str) -> None:
    assert died_of(report) == sentence
