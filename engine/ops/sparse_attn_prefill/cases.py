"""Prefill attention at V4 shapes: queries of one chunk over gathered rows."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw, generator, randn
from engine.ops.sparse_attn_decode.cases import REASON, SCALE, TOLERANCE


def prefill(tokens: int, rows: int, chosen: int, heads: int = 64) -> Draw:
    """Queries that see the window before them and `chosen` of `rows` entries, fewer near the start."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        q = randn(device, seed, tokens, heads, 512, dtype=torch.bfloat16)
        kv = randn(device, seed + 1, tokens + rows, 512, dtype=torch.bfloat16)
        token = torch.arange(tokens, device=device)[:, None]
        window = token - 127 + torch.arange(128, device=device)
        picked = torch.randint(0, max(rows, 1), (tokens, 1), generator=generator(device, seed + 2), device=device)
        entry = (picked + torch.arange(chosen, device=device)) % max(rows, 1)
        entry = torch.where(torch.arange(chosen, device=device) <= token, entry + tokens, -1)
        return q, kv, torch.cat((window.clamp(min=-1), entry), 1).int(), randn(device, seed + 3, heads), SCALE

    return draw


def _case(name: str, tokens: int, rows: int, chosen: int, heads: int = 64, small: bool = False) -> Case:
    return Case(name, prefill(tokens, rows, chosen, heads), TOLERANCE, REASON, small)


CASES = (
    _case("no tokens", 0, 0, 0, small=True),
    _case("window alone", 200, 0, 0),
    _case("heads of the demo model", 3, 5, 4, heads=4, small=True),
    _case("odd number of rows", 130, 33, 33),
    _case("selected entries", 512, 2048, 512),
    _case("Pro", 64, 4096, 1024, heads=128),
)


def _bench(tokens: int, rows: int, chosen: int) -> Bench:
    return Bench(
        f"T={tokens} window=128 entries={chosen} of {rows}",
        prefill(tokens, rows, chosen),
        num_bytes=(2 * tokens * 64 + tokens + rows) * 1024,
        num_flops=4 * tokens * (128 + chosen) * 64 * 512,
        rate="bf16",
    )


BENCH = (_bench(2048, 0, 0), _bench(2048, 2048, 512), _bench(8192, 64, 64))
