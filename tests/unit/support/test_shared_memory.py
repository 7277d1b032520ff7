"""What is left in shared memory is told from what others use."""

from __future__ import annotations

import mmap
import pathlib
import uuid

from tests.support.shared_memory import FOLDER, left_over


def test_a_file_is_left_over_once_nobody_has_it_open_or_mapped() -> None:
    path = pathlib.Path(FOLDER) / f"baton-test-{uuid.uuid4().hex}"
    before = left_over()
    try:
        with path.open("w+b") as file:
            file.truncate(4096)
            assert path.name not in left_over(before)
            mapped = mmap.mmap(file.fileno(), 4096)
        assert path.name not in left_over(before)
        mapped.close()
        assert path.name in left_over(before)
        assert path.name not in left_over(before | {path.name})
    finally:
        path.unlink()
    assert path.name not in left_over(before)
