"""The files of a model folder: model.safetensors, or model.safetensors.index.json and its shards. Headers are read first, and
everything in them is checked, so that a tensor that is asked for later is there in full.

A safetensors file: u64 length of the header, JSON header {name: {dtype, shape, data_offsets}}, data. It is read here rather than
through the safetensors package because torch has no dtype for packed FP4 and that package refuses what torch cannot hold. torch itself is
loaded with the first tensor: `baton check` reads headers only.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.errors import CheckpointError

if TYPE_CHECKING:
    import torch

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I8": ("uint8", 1),
    "U8": ("uint8", 1),
    "F4": ("uint8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E8M0": ("uint8", 1),
}
"""safetensors dtype -> torch dtype as which its bytes are viewed, bytes an item. Packed FP4 and ue8m0 scales are kept as bytes."""

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"

_MAX_HEADER_BYTES = 100 * 2**20
_SAMPLE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a shard, from its header."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""
    num_bytes: int

    @property
    def expected_bytes(self) -> int:
        """What dtype and shape ask for. The dtype must be a known one."""
        count = math.prod(self.shape)
        return -(-count // 2) if self.dtype == "F4" else count * DTYPES[self.dtype][1]

    def read(self) -> torch.Tensor:
        """F4 comes as bytes, [..., K / 2]. Raises CheckpointError if the file has changed since its header was read."""
        import torch

        buffer = torch.empty(self.num_bytes, dtype=torch.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                got = file.readinto(buffer.numpy())  # type: ignore[arg-type]
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}") from error
        if got != self.num_bytes:
            raise CheckpointError(f"{self.path}: shrank while it was read")
        shape = (*self.shape[:-1], self.shape[-1] // 2) if self.dtype == "F4" else self.shape
        return buffer.view(getattr(torch, DTYPES[self.dtype][0])).view(shape)


def find_tensors(folder: pathlib.Path) -> dict[str, Entry]:
    """All tensors of a model folder by name, from the headers. Raises CheckpointError naming file and tensor."""
    index_path, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if not index_path.exists():
        if not single.exists():
            raise CheckpointError(f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME} is there")
        return read_header(single)
    weight_map = _read_index(index_path)
    headers = {file: read_header(folder / file) for file in sorted(set(weight_map.values()))}
    entries = {}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(f"{folder / file}: tensor {name!r} is missing, though {INDEX_NAME} places it there")
        entries[name] = headers[file][name]
    return entries


def _read_index(path: pathlib.Path) -> dict[str, str]:
    try:
        raw = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path}: 'weight_map' must be an object of tensor name -> file name")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or pathlib.PurePath(file).name != file or "\0" in file:
            raise CheckpointError(f"{path}: 'weight_map' gives {name!r} the file {file!r}, which is not a plain file name")
    return weight_map


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """The entries of one safetensors file. Raises CheckpointError for anything malformed or cut off."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{path}: not a safetensors file, or cut off: header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, nested too deep
        raise CheckpointError(f"{path}: the safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not an object")
    data_start = 8 + length
    entries = {name: _entry(path, name, raw, data_start, size) for name, raw in header.items() if name != "__metadata__"}
    last_name, end = "", 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if entry.start < end:
            raise CheckpointError(f"{path}: tensors {last_name!r} and {name!r} overlap")
        last_name, end = name, entry.start + entry.num_bytes
    return entries


def _entry(path: pathlib.Path, name: str, raw: Any, data_start: int, size: int) -> Entry:
    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63

    fields = raw if isinstance(raw, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if (
        not isinstance(dtype, str)
        or not isinstance(shape, list)
        or not all(map(is_size, shape))
        or not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(map(is_size, offsets))
        or offsets[0] > offsets[1]
    ):
        raise CheckpointError(f"{path}: tensor {name!r}: malformed header entry {str(raw)[:200]}")
    begin, end = offsets
    if data_start + end > size:
        raise CheckpointError(f"{path}: tensor {name!r} ends {data_start + end - size} bytes past the end of the file, which is cut off")
    return Entry(path, dtype, tuple(shape), data_start + begin, end - begin)


def checkpoint_identity(folder: pathlib.Path) -> str:
    """12 hex digits over config.json, each tensor's name, dtype and shape, and samples of its data: the same for the same
    checkpoint however it is sharded, and cheap. Raises CheckpointError."""
    try:
        digest = hashlib.sha256((folder / "config.json").read_bytes())
    except OSError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error.strerror}") from error
    entries = find_tensors(folder)
    samples = _samples(entries.values())
    for name, entry in sorted(entries.items()):
        digest.update(f"{name} {entry.dtype} {entry.shape}".encode() + samples[entry])
    return digest.hexdigest()[:12]


def _samples(entries: Iterable[Entry]) -> dict[Entry, bytes]:
    """The first, middle and last bytes of each, reading each file once from front to back."""
    by_path: dict[pathlib.Path, list[Entry]] = {}
    for entry in entries:
        by_path.setdefault(entry.path, []).append(entry)
    samples = {}
    for path, inside in by_path.items():
        try:
            with path.open("rb") as file:
                for entry in sorted(inside, key=lambda e: e.start):
                    parts = []
                    for offset in (0, entry.num_bytes // 2, max(0, entry.num_bytes - _SAMPLE_BYTES)):
                        file.seek(entry.start + offset)
                        parts.append(file.read(min(_SAMPLE_BYTES, entry.num_bytes - offset)))
                    samples[entry] = b"".join(parts)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
    return samples
