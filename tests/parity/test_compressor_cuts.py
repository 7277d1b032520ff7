"""Compressors give the same bytes however a prompt is cut into chunks and single tokens: what prefill stored, decode goes on with."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from engine.batch import TokenPlaces
from engine.cache.arena import RowPool
from engine.cache.rows import index_rows, kv_rows
from engine.model.rope import rotation
from engine.ops.cases import randn
from engine.ops.compress_c4.cases import frequencies
from engine.ops.paged_cases import empty_pool
from engine.ops.registry import get_op, load_backend

LENGTH = 700
PAGES = (2, 0, 1)
BACKENDS = [pytest.param("reference", id="reference"), pytest.param("triton", id="triton", marks=pytest.mark.gpu)]


def places_of_run(start: int, length: int, device: torch.device) -> TokenPlaces:
    """Tokens [start, start + length) of the one sequence, in slot 1."""
    zeros = torch.zeros(length, dtype=torch.int64, device=device)
    table = torch.tensor([PAGES], dtype=torch.int32, device=device)
    return TokenPlaces(torch.arange(start, start + length, device=device), zeros, zeros + start, zeros + 1, table, length == 1)


def run_cut(op: str, backend: str, cuts: list[int], kind: str, device: torch.device, seed: int) -> tuple[torch.Tensor, RowPool]:
    """(what is kept in the slots, the pool) after the sequence went through in chunks that begin at `cuts`."""
    ratio, is_index = (4 if op == "compress_c4" else 128), kind == "index"
    form = index_rows("fp8", 128) if is_index else kv_rows("fp8", 512, 64)
    dim, width = form.width, (4 if ratio == 4 else 2)
    projected, ape = randn(device, seed, LENGTH, width * dim), randn(device, seed + 1, ratio, width * dim // 2)
    weight = (randn(device, seed + 2, dim, scale=0.1) + 1).to(torch.bfloat16)
    pool = empty_pool(device, form, len(PAGES), 256 // ratio)
    kept = torch.zeros((3, 8, 4, dim) if ratio == 4 else (3, 3, dim), device=device)
    (kept[:, :, 2:] if ratio == 4 else kept[:, 0]).fill_(torch.finfo(torch.float32).min)
    run: Any = load_backend(get_op(op), backend)[0]
    for start, end in zip(cuts, [*cuts[1:], LENGTH], strict=True):
        places = places_of_run(start, end - start, device)
        cos, sin = rotation(places.positions_T // ratio * ratio, frequencies(64).to(device))
        head = (projected[start:end], ape, kept, places, weight, cos, sin, 1e-6, torch.bfloat16)
        run(*head, is_index, pool) if ratio == 4 else run(*head, pool)
    return kept, pool


@pytest.mark.parametrize(("op", "kind"), [("compress_c4", "entries"), ("compress_c4", "index"), ("compress_c128", "entries")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bytes_however_a_prompt_is_cut(op: str, kind: str, backend: str, rng: random.Random) -> None:
    device, seed = torch.device("cpu" if backend == "reference" else "cuda"), rng.randrange(2**31)
    whole = run_cut(op, backend, [0], kind, device, seed)
    assert (whole[1].data != 0).any(), "nothing was stored"
    chunks = sorted({0, *(rng.randrange(LENGTH) for _ in range(6))})
    decode = [0, *range(rng.randrange(1, 520), LENGTH)]
    for cuts in (chunks, decode):
        kept, pool = run_cut(op, backend, cuts, kind, device, seed)
        assert torch.equal(pool.data, whole[1].data) and torch.equal(pool.scale, whole[1].scale), f"rows differ, cut at {cuts[:8]}"
        assert torch.equal(kept, whole[0]), f"what is kept differs, cut at {cuts[:8]}"
