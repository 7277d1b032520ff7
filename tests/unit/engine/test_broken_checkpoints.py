"""Reading checkpoints: what is broken is refused with the names of file and tensor."""

from __future__ import annotations

import json
import pathlib
import random
import shutil
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch

from core.errors import CheckpointError
from engine.model.checkpoint_writer import write_checkpoint
from engine.model.shards import Entry
from engine.model.weights import load_weights
from tests.support.small_checkpoint import EXPERT, LINEAR, MODEL, SMALLEST, edit_header, read_parts, write_parts


def refused(folder: pathlib.Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_weights(folder, MODEL)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"


HEADER_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "tensor missing": (lambda h: h.pop("layers.1.attn.wkv.weight"), ("layers.1.attn.wkv.weight", "missing")),
    "mtp tensor missing": (lambda h: h.pop("mtp.0.enorm.weight"), ("mtp.0.enorm.weight", "missing")),
    "fp8 scale missing": (lambda h: h.pop(f"{LINEAR}.scale"), (f"{LINEAR}.scale", "missing", f"{LINEAR}.weight")),
    "mxfp4 scale missing": (lambda h: h.pop(f"{EXPERT}.scale"), (f"{EXPERT}.scale", "missing")),
    "wrong shape": (lambda h: h["norm.weight"].update(shape=[63]), ("norm.weight", "[63]", "[64]", "model.safetensors")),
    "transposed": (lambda h: h["embed.weight"].update(shape=[64, 40]), ("embed.weight", "[64, 40]", "[40, 64]")),
    "wrong scale shape": (lambda h: h[f"{EXPERT}.scale"].update(shape=[2, 32]), (f"{EXPERT}.scale", "[2, 32]", "[32, 2]")),
    "unknown dtype": (lambda h: h["head.weight"].update(dtype="F8_E5M2"), ("head.weight", "unknown dtype F8_E5M2", "BF16")),
    "ids as floats": (lambda h: h["layers.0.ffn.gate.tid2eid"].update(dtype="F64"), ("tid2eid", "F64", "I64")),
    "norm as ids": (lambda h: h["norm.weight"].update(dtype="I64"), ("norm.weight", "I64")),
    "embedding in fp8": (lambda h: h["embed.weight"].update(dtype="F8_E4M3"), ("embed.weight", "F8_E4M3")),
    "scale of floats": (lambda h: h[f"{LINEAR}.scale"].update(dtype="F32"), (f"{LINEAR}.scale", "F32", "F8_E8M0")),
    "bytes do not fit shape": (lambda h: h["norm.weight"].update(dtype="F32"), ("norm.weight", "128 bytes", "256")),
    "entry is a list": (lambda h: h.update({"norm.weight": [1, 2]}), ("norm.weight", "malformed")),
    "entry without shape": (lambda h: h["norm.weight"].pop("shape"), ("norm.weight", "malformed")),
    "shape is text": (lambda h: h["norm.weight"].update(shape="64"), ("norm.weight", "malformed")),
    "negative size": (lambda h: h["norm.weight"].update(shape=[-64]), ("norm.weight", "malformed")),
    "fractional size": (lambda h: h["norm.weight"].update(shape=[64.0]), ("norm.weight", "malformed")),
    "three offsets": (lambda h: h["norm.weight"].update(data_offsets=[0, 1, 2]), ("norm.weight", "malformed")),
    "offsets backwards": (lambda h: h["norm.weight"].update(data_offsets=[128, 0]), ("norm.weight", "malformed")),
    "offsets past the end": (lambda h: h["norm.weight"].update(data_offsets=[10**9, 10**9 + 128]), ("norm.weight", "cut off")),
    "offsets overlap": (lambda h: h["norm.weight"].update(data_offsets=h["head.weight"]["data_offsets"]), ("norm.weight", "overlap")),
}


@pytest.mark.parametrize("damage", HEADER_DAMAGE)
def test_damaged_header_is_refused_naming_the_tensor(damage: str, single: pathlib.Path, tmp_path: pathlib.Path) -> None:
    change, words = HEADER_DAMAGE[damage]
    refused(edit_header(single, tmp_path / "copy", change), *words)


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "cut off"),
        (b"\x01\x02", "cut off"),
        (struct.pack("<Q", 10**12) + b"{}", "cut off"),
        (struct.pack("<Q", 0), "cut off"),
        (struct.pack("<Q", 5) + b"hello", "not JSON"),
        (struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc", "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "not an object"),
        (struct.pack("<Q", 200_000) + b'{"a":' + b"[" * 199_995, "not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "cut off"),
    ],
    ids=["empty", "two bytes", "huge header", "no header", "text", "not utf-8", "list", "deep", "lfs pointer"],
)
def test_garbage_for_a_file_is_refused(raw: bytes, word: str, single: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(single, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").write_bytes(raw)
    refused(tmp_path / "copy", "model.safetensors", word)


def test_every_truncation_of_a_shard_is_refused_naming_it(sharded: pathlib.Path, tmp_path: pathlib.Path, rng: random.Random) -> None:
    shutil.copytree(sharded, tmp_path / "copy")
    victim = sorted((tmp_path / "copy").glob("*.safetensors"))[3]
    raw = victim.read_bytes()
    for size in [0, 7, 8, len(raw) // 2, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(20))]:
        victim.write_bytes(raw[:size])
        refused(tmp_path / "copy", victim.name)


def test_random_bytes_in_a_header_never_crash_the_reader(single: pathlib.Path, tmp_path: pathlib.Path, rng: random.Random) -> None:
    shutil.copytree(single, tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    header, data = read_parts(single / "model.safetensors")
    text = json.dumps(header).encode()
    num_refused = 0
    for _ in range(150):
        broken = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(broken))] = rng.choice(b'0123456789{}[]",:.-eEaF\\ \xff\x00')
        write_parts(path, bytes(broken), data)
        try:
            load_weights(tmp_path / "copy", MODEL)
        except CheckpointError:  # anything else fails the test
            num_refused += 1
    assert num_refused > 100


INDEX_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "names a missing file": (lambda i: i["weight_map"].update({"norm.weight": "model-99999-of-00001.safetensors"}), "model-99999"),
    "places a tensor in the wrong shard": (
        lambda i: i["weight_map"].update({"norm.weight": next(f for f in i["weight_map"].values() if f != i["weight_map"]["norm.weight"])}),
        "norm.weight",
    ),
    "leaves a tensor out": (lambda i: i["weight_map"].pop("norm.weight"), "norm.weight"),
    "no weight_map": (lambda i: i.pop("weight_map"), "weight_map"),
    "weight_map is a list": (lambda i: i.update(weight_map=[1]), "weight_map"),
    "file is a number": (lambda i: i["weight_map"].update({"norm.weight": 7}), "norm.weight"),
    "file is elsewhere": (lambda i: i["weight_map"].update({"norm.weight": "../../etc/passwd"}), "norm.weight"),
    "file is empty": (lambda i: i["weight_map"].update({"norm.weight": ""}), "norm.weight"),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGE)
def test_damaged_index_is_refused(damage: str, sharded: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(sharded, tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change, word = INDEX_DAMAGE[damage]
    change(index)
    path.write_text(json.dumps(index))
    refused(tmp_path / "copy", word)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000])
def test_garbage_for_an_index_is_refused(text: str, sharded: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(sharded, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors.index.json").write_text(text)
    refused(tmp_path / "copy", "model.safetensors.index.json")


def test_a_folder_without_weights_is_refused(tmp_path: pathlib.Path) -> None:
    refused(tmp_path, str(tmp_path), "model.safetensors.index.json")


def test_nothing_is_read_from_a_broken_checkpoint(single: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = edit_header(single, tmp_path / "copy", lambda header: header.pop("mtp.0.norm.weight"))
    monkeypatch.setattr(Entry, "read", lambda entry: pytest.fail(f"read {entry}"))
    refused(folder, "mtp.0.norm.weight")


def test_expert_ids_out_of_range_are_refused(tmp_path: pathlib.Path, tensors: dict[str, torch.Tensor]) -> None:
    name = "layers.0.ffn.gate.tid2eid"
    table = tensors[name].clone()
    table[7, 1] = 3
    write_checkpoint(tmp_path, SMALLEST, tensors | {name: table})
    refused(tmp_path, name, "[0, 3)")


def test_a_scale_that_is_nan_is_refused(single: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(single, tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    header, data = read_parts(path)
    begin = header[f"{EXPERT}.scale"]["data_offsets"][0]
    write_parts(path, json.dumps(header).encode(), data[:begin] + b"\xff" + data[begin + 1 :])
    refused(tmp_path / "copy", f"{EXPERT}.scale", "NaN")
