"""Experts as V4-Flash (d 4096, I 2048, 256 experts, top 6) and V4-Pro (d 7168, I 3072, 384) hold them, and small ones of every kind."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from engine.model.quantized import FP4_GROUP, FP8_BLOCK, QuantizedRows, QuantizedWeight
from engine.ops.cases import Bench, Case, Draw, Weights, generator, randn
from engine.ops.fp8_linear import quantize_rows
from engine.ops.moe_experts import Rooms

LIMIT = 10.0
REASON = (
    "FP8 matrix units sum 128 products with 13 bits below the largest (exact for most MXFP4 ones), so gate and up round to the other bf16 "
    "here and there, and hidden values next to an FP8 rounding border to the other side of it, 2^-4 away: one such value in a small case "
    "is already 1e-2"
)
TOLERANCE, LOOSE = 5e-3, 2e-2
"""Of large MXFP4 cases; of small ones and of FP8 weights."""


def mxfp4(device: torch.device, seed: int, rows: int, columns: int, low: int = 117, high: int = 121) -> QuantizedWeight:
    """Random codes, every 40th group all zeros with the smallest scale; scale bytes from [low, high]."""
    random = generator(device, seed)
    data = torch.randint(0, 256, (rows, columns // FP4_GROUP, FP4_GROUP // 2), dtype=torch.uint8, generator=random, device=device)
    scale = torch.randint(low, high + 1, (rows, columns // FP4_GROUP), dtype=torch.uint8, generator=random, device=device)
    dead = torch.rand(scale.shape, generator=random, device=device) < 1 / 40
    data[dead], scale[dead] = 0, 0
    return QuantizedWeight("mxfp4", data.flatten(1), scale)


def fp8(device: torch.device, seed: int, rows: int, columns: int) -> QuantizedWeight:
    random = generator(device, seed)
    data = torch.randn(rows, columns, generator=random, device=device).mul_(80).clamp_(-448, 448).to(torch.float8_e4m3fn)
    shape = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    return QuantizedWeight("fp8", data, torch.randint(112, 115, shape, dtype=torch.uint8, generator=random, device=device))


def routing(device: torch.device, seed: int, tokens: int, num_experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts for each token, and weights that sum to 1.5."""
    scores = torch.rand(tokens, num_experts, generator=generator(device, seed), device=device)
    weights, ids = scores.topk(top_k, dim=1)
    return ids, weights / weights.sum(1, keepdim=True) * 1.5


def experts(
    tokens: int,
    num_experts: int,
    width: int,
    inner: int,
    top_k: int = 6,
    local: tuple[int, int] | None = None,
    kind: str = "mxfp4",
    spread: tuple[int, int] = (117, 121),
    one_expert: bool = False,
    is_wide: bool = False,
    as_prompts: bool = False,
    is_summed: bool = True,
) -> Draw:
    """`local`: (first, number) of the experts held here, of num_experts. `is_wide`: MXFP4 that was widened at the start. `as_prompts`:
    rows as a group's exchange brings those of prompts, quantised and apart, and sums in bf16. Not `is_summed`: no sums."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        first, held = local or (0, num_experts)

        def matrix(index: int, rows: int, columns: int) -> QuantizedWeight:
            return mxfp4(device, seed + index, rows, columns, *spread) if kind == "mxfp4" else fp8(device, seed + index, rows, columns)

        w1 = [matrix(3 * expert, inner, width) for expert in range(held)]
        w2 = [matrix(3 * expert + 1, width, inner) for expert in range(held)]
        w3 = [matrix(3 * expert + 2, inner, width) for expert in range(held)]
        ids, weights = routing(device, seed + 10_000, tokens, num_experts, top_k)
        ids = torch.where((ids >= first) & (ids < first + held), ids - first, -1)
        if one_expert:
            ids = ids % top_k
        x = randn(device, seed + 10_001, tokens, width, dtype=torch.bfloat16)
        packed = Weights((w1, w2, w3, True), is_wide)
        among = num_experts if local else None
        if not as_prompts:
            return x, ids, weights, packed, LIMIT, torch.float32 if is_summed else None, among
        rows = quantize_rows(x)
        apart = torch.nn.functional.pad(rows.codes.view(torch.int32), (0, 16)).view(torch.float8_e4m3fn)[:, :width]
        scale = torch.nn.functional.pad(rows.scale, (0, 16))[:, : width // FP8_BLOCK]
        return QuantizedRows(apart, scale, x.dtype), ids, weights, packed, LIMIT, torch.bfloat16, among

    return draw


def in_rooms(
    num_experts: int,
    room: int,
    width: int,
    inner: int,
    most: int,
    usual: int = 0,
    share: float = 0.5,
    kind: str = "mxfp4",
    is_wide: bool = False,
    gap: int = 32,
    skew: int = 3,
) -> Draw:
    """As DeepEP's low-latency mode leaves rows: `share` of the `most` that there may be have come, at random, unevenly over the experts
    unless skew is 0; scales lie by columns, NaN is behind the rows and where results go, and `gap` channels between two of these.
    `usual`: 0 for `most`."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        _, _, _, packed, limit, *_ = experts(0, num_experts, width, inner, 1, kind=kind, is_wide=is_wide)(device, seed)
        random = generator(device, seed + 10_000)
        ends = (torch.rand(num_experts, generator=random, device=device) ** skew).cumsum(0)
        chosen = torch.searchsorted(ends, torch.rand(int(share * most), generator=random, device=device) * ends[-1])
        counts = torch.bincount(chosen.clamp(max=num_experts - 1), minlength=num_experts).clamp(max=room).int()
        rows = quantize_rows(randn(device, seed + 10_001, num_experts * room, width, dtype=torch.bfloat16))
        codes = rows.codes.contiguous().view(num_experts, room, width)
        scale = rows.scale.unflatten(0, (num_experts, room)).transpose(1, 2).contiguous().transpose(1, 2)
        behind = (torch.arange(room, device=device)[None, :] >= counts[:, None])[..., None]
        codes.view(torch.uint8).masked_fill_(behind, 0x7F)
        scale.masked_fill_(behind, torch.nan)
        out = torch.full((num_experts, room, width + gap), torch.nan, dtype=torch.bfloat16, device=device)[:, :, :width]
        return Rooms(codes, scale, counts, most, usual or most, out), None, None, packed, limit

    return draw


def _case(name: str, draw: Draw, tolerance: float = TOLERANCE, small: bool = False) -> Case:
    return Case(name, draw, LOOSE if small else tolerance, REASON, small)


def _evenly(rows: int, num_experts: int, width: int, inner: int, top_k: int = 4) -> Draw:
    """So many rows for every expert."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        tokens = rows * num_experts // top_k
        x, _, weights, packed, limit, *_ = experts(tokens, num_experts, width, inner, top_k)(device, seed)
        return x, torch.arange(tokens * top_k, device=device).view(tokens, top_k) % num_experts, weights, packed, limit

    return draw


CASES = (
    _case("no tokens", experts(0, 8, 256, 128, 2), small=True),
    _case("one token", experts(1, 4, 128, 128, 2), small=True),
    _case("wide scales", experts(3, 4, 256, 128, 2, spread=(110, 121)), small=True),
    _case("odd sizes", experts(3, 3, 96, 64, 2), small=True),
    _case("local range", experts(7, 8, 128, 128, 3, local=(2, 3)), small=True),
    _case("FP8", experts(3, 4, 256, 128, 2, kind="fp8"), small=True),
    _case("many rows, interpreted", experts(260, 1, 128, 128, 1), small=True),
    _case("many rows, wide scales", experts(260, 1, 256, 128, 1, spread=(110, 121)), small=True),
    _case("many rows of FP8", experts(260, 1, 128, 128, 1, kind="fp8"), small=True),
    _case("widened", experts(3, 4, 256, 128, 2, is_wide=True), small=True),
    _case("many rows, widened", experts(260, 1, 128, 256, 1, is_wide=True), small=True),
    _case("rows of prompts", experts(3, 4, 256, 128, 2, as_prompts=True), small=True),
    _case("many rows of prompts", experts(260, 1, 256, 128, 1, is_wide=True, as_prompts=True), small=True),
    _case("no tokens, not summed", experts(0, 4, 256, 128, 2, is_summed=False), small=True),
    _case("not summed", experts(3, 4, 256, 128, 2, is_summed=False), small=True),
    _case("many rows, not summed", experts(260, 1, 128, 128, 1, is_summed=False), small=True),
    _case("rooms, nothing has come", in_rooms(3, 4, 256, 128, 6, share=0.0), small=True),
    _case("rooms, no rows", in_rooms(2, 4, 128, 128, 0), small=True),
    _case("rooms", in_rooms(5, 8, 256, 128, 24), small=True),
    _case("rooms, full", in_rooms(1, 20, 256, 128, 20, share=1.0), small=True),
    _case("rooms, several blocks", in_rooms(2, 160, 128, 128, 150, share=1.0), small=True),
    _case("rooms, more than usual", in_rooms(3, 160, 128, 128, 600, usual=16, share=0.3), small=True),
    _case("rooms, many more than usual", in_rooms(2, 320, 128, 128, 400, usual=40, share=0.8), small=True),
    _case("rooms, FP8", in_rooms(3, 8, 256, 128, 12, kind="fp8"), small=True),
    _case("rooms, widened", in_rooms(3, 8, 256, 128, 12, is_wide=True), small=True),
    _case("rooms, many rows", in_rooms(1, 300, 128, 128, 260, share=1.0), small=True),
    _case("Flash shape, rooms of 12 rows", in_rooms(16, 64, 4096, 2048, 12, share=1.0, gap=64)),
    _case("Flash shape, rooms of 384 rows", in_rooms(16, 512, 4096, 2048, 384, gap=64)),
    _case("Flash shape, rooms of 768 rows", in_rooms(16, 512, 4096, 2048, 1536, usual=768, gap=64)),
    _case("Pro shape, rooms of 1,300 rows", in_rooms(12, 512, 7168, 3072, 2600, usual=1300, gap=112)),
    _case("Flash shape, rooms of 6,000 rows", in_rooms(16, 1024, 4096, 2048, 6000, gap=64)),
    _case("Flash shape, rooms, more than usual", in_rooms(16, 512, 4096, 2048, 3072, usual=192, gap=64)),
    _case("Pro shape, rooms", in_rooms(12, 512, 7168, 3072, 768, usual=96, share=0.9, gap=112)),
    _case("Flash shape, rows of prompts", experts(700, 16, 4096, 2048, is_wide=True, as_prompts=True)),
    _case("Flash shape, few rows of prompts", experts(40, 16, 4096, 2048, as_prompts=True)),
    _case("none of them here", experts(4, 8, 256, 256, 2, local=(8, 2))),
    _case("FP8 of Base", experts(40, 8, 1024, 512, kind="fp8"), LOOSE),
    _case("clamped", experts(40, 8, 1024, 512, spread=(121, 124))),
    _case("one expert takes all", experts(300, 8, 1024, 512, 1, one_expert=True)),
    _case("many rows", experts(2000, 8, 1024, 512)),
    _case("many rows of FP8 of Base", experts(500, 8, 1024, 512, kind="fp8"), LOOSE),
    _case("some hundred rows", experts(300, 16, 1024, 512)),
    _case("Flash shape, batch 1", experts(1, 16, 4096, 2048)),
    _case("Flash shape, batch 32", experts(32, 16, 4096, 2048)),
    *(_case(f"Flash shape, widened, T={tokens}", experts(tokens, 16, 4096, 2048, is_wide=True)) for tokens in (1, 40, 300, 700)),
    _case("Pro shape, batch 9", experts(9, 12, 7168, 3072)),
    *(_case(f"Flash shape, {rows} rows each", _evenly(rows, 8, 4096, 2048)) for rows in (29, 64, 65, 200)),
    _case("29 rows each, wide scales, not summed", experts(116, 16, 512, 384, 4, spread=(110, 121), is_summed=False)),
    _case("many rows each, odd tiles", experts(200, 8, 640, 256, 2)),
    _case("Flash shape, chunk", experts(1024, 32, 4096, 2048, local=(8, 16))),
)


def _deep_gemm_masked(rows: int, num_experts: int, width: int, inner: int) -> Callable[[torch.device, int], Callable[[], object]]:
    """DeepGEMM's grouped FP8 products w1|w3 and w2 alone, without routing, activation and sum."""

    def make(device: torch.device, seed: int) -> Callable[[], object]:
        import deep_gemm

        def product(n: int, k: int, offset: int) -> tuple[object, ...]:
            random, height = generator(device, seed + offset), -(-rows // 128) * 128
            a, b = (
                torch.randint(0, 100, shape, dtype=torch.uint8, generator=random, device=device).view(torch.float8_e4m3fn)
                for shape in ((num_experts, height, k), (num_experts, n, k))
            )
            scales = (torch.ones(num_experts, rows, k // FP8_BLOCK, device=device) for rows in (height, n // FP8_BLOCK))
            out = torch.empty(num_experts, height, n, dtype=torch.bfloat16, device=device)
            a_scale, b_scale = scales
            return (a, a_scale.transpose(1, 2).contiguous().transpose(1, 2)), (b, b_scale), out

        products = product(2 * inner, width, 0), product(width, inner, 1)
        counts = torch.full((num_experts,), rows, dtype=torch.int32, device=device)
        return lambda: [deep_gemm.fp8_m_grouped_gemm_nt_masked(*args, counts, rows) for args in products]

    return make


def _dot_scaled(rows: int, num_experts: int, width: int, inner: int) -> Callable[[torch.device, int], Callable[[], object]]:
    """Triton's products of bf16 rows and MXFP4 weights, w1|w3 and w2 alone."""

    def make(device: torch.device, seed: int) -> Callable[[], object]:
        from engine.ops.moe_experts.triton_dot_scaled import multiply

        def product(n: int, k: int, offset: int) -> tuple[torch.Tensor, ...]:
            weight = mxfp4(device, seed + offset, num_experts * n, k)
            codes, scale = (part.unflatten(0, (num_experts, n)) for part in (weight.data, weight.scale))
            x = randn(device, seed + offset + 1, num_experts, rows, k, dtype=torch.bfloat16)
            return x, codes, scale, torch.empty(num_experts, rows, n, dtype=torch.bfloat16, device=device)

        products = product(2 * inner, width, 0), product(width, inner, 2)

        def call() -> None:
            for args in products:
                multiply(*args)

        return call

    return make


def _bench(
    name: str, tokens: int, num_experts: int, width: int, inner: int, kind: str = "mxfp4", local: tuple[int, int] | None = None
) -> Bench:
    """Bytes: the experts that at least one token goes to, on average over random routing."""
    held = local[1] if local else num_experts
    active = held * (1 - (1 - 6 / num_experts) ** tokens)
    per_weight = 0.5 + 1 / FP4_GROUP if kind == "mxfp4" else 1 + 1 / FP8_BLOCK**2
    num_bytes = active * 3 * width * inner * per_weight + tokens * width * 6
    flops = 2 * 3 * width * inner * 6 * tokens * held // num_experts
    return Bench(name, experts(tokens, num_experts, width, inner, kind=kind, local=local), int(num_bytes), flops, "fp8")


def _even_bench(rows: int) -> Bench:
    shape = 64, 4096, 2048
    kinds = {"deep_gemm": ("deep_gemm fp8 masked", _deep_gemm_masked), "triton": ("dot_scaled", _dot_scaled)}
    baselines = {name: make(rows, *shape) for module, (name, make) in kinds.items() if importlib.util.find_spec(module)}
    num_bytes = 64 * 3 * 4096 * 2048 * 17 // 32 + rows * 64 * 4096 * 6 // 4
    return Bench(f"64 experts, {rows} rows each", _evenly(rows, *shape), num_bytes, 2 * 64 * rows * 3 * 4096 * 2048, "fp8", baselines)


def _rooms_bench(num_experts: int, most: int, rows: int) -> Bench:
    """`rows` of the `most` that there may be, at random over the experts."""
    active = num_experts * (1 - (1 - 1 / num_experts) ** rows)
    num_bytes, flops = active * 3 * 4096 * 2048 * 17 / 32 + rows * 4096 * 3, 2 * rows * 3 * 4096 * 2048
    draw = in_rooms(num_experts, max(512, most // num_experts), 4096, 2048, most, rows, rows / most, gap=64, skew=0)
    return Bench(f"Flash {num_experts} experts, rooms, {rows} of {most} rows", draw, int(num_bytes), flops, "fp8")


BENCH = (
    *(_rooms_bench(128, 2 * rows, rows) for rows in (6, 192, 768)),
    _rooms_bench(16, 12288, 768),
    *(_even_bench(rows) for rows in (4, 16, 32, 128)),
    *(_bench(f"Flash 256 experts T={tokens}", tokens, 256, 4096, 2048) for tokens in (1, 8, 32, 128, 1024, 8192)),
    _bench("Flash 32 of 256 experts T=256", 256, 256, 4096, 2048, local=(64, 32)),
    *(_bench(f"Flash 128 of 256 experts T={tokens}", tokens, 256, 4096, 2048, local=(0, 128)) for tokens in (2, 64, 16384)),
    _bench("Flash FP8 64 experts T=32", 32, 64, 4096, 2048, kind="fp8"),
    _bench("Flash FP8 128 of 256 experts T=16384", 16384, 256, 4096, 2048, kind="fp8", local=(0, 128)),
    *(_bench(f"Pro 48 of 384 experts T={tokens}", tokens, 384, 7168, 3072, local=(0, 48)) for tokens in (128, 8192)),
)
