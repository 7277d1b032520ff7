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
