"""Write a checkpoint in the published format: config.json and safetensors, quantised as the published models are.

Used by the trainer of the demo model and by the tests; serving only reads.
"""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch

from engine.model.quantized import quantize_fp8, quantize_mxfp4
from engine.model.weights import published_format

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}


def write_checkpoint(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    formats: Callable[[str], str] = published_format,
    max_shard_bytes: int = 2**62,
) -> None:
    """`tensors`: float or int64 values by published name. `formats(name)` says how each is stored. More than one shard makes an
    index, as in the hub folders."""
    stored: dict[str, tuple[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        form = formats(name)
        if form in ("fp8", "mxfp4"):
            quantized = quantize_fp8(value) if form == "fp8" else quantize_mxfp4(value)
            stored[name] = ("F8_E4M3" if form == "fp8" else "I8", quantized.data)
            stored[name.removesuffix(".weight") + ".scale"] = ("F8_E8M0", quantized.scale)
        else:
            value = value.to({"bf16": torch.bfloat16, "fp32": torch.float32, "int64": torch.int64}[form])
            stored[name] = (_NAMES[value.dtype], value)
    shards: list[dict[str, tuple[str, torch.Tensor]]] = [{}]
    filled = 0
    for name, (dtype, value) in stored.items():
        if filled and filled + value.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (dtype, value)
        filled += value.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(value.nbytes for _, value in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: pathlib.Path, tensors: Mapping[str, tuple[str, torch.Tensor]]) -> None:
    """The safetensors container: u64 header length, JSON header padded with spaces to 8 bytes, data."""
    header, offset = {}, 0
    for name, (dtype, value) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [offset, offset + value.nbytes]}
        offset += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, value in tensors.values():
            file.write(value.contiguous().view(torch.uint8).numpy().tobytes())
