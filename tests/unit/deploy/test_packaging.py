"""What gets installed: the eight packages with generic names, ours and not someone else's."""

from __future__ import annotations

import importlib
import pathlib
import subprocess
import sys
import tomllib

import pytest
from setuptools import find_packages

from tests.support.patience import overload

ROOT = pathlib.Path(__file__).resolve().parents[3]
PACKAGES = ("core", "decode_worker", "deploy", "engine", "kv_transfer", "prefill_worker", "protos", "router")


def test_the_wheel_has_the_eight_packages_and_no_tests() -> None:
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    found = find_packages(str(ROOT), include=include)
    assert sorted({name.partition(".")[0] for name in found}) == list(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_the_one_of_this_repository(name: str) -> None:
    file = importlib.import_module(name).__file__
    assert file is not None and pathlib.Path(file).is_relative_to(ROOT)


@pytest.mark.parametrize("name", ["deploy", "engine", "protos.generate", "deploy.reference"])
def test_every_program_explains_itself(name: str) -> None:
    command = [sys.executable, "-m", name, "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 * overload())
    assert result.returncode == 0 and result.stdout.startswith("usage: ")
