"""What the scaling model knows of devices and of software, each figure with its source.

"Measured" is from a file in `tests/benchmarks/results`, or said to be from DeepEP's or FlashMLA's own runs on H200s ("alone": the op in a
graph of its own, not in a step); "counted" is from programs or shapes; "published" is the vendor's; "carried over" is a published figure
times the share of it that was reached on an H200; "FITTED" was set so that a step, or kernels of a step, which the model is compared with
come out right; "goal" is what we build for and nobody has measured here.
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
    """Launches of a layer that multiply no weights and follow one another: norms, indices, stores, router."""
    launch_s: float
    """Of each, its start included."""
    gap_s: float
    """What each launch of any kind costs in a step beyond its own time."""
    products: float
    """Launches of a layer that read weights and follow one another, the experts' two included."""
    product_s: float
    """Of each, beside its bytes or FLOPs."""
    expert_s: float
    """The same of the experts' two."""
    attention_s: float
    """Of a layer's decode attention, beside its bytes and FLOPs."""
    attention_share: float
    """Of the bf16 rate, decode."""
    hyper_s: float
    """Of one hyper-connection of decode, beside its bytes; two a layer."""
    hyper_share: float
    """Of the memory rate, bytes read and written once."""
    few_rows_share: float
    """Of the FP8 rate: experts that widen their codes as they multiply."""
    few_linear_share: float
    """Of the FP8 rate: projections of few tokens, on top of their bytes."""
    many_rows_share: float
    """Of the FP8 rate: experts widened to FP8 beforehand, without the widening."""
    widens: bool
    """Whether that widening is needed."""
    widening_share: float
    """Of the memory rate, bytes read and written."""
    linear_share: float
    """Of the FP8 and bf16 rates: projections of many tokens."""
    prefill_attention_share: float
    """Of the bf16 rate."""
    index_share: float
    """Of the FP8 rate, prefill: scores of the index."""
    index_row_s: float
    """Of a token's queries of the index and its choice of the best, prefill, in a layer that has one."""
    prefill_launches: float
    """Of a layer and chunk, all streams."""
    prefill_gap_s: float
    """Between two of them, in which nothing runs."""
    exchange: Literal["to_all", "to_experts"]
    """Every rank gets all tokens and gives sums to all, or each token goes to the ranks of its experts."""
    most_ranks: int
    """For which the exchange is."""
    dispatch_s: float
    """Of one dispatch of decode, beside its bytes."""
    combine_s: float
    gather_s: float
    """Of one all-gather of few rows, beside its bytes."""
    dispatch_link_share: float
    """Of the link rate."""
    combine_link_share: float
    prefill_link_share: float
    prefill_bytes: float
    """Of one value of a token's row, out and back."""
    sources: dict[str, str]


AS_MEASURED = Software(
    name="as measured",
    small_launches=5.5,
    launch_s=2.3e-6,
    gap_s=0.6e-6,
    products=7,
    product_s=4e-6,
    expert_s=8e-6,
    attention_s=12e-6,
    attention_share=0.35,
    hyper_s=8e-6,
    hyper_share=0.55,
    few_rows_share=0.24,
    few_linear_share=0.4,
    many_rows_share=0.77,
    widens=True,
    widening_share=0.88,
    linear_share=0.9,
    prefill_attention_share=0.49,
    index_share=0.53,
    index_row_s=26e-9,
    prefill_launches=100,
    prefill_gap_s=3.6e-6,
    exchange="to_all",
    most_ranks=8,
    dispatch_s=3e-6,
    combine_s=3e-6,
    gather_s=6e-6,
    dispatch_link_share=0.75,
    combine_link_share=0.75,
    prefill_link_share=0.41,
    prefill_bytes=3.03,
    sources={
        "small_launches": "counted at 60ff249, `launches`: of the 20.5 in the longest chain of a layer, those that no other field names",
        "launch_s": "measured alone (ops_streaming, ops_index, ops_matrix at T=1: 1.3 to 5.7 us), mean over the chain",
        "gap_s": "FITTED to the step of 1 x 8,192 at 60ff249; in its profile no kernel ran for 0.26 us a launch",
        "products": "counted, as small_launches",
        "product_s": "measured alone, ops_matrix at T=1: 4 us + bytes is within a fifth of all rows",
        "expert_s": "measured alone, ops_matrix at T=1 to 128: the op less its bytes and two small launches, 4 to 15 us, mean",
        "attention_s": "measured alone, ops_attention: 10 us over the window, 13 with 512 entries",
        "attention_share": "measured alone, FlashMLA of 512 entries at batch 128 (46 to 52 us, ops_attention) and 256 (95 us)",
        "hyper_s": "measured alone, ops_streaming, hc_post_pre at T=1",
        "hyper_share": "measured alone, same at T=32 to 256",
        "few_rows_share": "measured alone, ops_matrix: 350 TFLOP/s at 128 rows an expert",
        "few_linear_share": "FITTED to the projections' kernels at 1 and 256 x 8,192 in the profiles of 3225f4d: 5.6 ms apart",
        "many_rows_share": "FITTED to the experts' products in the prefill profile of 222dbf8: 1,110 TFLOP/s",
        "widens": "as run",
        "widening_share": "measured alone, ops_matrix: 3.6 TB/s",
        "linear_share": "measured alone, ops_matrix at T=8192: wq_b 83 %, wo_b 91 %",
        "prefill_attention_share": "FITTED to the attention kernel of the same prefill profile: 390 TFLOP/s",
        "index_share": "measured alone, ops_index",
        "index_row_s": "FITTED to their kernels in the prefill profile of 60ff249: 4.6 ms of 8,192 tokens",
        "prefill_launches": "counted, same profile: 4,298 of 43 layers",
        "prefill_gap_s": "FITTED to the time in which nothing ran in the same profile: 15.6 ms",
        "exchange": "`direct` in decode, NCCL's collectives for prompts",
        "most_ranks": "`direct` is for one host, of up to eight",
        "dispatch_s": "measured alone, at one row: 2.6 us on two GPUs (`together` of bench_waiting, 27ebf0b), 3.3 on four (bench_exchange)",
        "combine_s": "as dispatch_s",
        "gather_s": "assumed: twice a dispatch, nothing like it was measured",
        "dispatch_link_share": "measured alone, same runs at 32 and 128 rows: within a tenth",
        "combine_link_share": "as dispatch_link_share",
        "prefill_link_share": "FITTED to the collectives of the same prefill profile, waiting included: 184 GB/s",
        "prefill_bytes": "counted: FP8 with scales to all, bf16 back, since 25d3637",
    },
)
"""What the H200 runs of November 2026 have."""

OLDER_EXCHANGE = dataclasses.replace(
    AS_MEASURED,
    name="as measured, older exchange",
    dispatch_s=7e-6,
    combine_s=11.5e-6,
    dispatch_link_share=0.21,
    combine_link_share=0.43,
    prefill_bytes=6.0,
    sources=AS_MEASURED.sources
    | {
        "exchange": "NCCL",
        "dispatch_s": "FITTED to NCCL's kernels at batch 1 and b8bac3b",
        "combine_s": "FITTED, same",
        "dispatch_link_share": "FITTED to NCCL's kernels at 256 x 8,192 in the profile of 3225f4d",
        "combine_link_share": "FITTED, same",
        "prefill_bytes": "counted: bf16 to all, fp32 back",
    },
)
"""Steps of more rows than `direct` carried before d876aaa, and prompts before 25d3637. Only for such runs."""

WITH_DEEPEP = dataclasses.replace(
    AS_MEASURED,
    name="measured ops, DeepEP",
    small_launches=6.5,
    exchange="to_experts",
    most_ranks=160,
    dispatch_s=12e-6,
    combine_s=11e-6,
    dispatch_link_share=0.55,
    combine_link_share=0.55,
    prefill_link_share=0.53,
    prefill_bytes=3.03,
    sources=AS_MEASURED.sources
    | {
        "small_launches": "counted: as measured, and the choice of copies beside the listing of rows",
        "exchange": "DeepEP 1.2.1: low latency for decode, normal mode for prompts",
        "most_ranks": "DeepEP's kernels",
        "dispatch_s": "measured alone, two and four H200s (exchange_h200x4): 23 us for dispatch and combine of one token, halved",
        "combine_s": "as dispatch_s",
        "dispatch_link_share": "measured alone, same runs, up to 256 tokens: 243 GB/s on two, 260 on four",
        "combine_link_share": "as dispatch_link_share",
        "prefill_link_share": "measured alone, normal mode on two GPUs, an early run: 238 GB/s",
        "prefill_bytes": "counted: FP8 with scales out, bf16 back",
    },
)
"""The same with the exchange that is meant for groups of more than a host; nobody has timed whole steps with it."""

GOAL = Software(
    name="goal",
    small_launches=6.5,
    launch_s=1.2e-6,
    gap_s=0.25e-6,
    products=7,
    product_s=2.5e-6,
    expert_s=3.5e-6,
    attention_s=8e-6,
    attention_share=0.5,
    hyper_s=5e-6,
    hyper_share=0.8,
    few_rows_share=0.6,
    few_linear_share=0.8,
    many_rows_share=0.75,
    widens=False,
    widening_share=1.0,
    linear_share=0.9,
    prefill_attention_share=0.6,
    index_share=0.6,
    index_row_s=13e-9,
    prefill_launches=50,
    prefill_gap_s=1e-6,
    exchange="to_experts",
    most_ranks=160,
    dispatch_s=12e-6,
    combine_s=12e-6,
    gather_s=6e-6,
    dispatch_link_share=0.6,
    combine_link_share=0.6,
    prefill_link_share=0.6,
    prefill_bytes=3.03,
    sources={name: "goal" for name in Software.__dataclass_fields__ if name not in ("name", "sources")}
    | dict.fromkeys(("small_launches", "products", "linear_share", "gather_s", "prefill_bytes"), "as measured"),
)
"""Today's launches at half their cost, codes multiplied without widening, an exchange near the links' rate."""

SOFTWARE = {"measured": AS_MEASURED, "deepep": WITH_DEEPEP, "goal": GOAL}
