"""Decode attention at V4 shapes: each kind of layer, short and long contexts, sequences that have hardly begun, page-major pools."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from engine.cache.arena import RowPool
from engine.cache.rows import RowFormat, kv_rows
from engine.config import EngineConfig
from engine.ops.cases import Bench, Case, Draw, generator, randn
from engine.ops.q_norm_rope.cases import angles

SCALE = 512**-0.5
REASON = "weights are rounded to bf16 before the sum over rows, as the official kernel does (2^-9 each); few rows are turned back in fp32"
TOLERANCE = 6e-3


def pool(device: torch.device, seed: int, units: int, rows: int, form: RowFormat, stride: int) -> RowPool:
    """Random rows in units of `stride` bytes, as a layer's lie in pages or slots; what lies between is poison."""
    memory = torch.full((units, stride), 0xFF, dtype=torch.uint8, device=device)
    data, scale = form.encode(randn(device, seed, units * rows, form.width, dtype=torch.bfloat16))
    split, end = rows * form.data_bytes, rows * (form.data_bytes + form.scale_bytes)
    memory[:, :split], memory[:, split:end] = data.view(units, -1), scale.view(units, -1)
    scales = (
        memory[:, split:end].unflatten(1, (rows, form.scale_bytes)) if form.scale_bytes else memory[:, :0].unsqueeze(1).expand(-1, rows, -1)
    )
    return RowPool(form, memory[:, :split].unflatten(1, (rows, form.data_bytes)), scales)


def decode(
    lengths: tuple[int, ...], heads: int, ratio: int, topk: int = 512, kv_format: str = "fp8", is_alone: bool = False, places: int = 0
) -> Draw:
    """Sequences of these lengths (0: a filler row) in a layer of this ratio. `is_alone`: its units lie side by side, not in pages and
    slots of all layers. `places`: for entries, if there are more than the longest list has."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        form, count = kv_rows(kv_format, 512, 64), len(lengths)
        length = torch.tensor(lengths, device=device)
        ring = torch.arange(128, device=device)
        slots = torch.randperm(count + 2, generator=generator(device, seed), device=device)[:count]
        window_rows = torch.where(ring < length[:, None], slots[:, None] * 128 + ring, -1).int()
        q = randn(device, seed + 1, count, heads, 512, dtype=torch.bfloat16)
        sink = randn(device, seed + 2, heads)
        row_bytes = form.data_bytes + form.scale_bytes
        turned = angles(device, seed + 6, count, 64)
        window = pool(device, seed + 3, count + 2, 128, form, _aligned(128 * row_bytes) if is_alone else 100 * 576 * 128)
        if not ratio:
            none = torch.empty(count, 0, dtype=torch.int32, device=device)
            return q, window, window_rows, None, none, torch.zeros(count, dtype=torch.int32, device=device), sink, SCALE, *turned, {}
        per_page = 256 // ratio
        seen = length // ratio
        used = seen.clamp(max=topk) if ratio == 4 else seen
        widest, most = max(lengths) // ratio, min(topk, max(lengths) // ratio) if ratio == 4 else max(lengths) // ratio
        pages = max(1, sum(-(-one // 256) for one in lengths))
        entries = pool(device, seed + 4, pages, per_page, form, _aligned(per_page * row_bytes) if is_alone else 4 * 576 * per_page)
        first = (torch.cumsum(-(-length // 256), 0) - -(-length // 256)) * per_page
        order = torch.rand(count, max(widest, 1), generator=generator(device, seed + 5), device=device)
        order = order.masked_fill(torch.arange(max(widest, 1), device=device) >= seen[:, None], 2.0).argsort(1)[:, :most]
        rows = torch.where(torch.arange(most, device=device) < used[:, None], first[:, None] + order, -1).int()
        rows = torch.nn.functional.pad(rows, (0, max(0, places - most)), value=-1)
        return q, window, window_rows, entries, rows, used.int(), sink, SCALE, *turned, {}

    return draw


def _aligned(num_bytes: int) -> int:
    """FlashMLA takes strides of 576 bytes."""
    return -(-num_bytes // 576) * 576


def _case(name: str, draw: Draw, small: bool = False, kv_format: str = "fp8") -> Case:
    return Case(name, draw, TOLERANCE, REASON, small, EngineConfig(kv_format=kv_format))


CASES = (
    _case("no sequences", decode((), 64, 0), small=True),
    _case("window alone", decode((1, 127, 128, 129, 5), 64, 0)),
    _case("one head block, few tokens", decode((1, 3, 40), 16, 4, topk=8), small=True),
    _case("heads of the demo model, bf16 rows", decode((5, 1200), 4, 128, kv_format="bf16"), small=True, kv_format="bf16"),
    _case("sequences for the kernel of long lists", decode((1, 0, 3, 4, 5, 127, 128, 129, 300), 4, 4, topk=64), small=True),
    _case("few sequences of window alone", decode((0, 5, 200), 4, 0), small=True),
    _case("four sequences", decode((0, 7, 130, 300), 4, 4, topk=40), small=True),
    _case("one sequence, entries in shares", decode((1000,), 4, 4, topk=250), small=True),
    _case("one sequence, fewer entries than places", decode((300,), 20, 4, topk=70, places=300), small=True),
    _case("one sequence without entries, many places", decode((3,), 4, 128, places=250), small=True),
    _case("one sequence", decode((8192,), 64, 4)),
    _case("eight sequences, some short", decode((8192, 1, 0, 3000, 130, 127, 8000, 512), 64, 4)),
    _case("one sequence of many entries", decode((131000,), 64, 128)),
    _case("one sequence of 900K tokens", decode((921600,), 64, 128, places=7232)),
    _case("one short sequence in a bucket for long ones", decode((8192,), 64, 128, places=8192)),
    _case("one sequence of many entries, bf16 rows", decode((400_000,), 64, 128, kv_format="bf16"), kv_format="bf16"),
    _case("sequences without entries beside ones with", decode((3, 4, 5, 127, 2500), 64, 4)),
    _case("fillers", decode((0, 700, 0), 64, 4)),
    _case("ratio 4, selected", decode((8192, 4096, 2047, 2049), 64, 4)),
    _case("ratio 128, dense", decode((8192, 127, 128, 130000), 64, 128)),
    _case("Pro, ratio 4", decode((8192, 300), 128, 4, topk=1024)),
    _case("batch", decode((4096,) * 40, 64, 4)),
)


def _bare(lengths: tuple[int, ...], ratio: int) -> Callable[[torch.device, int], Callable[[], object]]:
    """FlashMLA's kernel alone, 64 heads, over a cache of this layer alone: arguments and schedule are as it wants them."""

    def make(device: torch.device, seed: int) -> Callable[[], object]:
        import flash_mla

        from engine.ops.sparse_attn_decode.flash_mla import blocks

        q, window, window_rows, entries, rows, used, sink, scale, *_ = decode(lengths, 64, ratio, is_alone=True)(device, seed)
        more = {"extra_k_cache": blocks(entries), "extra_indices_in_kvcache": rows[:, None], "extra_topk_length": used} if ratio else {}
        options = {"softmax_scale": scale, "attn_sink": sink, "use_legacy": True, "kv_format": "V4", **more}
        options["indices"] = window_rows[:, None]
        cache, schedule, q = blocks(window), flash_mla.get_mla_metadata()[0], q[:, None]
        return lambda: flash_mla.flash_mla_with_kvcache(q, cache, None, None, 512, schedule, **options)

    return make


def _bench(batch: int, context: int, ratio: int, heads: int = 64) -> Bench:
    entries = {0: 0, 4: min(512, context // 4), 128: context // 128}[ratio]
    rows = batch * (128 + entries)
    return Bench(
        f"S={batch} context={context} ratio={ratio} H={heads}",
        decode((context,) * batch, heads, ratio),
        num_bytes=rows * 588 + 2 * batch * heads * 1024,
        num_flops=4 * rows * heads * 512,
        rate="bf16",
        baselines={"bare FlashMLA": _bare((context,) * batch, ratio)} if importlib.util.find_spec("flash_mla") else {},
    )


BENCH = (
    *(_bench(batch, context, ratio) for batch in (1, 8, 32, 128) for context, ratio in ((8192, 0), (8192, 4), (131072, 128))),
    *(_bench(batch, 921_600, 128) for batch in (1, 2, 8)),
)
