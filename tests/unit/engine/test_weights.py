"""Reading checkpoints: what is there is read to the bit; dummy weights."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest
import torch

from engine.config import ModelConfig
from engine.model.checkpoint_writer import write_checkpoint
from engine.model.quantized import QuantizedWeight
from engine.model.shards import Entry, checkpoint_identity, find_tensors
from engine.model.weights import dummy_weights, expected_tensors, load_weights, open_weights, published_format
from tests.support.checkpoints import SMALL
from tests.support.small_checkpoint import EXPERT, LINEAR, MODEL, SMALLEST, edit_header


def same(left: torch.Tensor | QuantizedWeight, right: torch.Tensor | QuantizedWeight) -> bool:
    if isinstance(left, QuantizedWeight) and isinstance(right, QuantizedWeight):
        return left.kind == right.kind and same(left.data.view(torch.uint8), right.data.view(torch.uint8)) and same(left.scale, right.scale)
    assert isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
    return left.dtype == right.dtype and torch.equal(left, right)


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

    weights = dict(open_weights(sharded, MODEL).only(wanted))
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


def test_a_dummy_weight_depends_on_its_name_alone() -> None:
    other = dummy_weights(MODEL)
    assert other["norm.weight"] is not None and same(dummy_weights(MODEL)["head.weight"], other["head.weight"]), "whatever was read before"
    assert not same(other["layers.0.attn_norm.weight"], other["layers.1.attn_norm.weight"])


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
