"""What the scaling model knows of devices and of software, each figure with its source.

"Measured" is from a file in `tests/benchmarks/results`, or said to be from DeepEP's or FlashMLA's own runs on H200s; "published" is the
vendor's; "carried over" is a published figure times the share of it that was reached on an H200; "FITTED" was set so that a point which the
model is compared with comes out right; "goal" is what we build for and nobody has measured here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One GPU and its links, as rates that programs reach."""

    name: str
    memory_bytes: float
    """Of one GPU."""
    memory_rate: float
    """Bytes/s."""
    fp8_rate: float
    """FLOP/s, dense."""
    bf16_rate: float
    link_rate: float
    """Bytes/s that one GPU sends to its group, as published; software says what share it reaches."""
    sources: dict[str, str]
    """Field -> where its figure is from."""


H200 = Hardware(
    name="H200",
    memory_bytes=141e9,
    memory_rate=4.078e12,
    fp8_rate=1.445e15,
    bf16_rate=0.793e15,
    link_rate=450e9,
    sources={
        "memory_bytes": "published",
        "memory_rate": "measured, engine_flash_h200x2_2026-11.json: copy, read + written (published 4.8e12)",
        "fp8_rate": "measured, same file (published 1.979e15)",
        "bf16_rate": "measured, ops_matrix_h200_2026-11.md (published 0.989e15)",
        "link_rate": "published: NVLink 4, 900 GB/s both ways",
    },
)

GB300 = Hardware(
    name="GB300",
    memory_bytes=288e9,
    memory_rate=8e12 * 4.078 / 4.8,
    fp8_rate=5e15 * 1.445 / 1.979,
    bf16_rate=2.5e15 * 0.793 / 0.989,
    link_rate=900e9,
    sources={
        "memory_bytes": "published",
        "memory_rate": "carried over: 8 TB/s published, 85 % reached on the H200",
        "fp8_rate": "carried over: 360 PFLOP/s dense for 72 GPUs published, 73 % reached on the H200; FP4 times FP8 is as fast",
        "bf16_rate": "carried over: 180 PFLOP/s dense for 72 GPUs published, 80 % reached on the H200",
        "link_rate": "published: NVLink 5, 1.8 TB/s both ways, between all 72 GPUs of a rack",
    },
)

HARDWARE = {"h200": H200, "gb300": GB300}


@dataclass(frozen=True, kw_only=True, slots=True)
class Software:
    """Kernels and exchange, as fixed times of a launch and shares of the hardware's rates. Times in seconds."""

    name: str
    small_launches: float
    """Launches of a layer that multiply no weights: norms, copies, indices, stores."""
    launch_s: float
    """Of each, whatever it does, its start included."""
    gap_s: float
    """After each kernel of any kind, until the next one begins."""
    products: float
    """Launches of a layer that read weights, the experts' two included."""
    product_s: float
    """Of each, beside its bytes or FLOPs."""
    attention_s: float
    """Of a layer's decode attention, beside its FLOPs."""
    attention_share: float
    """Of the bf16 rate, decode."""
    hyper_s: float
    """Of one hyper-connection of decode, beside its bytes; two a layer."""
    hyper_share: float
    """Of the memory rate, bytes read and written once."""
    few_rows_share: float
    """Of the FP8 rate: experts that widen their codes as they multiply."""
    many_rows_share: float
    """Of the FP8 rate: experts widened to FP8 beforehand, without the widening."""
    widens: bool
    """Whether that widening is needed."""
    linear_share: float
    """Of the FP8 and bf16 rates: projections of many tokens."""
    prefill_attention_share: float
    """Of the bf16 rate."""
    exchange: Literal["gather", "all_to_all"]
    """Decode: every rank gets all tokens and adds up all results, or each token goes to the ranks of its experts."""
    dispatch_s: float
    """Of one dispatch of decode, beside its bytes."""
    combine_s: float
    gather_s: float
    """Of one all-gather of few rows, beside its bytes."""
    dispatch_link_share: float
    """Of the link rate."""
    combine_link_share: float
    prefill_link_share: float
    sources: dict[str, str]


AS_MEASURED = Software(
    name="as measured",
    small_launches=41,
    launch_s=1.6e-6,
    gap_s=0.52e-6,
    products=13,
    product_s=4e-6,
    attention_s=16e-6,
    attention_share=0.35,
    hyper_s=8.5e-6,
    hyper_share=0.55,
    few_rows_share=0.24,
    many_rows_share=0.57,
    widens=True,
    linear_share=0.85,
    prefill_attention_share=0.6,
    exchange="gather",
    dispatch_s=7e-6,
    combine_s=11.5e-6,
    gather_s=7e-6,
    dispatch_link_share=0.21,
    combine_link_share=0.12,
    prefill_link_share=0.53,
    sources={
        "small_launches": "counted, profile of engine_flash_h200x2_2026-11.json: 1,763 of 43 layers",
        "launch_s": "measured, ops_streaming and ops_index: 1.3 to 2.0 us for one token",
        "gap_s": "measured, same profile: time in which no kernel ran, 1.37 ms, over 2,627 launches; 0.52 and 0.48 us at batch 32 and 128",
        "products": "counted, same profile: 557 of 43 layers",
        "product_s": "measured, ops_matrix at T=1: 4 us + bytes is within a fifth of all rows",
        "attention_s": "measured, FlashMLA at batch 1: 17 us",
        "attention_share": "measured, FlashMLA at batch 128 and 256: 52 and 95 us",
        "hyper_s": "measured, ops_streaming, hc_post_pre at T=1 to 256",
        "hyper_share": "measured, same",
        "few_rows_share": "measured, ops_matrix: 350 TFLOP/s at 128 rows an expert",
        "many_rows_share": "measured, ops_matrix, DeepGEMM at 8,192 and 16,384 tokens, less the widening at 3.6 TB/s",
        "widens": "measured, same",
        "linear_share": "measured, ops_matrix: wq_b 83 %, wo_b 91 % at T=8192",
        "prefill_attention_share": "FITTED to the attention kernel of the prefill profile: 471 TFLOP/s",
        "exchange": "as run: expert_exchange=gather",
        "dispatch_s": "FITTED to the exchange's kernels at batch 1 of the decode profile",
        "combine_s": "FITTED, same",
        "gather_s": "as dispatch_s, which is one",
        "dispatch_link_share": "FITTED to the same kernels at batch 256: 94 GB/s",
        "combine_link_share": "FITTED, same: 54 GB/s",
        "prefill_link_share": "measured, DeepEP normal mode on two GPUs: 238 GB/s",
    },
)
"""What the H200 runs of November 2026 had."""

WITH_DEEPEP = dataclasses.replace(
    AS_MEASURED,
    name="measured ops, DeepEP",
    exchange="all_to_all",
    dispatch_s=35e-6,
    combine_s=25e-6,
    dispatch_link_share=0.16,
    combine_link_share=0.16,
    sources=AS_MEASURED.sources
    | {
        "exchange": "DeepEP 1.2.1, low latency",
        "dispatch_s": "measured, two H200s: 35 us for 32 to 128 tokens",
        "combine_s": "measured, two H200s: 36 us for 32 tokens, 69 us for 128, which is 25 us and 71 GB/s",
        "dispatch_link_share": "as the combine's",
        "combine_link_share": "measured, see combine_s",
    },
)
"""The same with the exchange that is meant for groups of more than a few; nobody has timed whole steps with it."""

GOAL = Software(
    name="goal",
    small_launches=12,
    launch_s=1.2e-6,
    gap_s=0.52e-6,
    products=9,
    product_s=2.5e-6,
    attention_s=10e-6,
    attention_share=0.5,
    hyper_s=5e-6,
    hyper_share=0.8,
    few_rows_share=0.6,
    many_rows_share=0.6,
    widens=False,
    linear_share=0.85,
    prefill_attention_share=0.6,
    exchange="all_to_all",
    dispatch_s=12e-6,
    combine_s=12e-6,
    gather_s=7e-6,
    dispatch_link_share=0.6,
    combine_link_share=0.6,
    prefill_link_share=0.6,
    sources={name: "goal" for name in Software.__dataclass_fields__ if name not in ("name", "sources")}
    | dict.fromkeys(("gap_s", "gather_s"), "as measured"),
)
"""Fused kernels, codes multiplied without widening, an exchange near the links' rate."""

SOFTWARE = {"measured": AS_MEASURED, "deepep": WITH_DEEPEP, "goal": GOAL}
