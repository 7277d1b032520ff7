"""The tensors of a published DeepSeek-V4 checkpoint: what must be there, and how it is read (deepseek-v4 spec, section 4).

A model folder holds config.json and either model.safetensors or model.safetensors.index.json with its shards. Everything that can
be wrong is found from the headers, before any weight is read: a missing tensor, a wrong shape, an unknown dtype, a shard that is
cut off. `load: dummy` draws weights of the same shapes and formats.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from core.errors import CheckpointError
from core.log import get_logger
from engine.config import ModelConfig
from engine.model.quantized import FP4_GROUP, FP8_BLOCK, QuantizedWeight, Weight, quantize_fp8, quantize_mxfp4

log = get_logger("weights")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.uint8,
    "U8": torch.uint8,
    "F4": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,
}
"""safetensors dtype -> how its bytes are viewed. Packed FP4 and ue8m0 scales are kept as bytes."""

_PLAIN = ("F64", "F32", "F16", "BF16")
_PACKED_FP4 = ("I8", "U8", "F4")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    shape: tuple[int, ...]
    kind: str
    """"matrix": any float dtype, or FP8 or MXFP4 with its `.scale`; "vector": any float dtype; "ids": int32 or int64."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a shard, from its header."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""
    num_bytes: int

    def read(self) -> torch.Tensor:
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = bytearray(file.read(self.num_bytes))
        if len(data) != self.num_bytes:
            raise CheckpointError(f"{self.path}: shrank while it was read")
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        shape = (*self.shape[:-1], self.shape[-1] // 2) if self.dtype == "F4" else self.shape
        return flat.view(_DTYPES[self.dtype]).view(shape)


def expected_tensors(model: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor that a checkpoint of this shape must hold, MTP blocks included, by published name; `.scale` tensors follow from
    the dtypes found."""
    specs: dict[str, TensorSpec] = {}
    d, mult = model.hidden_size, model.hc_mult

    def add(name: str, *shape: int, kind: str | None = None) -> None:
        specs[name] = TensorSpec(shape, kind or ("matrix" if len(shape) == 2 and name.endswith(".weight") else "vector"))

    def add_compressor(prefix: str, ratio: int, dim: int) -> None:
        width = dim * (2 if ratio == 4 else 1)
        add(f"{prefix}.wkv.weight", width, d)
        add(f"{prefix}.wgate.weight", width, d)
        add(f"{prefix}.ape", ratio, width)
        add(f"{prefix}.norm.weight", dim)

    def add_hc_head(prefix: str) -> None:
        add(f"{prefix}hc_head_fn", mult, mult * d)
        add(f"{prefix}hc_head_base", mult)
        add(f"{prefix}hc_head_scale", 1)

    def add_block(prefix: str, ratio: int, is_hash: bool) -> None:
        add(f"{prefix}.attn_norm.weight", d)
        add(f"{prefix}.ffn_norm.weight", d)
        for sublayer in ("attn", "ffn"):
            add(f"{prefix}.hc_{sublayer}_fn", (2 + mult) * mult, mult * d)
            add(f"{prefix}.hc_{sublayer}_base", (2 + mult) * mult)
            add(f"{prefix}.hc_{sublayer}_scale", 3)
        attn, heads = f"{prefix}.attn", model.num_attention_heads
        add(f"{attn}.attn_sink", heads)
        add(f"{attn}.wq_a.weight", model.q_lora_rank, d)
        add(f"{attn}.q_norm.weight", model.q_lora_rank)
        add(f"{attn}.wq_b.weight", heads * model.head_dim, model.q_lora_rank)
        add(f"{attn}.wkv.weight", model.head_dim, d)
        add(f"{attn}.kv_norm.weight", model.head_dim)
        add(f"{attn}.wo_a.weight", model.o_groups * model.o_lora_rank, heads * model.head_dim // model.o_groups)
        add(f"{attn}.wo_b.weight", d, model.o_groups * model.o_lora_rank)
        if ratio:
            add_compressor(f"{attn}.compressor", ratio, model.head_dim)
        if ratio == 4:
            add(f"{attn}.indexer.wq_b.weight", model.index_n_heads * model.index_head_dim, model.q_lora_rank)
            add(f"{attn}.indexer.weights_proj.weight", model.index_n_heads, d)
            add_compressor(f"{attn}.indexer.compressor", 4, model.index_head_dim)
        ffn, width = f"{prefix}.ffn", model.moe_intermediate_size
        add(f"{ffn}.gate.weight", model.n_routed_experts, d)
        if is_hash:
            add(f"{ffn}.gate.tid2eid", model.vocab_size, model.num_experts_per_tok, kind="ids")
        else:
            add(f"{ffn}.gate.bias", model.n_routed_experts)
        for expert in [f"experts.{index}" for index in range(model.n_routed_experts)] + ["shared_experts"]:
            scale = model.n_shared_experts if expert == "shared_experts" else 1
            add(f"{ffn}.{expert}.w1.weight", scale * width, d)
            add(f"{ffn}.{expert}.w2.weight", d, scale * width)
            add(f"{ffn}.{expert}.w3.weight", scale * width, d)

    add("embed.weight", model.vocab_size, d)
    add("head.weight", model.vocab_size, d)
    add("norm.weight", d)
    add_hc_head("")
    for layer, ratio in enumerate(model.compress_ratios):
        add_block(f"layers.{layer}", ratio, layer < model.num_hash_layers)
    for index in range(model.num_nextn_predict_layers):
        prefix = f"mtp.{index}"
        add_block(prefix, 0, False)
        add_hc_head(f"{prefix}.")
        for name in ("e_proj", "h_proj"):
            add(f"{prefix}.{name}.weight", d, d)
        for name in ("enorm", "hnorm", "norm"):
            add(f"{prefix}.{name}.weight", d)
    return specs


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """The entries of one safetensors file. Raises CheckpointError naming the file (and tensor) for anything malformed or cut off."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if length < 2 or length > min(size - 8, 512 * 2**20):
                raise CheckpointError(f"{path}: not a safetensors file, or cut off: header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not an object")
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = str(info["dtype"]), tuple(int(n) for n in info["shape"]), info["data_offsets"]
            begin, end = int(begin), int(end)
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: tensor {name!r}: malformed header entry {info!r}") from error
        if not 0 <= begin <= end or 8 + length + end > size:
            raise CheckpointError(f"{path}: tensor {name!r} lies at bytes {begin}..{end} past the end: the file is cut off")
        entries[name] = Entry(path, dtype, shape, 8 + length + begin, end - begin)
    return entries


def find_tensors(folder: pathlib.Path) -> dict[str, Entry]:
    """All tensors of a model folder, from the headers. Raises CheckpointError."""
    index_path, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index_path.exists():
        if not single.exists():
            raise CheckpointError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")
        return read_header(single)
    try:
        weight_map = json.loads(index_path.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index_path}: cannot be read: {error!r}") from error
    headers = {}
    for file in files:
        if pathlib.PurePath(file).name != file:
            raise CheckpointError(f"{index_path}: shard name {file!r} is not a plain file name")
        headers[file] = read_header(folder / file)
    entries = {}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(f"{folder / file}: tensor {name!r} is missing, though {index_path.name} places it there")
        entries[name] = headers[file][name]
    return entries


def _check(name: str, spec: TensorSpec, found: Mapping[str, Entry], folder: pathlib.Path) -> None:
    """Raise CheckpointError unless `name` (and its scale) is there with a fitting dtype, shape and size."""
    entry = found.get(name)
    if entry is None:
        raise CheckpointError(f"{folder}: tensor {name!r} is missing (expected shape {list(spec.shape)})")

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{entry.path}: tensor {name!r}: {what}")

    if entry.dtype not in _DTYPES:
        raise refuse(f"unknown dtype {entry.dtype}; known: {', '.join(_DTYPES)}")
    allowed = {"matrix": (*_PLAIN, *_PACKED_FP4, "F8_E4M3"), "vector": _PLAIN, "ids": ("I32", "I64")}[spec.kind]
    if entry.dtype not in allowed:
        raise refuse(f"dtype {entry.dtype}; allowed here: {', '.join(allowed)}")
    shape = spec.shape
    scale_shape: tuple[int, ...] | None = None
    if spec.kind == "matrix" and entry.dtype == "F8_E4M3":
        scale_shape = (-(-shape[0] // FP8_BLOCK), -(-shape[1] // FP8_BLOCK))
    elif spec.kind == "matrix" and entry.dtype in _PACKED_FP4:
        scale_shape = (shape[0], shape[1] // FP4_GROUP)
        shape = shape if entry.dtype == "F4" else (shape[0], shape[1] // 2)
    if entry.shape != shape:
        raise refuse(f"shape {list(entry.shape)}, expected {list(shape)}")
    item = 0.5 if entry.dtype == "F4" else _DTYPES[entry.dtype].itemsize
    count = 1
    for size in entry.shape:
        count *= size
    if entry.num_bytes != count * item:
        raise refuse(f"{entry.num_bytes} bytes for shape {list(entry.shape)} of {entry.dtype}")
    if scale_shape is not None:
        scale_name = name.removesuffix(".weight") + ".scale"
        scale = found.get(scale_name)
        if scale is None:
            raise CheckpointError(f"{folder}: tensor {scale_name!r} is missing, the scale of {name!r}, which is {entry.dtype}")
        if scale.dtype not in ("F8_E8M0", "U8"):
            raise CheckpointError(f"{scale.path}: tensor {scale_name!r}: dtype {scale.dtype}; allowed: F8_E8M0, U8")
        if scale.shape != scale_shape or scale.num_bytes != scale_shape[0] * scale_shape[1]:
            raise CheckpointError(f"{scale.path}: tensor {scale_name!r}: shape {list(scale.shape)}, expected {list(scale_shape)}")


def load_weights(folder: pathlib.Path, model: ModelConfig, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Weight]:
    """Check the whole checkpoint, then read the tensors whose published name is `wanted` (an expert-parallel rank leaves out the
    other ranks' experts). Raises CheckpointError before anything is read."""
    found = find_tensors(folder)
    specs = expected_tensors(model)
    for name, spec in specs.items():
        _check(name, spec, found, folder)
    scales = {name.removesuffix(".weight") + ".scale" for name in specs}
    extra = sorted(found.keys() - specs.keys() - scales)
    if extra:
        log.info("weights.ignored", count=len(extra), first=extra[0])
    weights: dict[str, Weight] = {}
    for name in filter(wanted, specs):
        entry = found[name]
        if entry.dtype == "F8_E4M3" or entry.dtype in _PACKED_FP4:
            kind = "fp8" if entry.dtype == "F8_E4M3" else "mxfp4"
            weights[name] = QuantizedWeight(kind, entry.read(), found[name.removesuffix(".weight") + ".scale"].read())
        else:
            weights[name] = entry.read()
    return weights


def dummy_weights(model: ModelConfig, seed: int = 0, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Weight]:
    """Random weights in the formats of the published checkpoints: MXFP4 routed experts, FP8 linears, the rest bf16 or fp32."""
    weights: dict[str, Weight] = {}
    for name, spec in expected_tensors(model).items():
        if not wanted(name):
            continue
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]) >> 1)
        if spec.kind == "ids":
            draws = torch.rand((spec.shape[0], model.n_routed_experts), generator=generator)
            weights[name] = draws.argsort(1)[:, : spec.shape[1]].contiguous()
            continue
        values = torch.randn(spec.shape, generator=generator)
        if name.endswith("norm.weight"):
            weights[name] = (1 + 0.1 * values).bfloat16()
        elif spec.kind == "vector":
            weights[name] = 0.2 * values if values.dim() == 1 or name.endswith(".ape") else values * spec.shape[-1] ** -0.5
        else:
            values *= spec.shape[-1] ** -0.5
            form = published_format(name)
            weights[name] = {"mxfp4": quantize_mxfp4, "fp8": quantize_fp8, "bf16": torch.Tensor.bfloat16}[form](values)
    return weights


def published_format(name: str) -> str:
    """The format in which the published checkpoints hold a tensor: "mxfp4", "fp8", "bf16", "fp32" or "int64"."""
    if ".ffn.experts." in name:
        return "mxfp4"
    if name.endswith(".tid2eid"):
        return "int64"
    if name in ("embed.weight", "head.weight") or "norm" in name or ("compressor." in name and name.endswith(".weight")):
        return "bf16"
    if name.endswith(("gate.weight", "weights_proj.weight")):
        return "bf16"
    return "fp8" if name.endswith(".weight") else "fp32"


def checkpoint_identity(folder: pathlib.Path) -> str:
    """12 hex digits over config.json, every tensor's place and samples of the data: equal for equal checkpoints, cheap to compute."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name, entry in sorted(find_tensors(folder).items()):
        digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
        with entry.path.open("rb") as file:
            for offset in (0, max(0, entry.num_bytes // 2 - 64)):
                file.seek(entry.start + offset)
                digest.update(file.read(min(64, entry.num_bytes)))
    return digest.hexdigest()[:12]
