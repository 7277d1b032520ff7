"""A checkpoint of a few kilobytes with every kind of tensor, and how to damage it."""

from __future__ import annotations

import json
import pathlib
import shutil
import struct
from collections.abc import Callable
from typing import Any

from engine.config import ModelConfig
from tests.support.checkpoints import SMALL

SMALLEST: dict[str, Any] = SMALL | {
    "num_hidden_layers": 3,
    "compress_ratios": [4, 128, 0, 0],
    "num_hash_layers": 1,
    "vocab_size": 40,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "head_dim": 64,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 48,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "n_routed_experts": 3,
}


MODEL = ModelConfig.from_dict(SMALLEST)


EXPERT = "layers.1.ffn.experts.2.w1"


LINEAR = "layers.0.attn.wq_a"


def read_parts(path: pathlib.Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_parts(path: pathlib.Path, header: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def edit_header(source: pathlib.Path, target: pathlib.Path, change: Callable[[dict[str, Any]], None]) -> pathlib.Path:
    shutil.copytree(source, target)
    header, data = read_parts(target / "model.safetensors")
    change(header)
    write_parts(target / "model.safetensors", json.dumps(header).encode(), data)
    return target
