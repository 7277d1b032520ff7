"""The tensors of a published DeepSeek-V4 checkpoint: what must be there, and how it is read (deepseek_v4.md, 4).

Everything that can be wrong is found from the headers, before any weight is read: a missing tensor, a wrong shape, an unknown dtype,
a shard that is cut off. `load: dummy` draws weights of the same shapes and formats.
"""

from __future__ import annotations

import hashlib
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from core.errors import CheckpointError
from core.log import get_logger
from engine.config import ModelConfig
from engine.model.quantized import FP4_GROUP, FP8_BLOCK, QuantizedWeight, Weight
from engine.model.shards import DTYPES, Entry, find_tensors

log = get_logger("weights")

_PLAIN = ("F64", "F32", "F16", "BF16")
_PACKED_FP4 = ("I8", "U8", "F4")
_SCALES = ("F8_E8M0", "U8")
_ALLOWED = {
    "matrix": (*_PLAIN, "F8_E4M3", *_PACKED_FP4),
    "plain": _PLAIN,
    "ids": ("I32", "I64"),
}
"""Kind of a tensor -> safetensors dtypes that it may have."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    shape: tuple[int, ...]
    kind: str
    """"matrix": any float dtype, or FP8 or MXFP4 with its `.scale`; "plain": any float dtype; "ids": int32 or int64."""


def expected_tensors(model: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor that a checkpoint of this shape must hold, MTP blocks included, by published name; `.scale` tensors follow from
    the dtypes found."""
    specs: dict[str, TensorSpec] = {}
    d, mult = model.hidden_size, model.hc_mult

    def add(name: str, *shape: int) -> None:
        specs[name] = TensorSpec(shape, {"fp8": "matrix", "mxfp4": "matrix", "int64": "ids"}.get(published_format(name), "plain"))

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
            add(f"{ffn}.gate.tid2eid", model.vocab_size, model.num_experts_per_tok)
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


def _check(name: str, spec: TensorSpec, found: Mapping[str, Entry], folder: pathlib.Path) -> None:
    """Raise CheckpointError unless `name` (and its scale) is there with a fitting dtype, shape and size."""
    entry = _check_one(name, found, folder, _ALLOWED[spec.kind])
    if entry.dtype == "F8_E4M3":
        _check_shape(name, entry, spec.shape)
        blocks = tuple(-(-size // FP8_BLOCK) for size in spec.shape)
        _check_shape(_scale_name(name), _check_one(_scale_name(name), found, folder, _SCALES), blocks)
    elif entry.dtype in _PACKED_FP4:
        rows, columns = spec.shape
        if columns % FP4_GROUP:
            raise CheckpointError(
                f"{entry.path}: tensor {name!r}: MXFP4 rows of {columns} channels; they must be a multiple of {FP4_GROUP}"
            )
        _check_shape(name, entry, (rows, columns if entry.dtype == "F4" else columns // 2))
        scale = _check_one(_scale_name(name), found, folder, _SCALES)
        _check_shape(_scale_name(name), scale, (rows, columns // FP4_GROUP))
    else:
        _check_shape(name, entry, spec.shape)


def _check_one(name: str, found: Mapping[str, Entry], folder: pathlib.Path, allowed: tuple[str, ...]) -> Entry:
    entry = found.get(name)
    if entry is None:
        what = f"the scale of {name.removesuffix('.scale')}.weight" if name.endswith(".scale") else "which the model needs"
        raise CheckpointError(f"{folder}: tensor {name!r} is missing, {what}")
    if entry.dtype not in allowed:
        known = "" if entry.dtype in DTYPES else "unknown "
        raise CheckpointError(f"{entry.path}: tensor {name!r}: {known}dtype {entry.dtype}; allowed here: {', '.join(allowed)}")
    return entry


def _check_shape(name: str, entry: Entry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise CheckpointError(f"{entry.path}: tensor {name!r}: shape {list(entry.shape)}, expected {list(shape)}")
    if entry.num_bytes != entry.expected_bytes:
        raise CheckpointError(
            f"{entry.path}: tensor {name!r}: {entry.num_bytes} bytes, but {entry.dtype} of shape {list(shape)} has {entry.expected_bytes}"
        )


def _scale_name(name: str) -> str:
    return name.removesuffix(".weight") + ".scale"


def check_checkpoint(folder: pathlib.Path, model: ModelConfig) -> dict[str, Entry]:
    """Every tensor of the folder, all that the model needs among them and well-formed. Reads headers only. Raises CheckpointError."""
    found = find_tensors(folder)
    specs = expected_tensors(model)
    for name, spec in specs.items():
        _check(name, spec, found, folder)
    extra = sorted(found.keys() - specs.keys() - {_scale_name(name) for name in specs})
    if extra:
        log.info("weights.ignored", folder=folder, count=len(extra), first=extra[0])
    return found


class WeightSource(Mapping[str, Weight]):
    """Weights by published name, each read onto a device when it is asked for, and not kept: a model packs them one by one."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Weight], device: torch.device) -> None:
        self._names, self._read, self._device = dict.fromkeys(names), read, device

    def only(self, wanted: Callable[[str], bool]) -> WeightSource:
        """Those with a wanted name: an expert-parallel rank leaves out the other ranks' experts."""
        return WeightSource(filter(wanted, self._names), self._read, self._device)

    def __getitem__(self, name: str) -> Weight:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name).to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


CPU = torch.device("cpu")


def open_weights(folder: pathlib.Path, model: ModelConfig, device: torch.device = CPU) -> WeightSource:
    """Check the whole checkpoint; then its tensors can be read, in the order of the shards if iterated. Raises CheckpointError, for all
    that headers can tell."""
    found = check_checkpoint(folder, model)
    names = sorted(expected_tensors(model), key=lambda name: (found[name].path, found[name].start))
    return WeightSource(names, lambda name: _read(name, found, model), device)


def load_weights(folder: pathlib.Path, model: ModelConfig) -> dict[str, Weight]:
    """`open_weights`, all read, on the CPU."""
    return dict(open_weights(folder, model))


def _read(name: str, found: Mapping[str, Entry], model: ModelConfig) -> Weight:
    entry, value = found[name], found[name].read()
    if name.endswith(".tid2eid") and not bool(((value >= 0) & (value < model.n_routed_experts)).all()):
        raise CheckpointError(f"{entry.path}: tensor {name!r}: holds expert ids outside [0, {model.n_routed_experts})")
    if entry.dtype in _PLAIN or entry.dtype in _ALLOWED["ids"]:
        return value
    scale_entry = found[_scale_name(name)]
    scale = scale_entry.read()
    if bool((scale == 255).any()):
        raise CheckpointError(f"{scale_entry.path}: tensor {_scale_name(name)!r}: holds byte 255, which is NaN as a scale")
    return QuantizedWeight("fp8" if entry.dtype == "F8_E4M3" else "mxfp4", value, scale)


def dummy_weights(model: ModelConfig, device: torch.device = CPU, skew: float = 0.0) -> WeightSource:
    """Random weights in the formats of the published checkpoints, drawn on the device: MXFP4 routed experts, FP8 linears, the rest bf16
    or fp32. Each tensor depends on its name and the kind of device alone. `skew`: as EngineConfig.dummy_skew."""
    specs = expected_tensors(model)
    return WeightSource(specs, lambda name: _dummy(name, specs[name].shape, model, device, skew), device)


def _dummy(name: str, shape: tuple[int, ...], model: ModelConfig, device: torch.device, skew: float) -> Weight:
    """Scaled so that activations stay of order one, and nothing degenerate: sinks, ape, biases and norms vary too."""
    key = int.from_bytes(hashlib.sha256(f"0:{name}".encode()).digest()[:8]) >> 1
    generator = torch.Generator(device).manual_seed(key)
    form = published_format(name)
    if form == "int64":
        return _dummy_choice(shape, model.n_routed_experts, skew, generator)
    if form == "mxfp4":
        return _dummy_mxfp4(shape, generator)
    values = torch.randn(shape, generator=generator, device=device)
    if form == "fp8":
        blocks = [-(-size // FP8_BLOCK) for size in shape]
        scale = torch.full(blocks, 127 + round(-math.log2(shape[-1]) / 2), dtype=torch.uint8, device=device)
        return QuantizedWeight("fp8", values.to(torch.float8_e4m3fn), scale)
    if name.endswith("norm.weight"):
        return (1 + 0.1 * values).bfloat16()
    if form == "fp32" and (len(shape) == 1 or name.endswith(".ape")):
        return 0.2 * values
    return (values * shape[-1] ** -0.5).to({"bf16": torch.bfloat16, "fp32": torch.float32}[form])


def _dummy_choice(shape: tuple[int, ...], num_experts: int, skew: float, generator: torch.Generator) -> torch.Tensor:
    """Distinct experts in each row, drawn one after the other by their weights: the largest of log weight + Gumbel noise."""
    device = generator.device
    popularity = torch.randperm(num_experts, generator=generator, device=device) + 1
    noise = -torch.empty((shape[0], num_experts), device=device).exponential_(generator=generator).log()
    return (noise - skew * popularity.log()).topk(shape[1], dim=1).indices.contiguous()


def _dummy_mxfp4(shape: tuple[int, ...], generator: torch.Generator) -> QuantizedWeight:
    """All codes equally often (their root mean square is 2.9), and scales that vary."""
    rows, columns = shape
    data = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator, device=generator.device)
    least = 127 + round(-math.log2(columns) / 2 - math.log2(2.9) - 0.5)
    sizes = (rows, columns // FP4_GROUP)
    scale = torch.randint(least, least + 2, sizes, dtype=torch.uint8, generator=generator, device=generator.device)
    return QuantizedWeight("mxfp4", data, scale)


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
