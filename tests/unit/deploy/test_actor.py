"""The process of a rank."""

from __future__ import annotations

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]

CODE = """
import gc
from deploy.actor import imported_for_good

earlier = gc.get_freeze_count()
with imported_for_good():
    assert not gc.isenabled()
    imported = [[] for _ in range(1000)]
assert gc.isenabled() and gc.get_freeze_count() >= earlier + 1000
assert not any(found is imported for found in gc.get_objects())
"""


def test_the_collector_does_not_look_at_what_was_imported() -> None:
    subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, check=True)


STOPPED = """
import asyncio, os, pathlib, sys
from core.model_section import ModelSection
from deploy.actor import Assignment, RankActor
from deploy.spec import ClusterSpec

spec, logs = ClusterSpec(name="c", model=ModelSection(path="m")), pathlib.Path(sys.argv[1])
actor = RankActor(Assignment(spec=spec, role="decode", index=0, rank=0, revision="r", logs=logs, control_token="t"))
asyncio.run(actor.stop())
os._exit(0)
"""


def test_what_a_rank_says_last_is_in_its_log_though_it_is_killed_as_soon_as_it_has_stopped(tmp_path: pathlib.Path) -> None:
    subprocess.run([sys.executable, "-c", STOPPED, str(tmp_path)], cwd=ROOT, check=True)
    assert "rank.done member=decode/0.0" in (tmp_path / "decode-0.0.log").read_text()
