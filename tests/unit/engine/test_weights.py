"""Reading checkpoints: what is there is read to the bit, what is broken is refused with the names of file and tensor."""

from __future__ import annotations

import dataclasses
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
from engine.config import ModelConfig
from engine.model.checkpoint_writer import write_checkpoint
from engine.model.quantized import QuantizedWeight, quantize_fp8, quantize_mxfp4
from engine.model.shards import Entry, checkpoint_identity, find_tensors
from engine.model.weights import dummy_weights, expected_tensors, load_weights, published_format
from tests.support.checkpoints import SMALL, random_tensors

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


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return random_tensors(SMALLEST)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("single")
    write_checkpoint(folder, SMALLEST, tensors)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("sharded")
    write_checkpoint(folder, SMALLEST, tensors, max_shard_bytes=50_000)
    return folder


def same(left: torch.Tensor | QuantizedWeight, right: torch.Tensor | QuantizedWeight) -> bool:
    if isinstance(left, QuantizedWeight) and isinstance(right, QuantizedWeight):
        return left.kind == right.kind and same(left.data.view(torch.uint8), right.data.view(torch.uint8)) and same(left.scale, right.scale)
    assert isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
    return left.dtype == right.dtype and torch.equal(left, right)


# -- what is there --------------------------------------------------------------------------------------------------------------


def test_weights_come_back_as_they_were_written(single: pathlib.Path, tensors: dict[str, torch.Tensor]) -> None:
    read = load_weights(single, MODEL)
    assert read.keys() == tensors.keys() == expected_tensors(MODEL).keys()
    for name, weight in read.items():
        assert isinstance(weight, QuantizedWeight) == (published_format(name) in ("fp8", "mxfp4")), name
        assert torch.equal(weight.dequantize() if isinstance(weight, QuantizedWeight) else weight, tensors[name]), name


def test_shards_read_like_one_file(single: pathlib.Path, sharded: pathlib.Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 5
    one, many = load_weights(single, MODEL), load_weights(sharded, MODEL)
    assert one.keys() == many.keys() and all(same(one[name], many[name]) for name in one)
    assert checkpoint_identity(single) == checkpoint_identity(sharded)


def test_formats_are_those_of_the_published_checkpoints(single: pathlib.Path) -> None:
    found = {name: entry.dtype for name, entry in find_tensors(single).items()}
    assert found["embed.weight"] == found["layers.0.attn.compressor.wkv.weight"] == found["layers.0.ffn.gate.weight"] == "BF16"
    assert found["layers.0.hc_attn_fn"] == found["layers.0.attn.attn_sink"] == found["layers.0.attn.compressor.ape"] == "F32"
    assert found[f"{LINEAR}.weight"] == found["mtp.0.e_proj.weight"] == "F8_E4M3"
    assert (found[f"{EXPERT}.weight"], found[f"{EXPERT}.scale"]) == ("I8", "F8_E8M0")
    assert found["layers.0.ffn.gate.tid2eid"] == "I64" and "layers.0.ffn.gate.bias" not in found
    assert "layers.1.ffn.gate.bias" in found and "layers.1.ffn.gate.tid2eid" not in found


def test_names_and_shapes_of_the_published_flash_model() -> None:
    flash = ModelConfig.from_dict(
        SMALL
        | {
            "num_hidden_layers": 43,
            "hidden_size": 4096,
            "num_attention_heads": 64,
            "q_lora_rank": 1024,
            "o_groups": 8,
            "o_lora_rank": 1024,
            "n_routed_experts": 256,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 2048,
            "num_hash_layers": 3,
            "compress_ratios": [0, 0, *(4, 128) * 20, 4, 0],
            "index_n_heads": 64,
            "vocab_size": 129280,
        }
    )
    specs = {name: spec.shape for name, spec in expected_tensors(flash).items()}
    assert specs["layers.2.attn.wq_b.weight"] == (32768, 1024)
    assert specs["layers.2.attn.wo_a.weight"] == (8192, 4096) and specs["layers.2.attn.wo_b.weight"] == (4096, 8192)
    assert specs["layers.2.attn.compressor.wkv.weight"] == (1024, 4096) and specs["layers.3.attn.compressor.wkv.weight"] == (512, 4096)
    assert specs["layers.2.attn.compressor.ape"] == (4, 1024) and specs["layers.3.attn.compressor.ape"] == (128, 512)
    assert specs["layers.2.attn.indexer.wq_b.weight"] == (8192, 1024)
    assert specs["layers.2.attn.indexer.compressor.wkv.weight"] == (256, 4096)
    assert specs["layers.0.hc_ffn_fn"] == (24, 16384) and specs["hc_head_fn"] == (4, 16384)
    assert specs["layers.2.ffn.gate.tid2eid"] == (129280, 6) and specs["layers.3.ffn.gate.bias"] == (256,)
    assert specs["mtp.0.ffn.experts.255.w2.weight"] == (4096, 2048) and specs["mtp.0.gate.bias".replace("gate", "ffn.gate")] == (256,)
    count = sum(torch.Size(shape).numel() for name, shape in specs.items() if not name.startswith("mtp."))
    assert round(count / 1e9, 2) == 284.33 + round(3 * 129280 * 6 / 1e9, 2)  # the specification's total, and the hash tables


@pytest.mark.parametrize("form", ["bf16", "fp32", "fp8", "mxfp4"])
def test_each_expert_format_reads_back(form: str, tmp_path: pathlib.Path, tensors: dict[str, torch.Tensor]) -> None:
    def formats(name: str) -> str:
        return form if ".experts." in name else published_format(name)

    write_checkpoint(tmp_path, SMALLEST, tensors, formats=formats)
    weight, expected = load_weights(tmp_path, MODEL)[f"{EXPERT}.weight"], tensors[f"{EXPERT}.weight"]
    value = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.float()
    # The values were MXFP4 to begin with, so each of these formats holds them, but for FP8's coarser scale blocks.
    assert torch.allclose(value, expected, rtol=0.07 if form == "fp8" else 0, atol=0)


def test_fp16_and_unsigned_packed_bytes_read_too(tmp_path: pathlib.Path, single: pathlib.Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header[f"{EXPERT}.weight"]["dtype"] = "U8"
        header[f"{EXPERT}.scale"]["dtype"] = "U8"
        header["norm.weight"]["dtype"] = "F16"

    copy = edit_header(single, tmp_path / "copy", change)
    read, original = load_weights(copy, MODEL), load_weights(single, MODEL)
    assert same(read[f"{EXPERT}.weight"], original[f"{EXPERT}.weight"])
    norm = read["norm.weight"]
    assert isinstance(norm, torch.Tensor) and norm.dtype == torch.float16


def test_packed_fp4_by_its_own_dtype_reads_too(tmp_path: pathlib.Path, single: pathlib.Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header[f"{EXPERT}.weight"] |= {"dtype": "F4", "shape": [32, 64]}

    copy = edit_header(single, tmp_path / "copy", change)
    assert same(load_weights(copy, MODEL)[f"{EXPERT}.weight"], load_weights(single, MODEL)[f"{EXPERT}.weight"])


def test_only_wanted_tensors_are_read(sharded: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = Entry.read

    def counted(entry: Entry) -> torch.Tensor:
        read.append(entry.num_bytes)
        return original(entry)

    monkeypatch.setattr(Entry, "read", counted)

    def wanted(name: str) -> bool:
        return ".experts." not in name or ".experts.1." in name

    weights = load_weights(sharded, MODEL, wanted)
    assert {name.split(".")[4] for name in weights if name.startswith("layers.") and ".experts." in name} == {"1"}
    names = [n for name in weights for n in (name, name.removesuffix(".weight") + ".scale")]
    found = find_tensors(sharded)
    assert sum(read) == sum(found[name].num_bytes for name in set(names) if name in found)


def test_unknown_tensors_are_ignored(tmp_path: pathlib.Path, tensors: dict[str, torch.Tensor]) -> None:
    write_checkpoint(tmp_path, SMALLEST, tensors | {"vision.patch.bias": torch.zeros(3)})
    assert "vision.patch.bias" not in load_weights(tmp_path, MODEL)


def test_identity_tells_checkpoints_apart(tmp_path: pathlib.Path, single: pathlib.Path, tensors: dict[str, torch.Tensor]) -> None:
    write_checkpoint(tmp_path, SMALLEST, tensors | {"layers.2.hc_ffn_base": tensors["layers.2.hc_ffn_base"] + 1e-3})
    assert len(checkpoint_identity(single)) == 12
    assert checkpoint_identity(tmp_path) != checkpoint_identity(single)


def test_dummy_weights_depend_on_seed_and_name_alone() -> None:
    assert same(dummy_weights(MODEL)["head.weight"], dummy_weights(MODEL, wanted=lambda name: name == "head.weight")["head.weight"])
    assert not same(dummy_weights(MODEL)["head.weight"], dummy_weights(MODEL, seed=1)["head.weight"])


def test_rows_of_a_hash_table_name_distinct_experts() -> None:
    table = dummy_weights(MODEL)["layers.0.ffn.gate.tid2eid"]
    assert isinstance(table, torch.Tensor)
    assert all(len(set(row)) == len(row) for row in table.tolist())


@pytest.mark.parametrize(("skew", "least", "most"), [(0.0, 1.0, 1.3), (1.0, 4.0, 8.0)])
def test_a_skew_makes_some_experts_of_a_hash_table_popular(skew: float, least: float, most: float) -> None:
    table = dummy_weights(dataclasses.replace(MODEL, n_routed_experts=32, vocab_size=4000), skew=skew)["layers.0.ffn.gate.tid2eid"]
    assert isinstance(table, torch.Tensor)
    counts = torch.bincount(table.flatten(), minlength=32).double()
    assert least <= float(counts.max() / counts.mean()) <= most
    assert all(len(set(row)) == len(row) for row in table.tolist())


# -- what is broken -------------------------------------------------------------------------------------------------------------


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


# -- quantisation on writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (1, 1), (40, 384)])
def test_fp8_is_within_half_a_step_of_the_weight(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
    quantized = quantize_fp8(weight)
    assert quantized.shape == shape and quantized.scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    block = weight.abs().max()
    error = (quantized.dequantize() - weight).abs()
    assert bool((error <= torch.maximum(weight.abs() * 2**-4, block * 2**-9 / 100)).all())


def test_mxfp4_takes_the_nearest_code_and_even_ones_on_ties() -> None:
    codes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    evens = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    row = torch.tensor([codes + ties + [6.0] + [-value for value in codes + ties] + [0.0]])
    expected = torch.tensor([codes + evens + [6.0] + [-value for value in codes + evens] + [0.0]])
    quantized = quantize_mxfp4(row)
    assert torch.equal(quantized.dequantize(), expected)
    assert torch.equal(quantize_mxfp4(row * 2.0**-9).dequantize(), expected * 2.0**-9)


def test_values_of_a_format_survive_being_quantised_again() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    for quantize in (quantize_fp8, quantize_mxfp4):
        once = quantize(weight).dequantize()
        assert torch.equal(quantize(once).dequantize(), once)
