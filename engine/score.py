"""Teacher-forced logits of a token list: the engine's forward with nothing else around it."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import torch

from core.errors import InvalidRequest
from core.request import Request, SamplingParams
from engine.batch import Chunk, build_batch
from engine.engine import LoadedModel
from engine.sequence import Sequence


def read_ids(path: pathlib.Path, vocab_size: int) -> list[int]:
    """A JSON list of token ids. Raises InvalidRequest naming the file and what is wrong."""
    try:
        ids = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidRequest(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(ids, list) or not ids:
        raise InvalidRequest(f"{path}: expected a list of at least one token id")
    for place, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InvalidRequest(f"{path}: item {place} is {token!r}; token ids are integers in [0, {vocab_size})")
    return ids


def score(loaded: LoadedModel, ids: list[int], *, chunk: int | None = None, decode_from: int | None = None) -> np.ndarray:
    """float32 logits [T, vocab]; row t is the prediction after ids[: t + 1].

    `chunk` runs the prompt in pieces of so many tokens; tokens from `decode_from` on go one by one through the decode path. Raises
    InvalidRequest if either is out of range.
    """
    if chunk is not None and chunk < 1:
        raise InvalidRequest(f"--chunk is {chunk}; it must be at least 1")
    if decode_from is not None and not 1 <= decode_from <= len(ids):
        raise InvalidRequest(f"--decode-from is {decode_from}; it must be in [1, {len(ids)}], the number of tokens")
    prefill_end = len(ids) if decode_from is None else decode_from
    step = chunk or prefill_end
    cuts = [*range(0, prefill_end, step), *range(prefill_end, len(ids)), len(ids)]
    caches = loaded.new_caches(loaded.layout.num_pages(len(ids)), 1)
    caches.clear_slot(0)
    sampling = SamplingParams(max_tokens=1)
    sequence = Sequence.from_request(Request(request_id="score", token_ids=tuple(ids), prompt_len=len(ids), sampling=sampling))
    sequence.slot_id, sequence.page_ids = 0, list(range(len(caches.arena.pages)))
    rows: list[torch.Tensor] = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        rows.append(loaded.network.forward(build_batch([Chunk(sequence, end - start, "all")], loaded.device), caches))
        sequence.num_computed = end
    result: np.ndarray = torch.cat(rows).cpu().numpy()
    return result
