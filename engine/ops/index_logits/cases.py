"""Index scores of V4 (64 heads of 128 channels) over pages: decode of mixed lengths, chunks of several prompts, every index format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from engine.cache.rows import Fp8IndexRows, index_rows
from engine.ops.cases import Bench, Case, randn
from engine.ops.paged_cases import places_of, random_pool

HEADS, WIDTH, ROWS = 64, 128, 64
FP8_REASON = "fp32 sums of 128 exact products in another order; FP8 matrix units keep fewer bits of a partial sum than fp32"
REASON = "fp32 sums in another order"


def _draw(
    chunks: Sequence[tuple[int, int]], index_format: str = "fp8", fillers: int = 0, num_entries: int | None = None
) -> Callable[[torch.device, int], tuple[Any, ...]]:
    """`num_entries`: as in a bucket for longer sequences; by default just those that the longest sees."""

    def draw(device: torch.device, seed: int) -> tuple[Any, ...]:
        form = index_rows(index_format, WIDTH)
        places, num_pages, _ = places_of(device, seed, chunks, fillers)
        keys = random_pool(device, seed + 1, form, max(num_pages, 1), ROWS)
        tokens = len(places.positions_T)
        q = randn(device, seed + 2, tokens, HEADS, WIDTH)
        q = q.to(torch.float8_e4m3fn) if isinstance(form, Fp8IndexRows) else form.round_trip(q.flatten(0, 1)).view(q.shape)
        longest = max((start + length for start, length in chunks), default=0)
        return q, randn(device, seed + 3, tokens, HEADS, scale=0.1), keys, places, longest // 4 if num_entries is None else num_entries

    return draw


def _visible_only(
    chunks: Sequence[tuple[int, int]], fillers: int, tolerance: float, reason: str
) -> Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None]:
    """Compare what the queries see; the rest is unspecified."""
    positions = [position for start, length in chunks for position in range(start, start + length)] + [-1] * fillers
    visible = torch.tensor([(position + 1) // 4 for position in positions])

    def check(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
        (out,), (ref,) = outputs, expected
        assert out.shape == ref.shape and out.dtype == ref.dtype, f"{out.dtype} {out.shape}"
        seen = torch.arange(ref.shape[1]) < visible[:, None]
        difference = torch.where(seen, out.double() - ref.double(), 0.0)
        error = float(difference.norm() / torch.where(seen, ref.double(), 0.0).norm().clamp(min=1e-30))
        assert error <= tolerance, f"relative error {error:.3g} > {tolerance:g} ({reason})"

    return check


def _case(
    name: str,
    chunks: Sequence[tuple[int, int]],
    index_format: str = "fp8",
    fillers: int = 0,
    num_entries: int | None = None,
    small: bool = False,
) -> Case:
    tolerance, reason = (1e-3, FP8_REASON) if index_format == "fp8" else (1e-5, REASON)
    check = _visible_only(chunks, fillers, tolerance, reason)
    return Case(name, _draw(chunks, index_format, fillers, num_entries), tolerance, reason, small, check=check)


MIXED = [(length - 1, 1) for length in (1, 3, 4, 255, 256, 257, 5000, 2048, 9001, 16_384)]
CASES = (
    _case("no tokens", [], small=True),
    _case("no entries", [(0, 1), (1, 1)], num_entries=0, small=True),
    _case("one query", [(99, 1)], small=True),
    _case("a step with a filler row", [(300, 1), (2, 1)], fillers=1, small=True),
    _case("runs of several pages", [(2000, 1), (4, 1), (700, 1)], fillers=1, num_entries=512, small=True),
    _case("runs of two pages", [(2000, 1), (700, 1)], num_entries=512, small=True),
    _case("two prompts", [(0, 10), (250, 20)], small=True),
    _case("fp32 decode", [(300, 1), (17, 1)], "fp32", small=True),
    _case("fp32 prefill", [(120, 9)], "fp32", small=True),
    _case("decode of mixed lengths", MIXED),
    _case("decode in a larger bucket", MIXED, fillers=3, num_entries=4096),
    _case("decode of 128 sequences", [(37 * i, 1) for i in range(128)]),
    _case("decode at 1M tokens", [(1_048_575, 1)]),
    _case("fp4 decode", MIXED, "fp4"),
    _case("bf16 decode", MIXED, "bf16"),
    _case("first chunk", [(0, 2048)]),
    _case("later chunk", [(16_384, 512)]),
    _case("chunks of many prompts", [(0, 300), (1000, 1), (4095, 130), (77, 3), (2048, 500)]),
    _case("fp4 prefill", [(0, 100), (900, 300)], "fp4"),
    _case("bf16 prefill", [(0, 100), (900, 300)], "bf16"),
)


def _bench(name: str, chunks: Sequence[tuple[int, int]], index_format: str = "fp8") -> Bench:
    form, tokens = index_rows(index_format, WIDTH), sum(length for _, length in chunks)
    pairs = sum((position + 1) // 4 for start, length in chunks for position in range(start, start + length))
    keys = sum((start + length) // 4 for start, length in chunks)
    num_bytes = keys * (form.data_bytes + form.scale_bytes) + pairs * 4 + tokens * HEADS * (WIDTH + 4)
    is_decode = all(length == 1 for _, length in chunks)
    baselines = {"deep_gemm paged": _paged(chunks)} if is_decode and index_format == "fp8" else {}
    return Bench(name, _draw(chunks, index_format), num_bytes, pairs * HEADS * WIDTH * 2, "" if is_decode else "fp8", baselines)


def _paged(chunks: Sequence[tuple[int, int]]) -> Callable[[torch.device, int], Callable[[], object]]:
    """DeepGEMM's paged scores of one token a sequence, its schedule included as a step would have to."""

    def prepare(device: torch.device, seed: int) -> Callable[[], object]:
        import deep_gemm

        q, weights, keys, places, num_entries = _draw(chunks)(device, seed)
        row_bytes = keys.form.data_bytes + keys.form.scale_bytes
        fused = keys.data.as_strided((len(keys.data), ROWS, 1, row_bytes), (keys.data.stride(0), row_bytes, row_bytes, 1))
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        lengths = ((places.positions_T + 1) // 4).int()[:, None]

        def call() -> object:
            schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, ROWS, num_sms)
            return deep_gemm.fp8_paged_mqa_logits(q[:, None], fused, weights, lengths, places.page_table_SP, schedule, num_entries, False)

        return call

    return prepare


BENCH = (
    *(_bench(f"decode {n} x {length // 1024}K", [(length - 1, 1)] * n) for n, length in ((1, 1 << 20), (32, 1 << 17), (128, 8192))),
    _bench("decode 8 x 1024K", [((1 << 20) - 1, 1)] * 8),
    _bench("decode 8 x 1024K fp4", [((1 << 20) - 1, 1)] * 8, "fp4"),
    _bench("prefill 8192 of 8K", [(0, 8192)]),
    _bench("prefill 2048 of 128K", [(131_072 - 2048, 2048)]),
    _bench("prefill 256 of 1024K", [((1 << 20) - 256, 256)]),
)
