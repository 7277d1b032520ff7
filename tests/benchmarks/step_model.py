"""How long a decode step and a prefill step take on a group of ranks, from bytes, FLOPs, link rates and launches. Pure.

    parts = decode_parts(Work.of(model), GB300, GOAL, ranks=32, batch=256, context=8704)    # {"experts": seconds, ...}

A part takes its launches' fixed time plus the longer of its bytes and its FLOPs at the rates that such kernels reach; parts follow one
another. Experts are those of the busiest rank. Attention is data-parallel, experts are spread over the group, everything else is on
every rank. Left out: everything that `scaling_model` lists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.cache.layout import build_layout
from engine.config import EngineConfig, ModelConfig
from engine.model.weights import expected_tensors, published_format
from tests.benchmarks.hardware import Hardware, Software

BYTES = {"mxfp4": 1 / 2 + 1 / 32, "fp8": 1 + 1 / 128**2, "bf16": 2.0, "fp32": 4.0, "int64": 8.0}

Parts = dict[str, float]
"""Name -> seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A model's shape as bytes and FLOPs."""

    model: ModelConfig
    layer_bytes: float
    """Weights outside of experts, of all layers."""
    head_bytes: float
    layer_flops: float
    """Per token, of all layers, experts and attention aside."""
    head_wise_bytes: float
    """Of `layer_bytes`: weights of which a rank of tensor-parallel attention needs its heads' part only (wq_b, wo_a)."""
    head_wise_flops: float
    bf16_flops: float
    """Of `layer_flops`: products whose input is not quantised (wo_a, compressors, router)."""
    head_flops: float
    expert_bytes: float
    """One expert of one layer."""
    expert_params: float
    row_bytes: dict[str, int]
    """Cache rows: "window", "c4_kv", "c128_kv", "index"."""
    page_bytes: int
    slot_bytes: int
    resident_bytes: float
    """Weights outside of routed experts, MTP block and embedding included."""

    @staticmethod
    def of(model: ModelConfig) -> Work:
        layers = head = flops = plain = head_flops = resident = by_head = by_head_flops = 0.0
        for name, tensor in expected_tensors(model).items():
            if ".ffn.experts." in name:
                continue
            size, values = math.prod(tensor.shape) * BYTES[published_format(name)], math.prod(tensor.shape)
            resident += size
            if name.startswith("head."):
                head, head_flops = head + size, head_flops + 2.0 * values
            elif name.startswith("layers."):
                layers += size
                if name.endswith((".attn.wq_b.weight", ".attn.wo_a.weight")):
                    by_head, by_head_flops = by_head + size, by_head_flops + 2.0 * values
                if len(tensor.shape) == 2 and published_format(name) in ("fp8", "bf16"):
                    flops += 2.0 * values
                    plain += 2.0 * values if published_format(name) == "bf16" or name.endswith(".attn.wo_a.weight") else 0.0
        layout = build_layout(model, EngineConfig(), "m")
        params = 3.0 * model.hidden_size * model.moe_intermediate_size
        return Work(
            model=model, layer_bytes=layers, head_bytes=head, layer_flops=flops, bf16_flops=plain, head_flops=head_flops,
            head_wise_bytes=by_head, head_wise_flops=by_head_flops,
            expert_bytes=params * BYTES["mxfp4"], expert_params=params,
            row_bytes={field.name.split(".")[0]: field.row_bytes for field in (*layout.page_fields, *layout.slot_fields)},
            page_bytes=layout.page_bytes, slot_bytes=layout.slot_bytes, resident_bytes=resident,
        )  # fmt: skip

    def rank_bytes(self, ranks: int) -> float:
        """Weights on one rank, the MTP block's experts included."""
        held = self.held(ranks)
        return self.resident_bytes + (self.model.num_hidden_layers + self.model.num_nextn_predict_layers) * held * self.expert_bytes

    def held(self, ranks: int, redundant: int = 0) -> int:
        """Experts of a layer on one rank, with `redundant` further ones a rank."""
        return -(-self.model.n_routed_experts // ranks) + redundant

    def sequence_bytes(self, tokens: int) -> float:
        """Pages and slot."""
        return -(-tokens // 256) * self.page_bytes + self.slot_bytes

    def cache_bytes(self, context: int) -> float:
        """Read by one token's decode (engine/model/deepseek_v4.md, 5)."""
        model, rows = self.model, self.row_bytes
        c4 = min(model.index_topk, context // 4) * rows["c4_kv"] + context // 4 * rows["index"]
        total = model.num_hidden_layers * min(context, 128) * rows["window"]
        return total + model.compress_ratios.count(4) * c4 + model.compress_ratios.count(128) * (context // 128) * rows["c128_kv"]

    def attention_flops(self, context: float) -> float:
        """Of one token with so much before it."""
        model = self.model
        rows = model.num_hidden_layers * min(context, 128) + model.compress_ratios.count(128) * context / 128
        rows += model.compress_ratios.count(4) * min(model.index_topk, context / 4)
        return 4.0 * model.num_attention_heads * model.head_dim * rows

    def index_flops(self, context: float) -> float:
        """Of one token: scores of the index, in FP8."""
        model = self.model
        return model.compress_ratios.count(4) * 2.0 * model.index_n_heads * model.index_head_dim * context / 4


def touched(held: int, ranks: int, top_k: int, tokens: float, imbalance: float = 1.0) -> float:
    """Expected experts of one rank that have any of its group's `tokens`, if each chooses at random; the rank's experts are `imbalance`
    times as popular as the average, and copies of one expert share its tokens."""
    chance = min(1.0, imbalance * top_k / (held * ranks))
    return float(held * (1.0 - (1.0 - chance) ** tokens))


def touched_of(chances: Sequence[float], tokens: float) -> float:
    """The same, with each expert's own chance of being among a token's."""
    return float(sum(1.0 - (1.0 - min(1.0, chance)) ** tokens for chance in chances))


def experts_s(work: Work, hardware: Hardware, software: Software, rows: float, experts: float, is_widened: bool = False) -> float:
    """One layer's experts on one rank: `rows` (token, expert) pairs over `experts` that have any. Few rows: bytes and FLOPs overlap in
    part, as the root of their squares; many: FP8 products, once the codes are widened if they do not lie there so (`is_widened`)."""
    read, flops = experts * work.expert_bytes / hardware.memory_rate, 2.0 * rows * work.expert_params / hardware.fp8_rate
    codes = math.hypot(read, flops / software.few_rows_share)
    wide = experts * work.expert_params / hardware.memory_rate
    widening = (read + wide) / software.widening_share if software.widens and not is_widened else 0.0
    many = widening + max(wide if software.widens else read, flops / software.many_rows_share)
    return many if is_widened else min(codes, many)


def exchange_s(work: Work, hardware: Hardware, software: Software, ranks: int, rows: float) -> float:
    """One layer's dispatch and combine in decode, of `rows` tokens a rank."""
    if ranks == 1:
        return 0.0
    d = work.model.hidden_size
    if software.exchange == "to_all":  # rows in FP8 with scales, sums in float32
        out, back = (ranks - 1) * rows * d * (1.0 + 4 / 128), (ranks - 1) * rows * d * 4.0
    else:  # FP8 with scales, once for each expert; bf16 results
        far = rows * work.model.num_experts_per_tok * (ranks - 1) / ranks * d
        out, back = far * (1.0 + 4 / 128), far * 2.0
    sent = out / (hardware.link_rate * software.dispatch_link_share) + back / (hardware.link_rate * software.combine_link_share)
    return software.dispatch_s + software.combine_s + sent


def decode_parts(
    work: Work,
    hardware: Hardware,
    software: Software,
    *,
    ranks: int,
    batch: float,
    context: int,
    imbalance: float = 1.0,
    redundant: int = 0,
    experts: float | None = None,
    drafts: int = 0,
    attention_tp: int = 1,
) -> Parts:
    """Seconds of one step in which each rank has `batch` sequences. `experts`: of a layer, that the busiest rank touches, where known.
    With `drafts`, each sequence brings so many tokens more, and the MTP block runs once for each. With `attention_tp`, so many ranks have
    the same `batch` sequences, each a part of the heads (engine/parallel/README.md); kernels take at least 64 heads."""
    model, layers, rows = work.model, work.model.num_hidden_layers, batch * (1 + drafts)
    if experts is None:
        experts = touched(work.held(ranks, redundant), ranks, model.num_experts_per_tok, rows * ranks / attention_tp, imbalance)
    others = 1 - 1 / attention_tp
    linear = (work.layer_bytes - others * work.head_wise_bytes) / hardware.memory_rate
    linear += rows * (work.layer_flops - others * work.head_wise_flops) / (hardware.fp8_rate * software.few_linear_share)
    heads = min(1.0, max(64, model.num_attention_heads / attention_tp) / model.num_attention_heads)
    head = max(work.head_bytes / hardware.memory_rate, rows * work.head_flops / (hardware.bf16_rate * software.linear_share))
    attention = rows * heads * work.attention_flops(context) / (hardware.bf16_rate * software.attention_share)
    attention += max(batch * work.cache_bytes(context) / hardware.memory_rate, rows * work.index_flops(context) / hardware.fp8_rate)
    hyper_bytes = rows * hyper_token_bytes(model)
    mine = rows / attention_tp
    per_layer = experts_s(work, hardware, software, imbalance * mine * model.num_experts_per_tok, experts)
    parts = {
        "projections": layers * (software.products - 2) * software.product_s + linear,
        "head": software.product_s + head,
        "experts": layers * (2 * software.expert_s + per_layer),
        "attention, index": layers * software.attention_s + attention,
        "hyper-connections": 2 * layers * (software.hyper_s + hyper_bytes / (hardware.memory_rate * software.hyper_share)),
        "exchange": layers * exchange_s(work, hardware, software, ranks, mine),
        "small kernels": layers * software.small_launches * software.launch_s + rows * layers * between_bytes(model) / hardware.memory_rate,
        "gaps": layers * kernels_of_a_layer(software, ranks) * software.gap_s,
    }
    if attention_tp > 1:
        gathered = rows * (model.o_groups * model.o_lora_rank + model.hidden_size) * 2.0 * others
        sent = gathered / (hardware.link_rate * software.dispatch_link_share)
        parts["gathers of attention_tp"] = layers * (2 * (software.gather_s + software.gap_s) + sent)
    if drafts:
        block = decode_parts(work, hardware, software, ranks=ranks, batch=batch, context=128, imbalance=imbalance, redundant=redundant)
        parts["drafts"] = drafts * (sum(block.values()) - block["head"]) / layers + drafts * block["head"]
    return parts


def kernels_of_a_layer(software: Software, ranks: int) -> float:
    """That follow one another: two of attention, four of hyper-connections and two of the exchange beside products and small ones."""
    return software.small_launches + software.products + 6 + (2 if ranks > 1 else 0)


def hyper_token_bytes(model: ModelConfig) -> float:
    """One hyper-connection: four streams read and written, the sublayer's output and the next one's input, in bf16."""
    return (2 * model.hc_mult + 2) * model.hidden_size * 2.0


def prefill_parts(
    work: Work, hardware: Hardware, software: Software, *, ranks: int, chunk: int, prompt: int, prompts: int = 1, imbalance: float = 1.0,
    widened_layers: float = 0,
) -> Parts:  # fmt: skip
    """Seconds of a rank's share of `prompts` prompts of `prompt` tokens, as many in a chunk of `chunk` as fit, with all ranks of the group
    as busy. `widened_layers` hold their experts in FP8."""
    model, layers, tokens = work.model, work.model.num_hidden_layers, prompts * prompt
    chunks = math.ceil(tokens / chunk)
    rows = min(chunk, tokens)
    experts = touched(work.held(ranks), ranks, model.num_experts_per_tok, rows * ranks, imbalance)
    pairs = imbalance * rows * model.num_experts_per_tok
    kept, widened = (experts_s(work, hardware, software, pairs, experts, is_widened) for is_widened in (False, True))
    met = ranks * (1 - (1 - 1 / ranks) ** model.num_experts_per_tok) * (ranks - 1) / ranks  # other ranks that a token goes to
    sent = rows * model.hidden_size * software.prefill_bytes * (ranks - 1 if software.exchange == "to_all" else met)
    before = range(0, prompt, 512)
    attention, index = (prompts * 512 * sum(of(start + 256) for start in before) for of in (work.attention_flops, work.index_flops))
    streamed = tokens * layers * stream_token_bytes(model) / hardware.memory_rate
    fp8, bf16 = (work.layer_flops - work.bf16_flops) / hardware.fp8_rate, work.bf16_flops / hardware.bf16_rate
    return {
        "projections": tokens * (fp8 + bf16) / software.linear_share,
        "experts": chunks * (widened_layers * widened + (layers - widened_layers) * kept),
        "attention": attention / (hardware.bf16_rate * software.prefill_attention_share),
        "index": index / (hardware.fp8_rate * software.index_share) + tokens * model.compress_ratios.count(4) * software.index_row_s,
        "hyper-connections": 2 * layers * tokens * hyper_token_bytes(model) / (hardware.memory_rate * software.hyper_share),
        "exchange": chunks * layers * sent / (hardware.link_rate * software.prefill_link_share),
        "norms, rope, stores, quantisation": streamed,
        "gaps": chunks * layers * software.prefill_launches * software.prefill_gap_s,
    }


def widened_layers(work: Work, hardware: Hardware, ranks: int) -> int:
    """Layers whose experts fit into memory in FP8, with a part of it left to caches and activations."""
    room = hardware.memory_bytes * 0.85 - work.rank_bytes(ranks)
    return max(0, min(work.model.num_hidden_layers, int(room / (work.held(ranks) * (work.expert_params - work.expert_bytes)))))


def between_bytes(model: ModelConfig) -> float:
    """Read and written per token and layer between the products: queries normed and rotated, outputs rotated back, inputs quantised to
    FP8."""
    queries = model.num_attention_heads * model.head_dim * 2.0
    rotated = model.num_attention_heads * model.qk_rope_head_dim * 4.0
    inputs = 6 * model.hidden_size * 3.0 + model.o_groups * model.o_lora_rank * 3.0
    return 2 * queries + rotated + inputs


def stream_token_bytes(model: ModelConfig) -> float:
    """The same in prefill, where the experts' rows are also gathered, activated and added up by kernels of their own."""
    experts = model.num_experts_per_tok * (model.hidden_size * (3.0 + 6.0) + model.moe_intermediate_size * 7.0)
    return between_bytes(model) + experts


def largest_batch(
    work: Work, hardware: Hardware, software: Software, *, ranks: int, tokens: int, context: int, limit_s: float, drafts: int = 0,
    imbalance: float = 1.0,
) -> int:  # fmt: skip
    """Most sequences a rank can have, so that a step takes at most `limit_s` and `tokens` of each fit into memory; 0 if none."""
    room = hardware.memory_bytes * 0.94 - work.rank_bytes(ranks)
    least, most = 0, max(0, int(room / work.sequence_bytes(tokens)))
    while least < most:
        middle = (least + most + 1) // 2
        parts = decode_parts(
            work, hardware, software, ranks=ranks, batch=middle, context=context, drafts=drafts, imbalance=imbalance
        )  # fmt: skip
        least, most = (middle, most) if sum(parts.values()) <= limit_s else (least, middle - 1)
    return least
