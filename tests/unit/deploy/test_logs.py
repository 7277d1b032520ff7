"""Log files that do not grow without bound, and `baton logs`: which files, their ends, and what comes while one looks on."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

from core.errors import ConfigError
from deploy.folder import ClusterFolder
from deploy.logs import choose, print_logs, start_of_last
from deploy.output import before

WRITER = """
import os, pathlib, shutil, sys, time
from deploy.output import before, send_output_to
path, number = pathlib.Path(sys.argv[1]), 0
send_output_to(path, most_bytes=1000, look_s=0.001)

def write():
    global number
    os.write(1 + number % 2, b"line %d\\n" % number)
    number += 1

"""
UNTIL_ANEW = """
while not (before(path).exists() and os.fstat(1).st_size < 500):  # a new file that is too short to be exchanged
    write()
while not path.stat().st_size:  # what goes to standard error may still come into the one before it
    write()
"""
WITHOUT_FOLDER = """
shutil.rmtree(path.parent)
end = time.monotonic() + 0.05  # fifty looks
while time.monotonic() < end:
    write()
"""


def numbers(path: pathlib.Path) -> list[int]:
    return [int(line.removeprefix("line ")) for line in path.read_text().splitlines()]


def follow(folder: ClusterFolder, num_lines: int, steps: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch) -> None:
    """`baton logs -f decode`, interrupted when between its looks all steps were taken."""
    left = iter(steps)

    def sleep(seconds: float) -> None:
        step = next(left, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr("deploy.logs.time.sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        print_logs(folder, "decode", num_lines, True)


def test_a_long_file_becomes_the_one_before_it_and_no_line_is_lost_between_them(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "logs" / "decode-0.0.log"
    subprocess.run([sys.executable, "-c", WRITER + UNTIL_ANEW, str(path)], check=True, timeout=60)
    assert before(path).stat().st_size > 1000
    first, second = numbers(before(path)), numbers(path)
    assert first and second
    found = sorted(first + second)  # standard error follows standard output into the new file a moment later
    assert found == list(range(found[0], found[-1] + 1))


def test_the_log_of_a_removed_folder_stops_nothing(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "logs" / "decode-0.0.log"
    subprocess.run([sys.executable, "-c", WRITER + WITHOUT_FOLDER, str(path)], check=True, timeout=60)
    assert not path.parent.exists()


def test_who_follows_a_log_sees_every_line_of_one_that_begins_anew(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ClusterFolder(tmp_path, "one")
    folder.logs.mkdir(parents=True)
    path = folder.logs / "decode-0.0.log"
    path.write_text("first\n")

    def begin_anew() -> None:
        with path.open("a") as file:
            file.write("unseen\n")
        path.replace(before(path))
        path.write_text("second\n")

    follow(folder, 5, [begin_anew, lambda: path.write_text("second\nthird\n")], monkeypatch)
    assert capsys.readouterr().out.splitlines() == ["first", "unseen", "second", "third"]


def test_logs_are_found_by_member_replica_role_and_name(tmp_path: pathlib.Path) -> None:
    folder = ClusterFolder(tmp_path, "one")
    folder.logs.mkdir(parents=True)
    for name in ("controller", "decode-0.0", "decode-1.0", "decode-10.0", "prefill-0.0", "ray"):
        (folder.logs / f"{name}.log").touch()

    def stems(member: str | None) -> list[str]:
        return [path.stem for path in choose(folder, member)]

    assert stems("decode/1.0") == stems("decode/1") == ["decode-1.0"]
    assert stems("decode") == ["decode-0.0", "decode-1.0", "decode-10.0"] and stems("ray") == ["ray"]
    assert len(stems(None)) == 6
    with pytest.raises(ConfigError, match=r"no log of 'router'; there are controller, decode/0.0"):
        stems("router")


def test_logs_are_followed_through_a_new_start(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ClusterFolder(tmp_path, "one")
    folder.logs.mkdir(parents=True)
    first, second = folder.logs / "decode-0.0.log", folder.logs / "decode-1.0.log"
    for path in (first, second):
        path.write_text("old\nlast\n")

    def start_anew() -> None:
        first.unlink()
        second.write_text("new\n")

    steps: list[Callable[[], object]] = [
        lambda: first.write_text("old\nlast\nmo"),
        lambda: first.write_text("old\nlast\nmore\n"),
        start_anew,
        lambda: first.write_text("new\n"),
    ]
    follow(folder, 1, steps, monkeypatch)
    shown = ["decode-0.0: last", "decode-1.0: last", "decode-0.0: more", "decode-1.0: new", "decode-0.0: new"]
    assert capsys.readouterr().out.splitlines() == shown


@pytest.mark.parametrize("num_lines", [0, 1, 7, 999, 1000, 5000])
@pytest.mark.parametrize("end", ["", "\n"])
def test_of_a_long_log_only_the_end_is_read(
    num_lines: int, end: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ClusterFolder(tmp_path, "one")
    folder.logs.mkdir(parents=True)
    lines, path = [f"line {number}" for number in range(1000)], folder.logs / "ray.log"
    path.write_text("\n".join(lines) + end)
    monkeypatch.setattr("deploy.logs.BLOCK_BYTES", 16)
    print_logs(folder, "ray", num_lines, False)
    assert capsys.readouterr().out.splitlines() == (lines[-num_lines:] if num_lines else [])
    with path.open("rb") as file:
        assert path.stat().st_size - start_of_last(file, num_lines) < (num_lines + 4) * len("line 999\n")
