"""What a GPU needs beside weights, pages and slots: measured, by running the largest steps before any page is allocated."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch

from core.kv_layout import PAGE_TOKENS
from core.request import Request, SamplingParams
from engine.batch import Chunk, build_batch
from engine.cache.arena import Arena, ModelCaches
from engine.graphs import DecodeGraphs, batch_buckets, width_buckets
from engine.logprobs import logprobs_of
from engine.memory_plan import reachable
from engine.model.linear import Linear
from engine.scheduler.prefill import SCORED_TOKENS
from engine.sequence import Sequence

if TYPE_CHECKING:
    from engine.engine import LoadedModel

MARGIN = 1.1
"""For what differs from run to run: libraries that load late, fragments."""
MARGIN_BYTES = 512 << 20
PRODUCT_ROWS = 64
"""The smallest block of rows in DeepGEMM's products on Hopper of more than a few. On Blackwell there are smaller ones."""
CONTEXT_CHUNK = 256


def warm_lengths(most: int) -> list[int]:
    """Chunks up to `most` tokens, the longest last, whose steps need every kernel that one of another length needs."""
    steps = {size for power in range(most.bit_length()) for size in (1 << power, 3 << power) if size < most}
    return [*sorted(steps), most]


def warm_contexts(longest: int) -> list[int]:
    """Lengths of prompts below `longest`, whose last (at most) CONTEXT_CHUNK tokens need every kernel that a context of another length
    needs: some are made for a number of entries to choose from."""
    return [1 << power for power in range(longest.bit_length()) if 1 << power < longest]


@torch.inference_mode()
def warm_products(loaded: LoadedModel, most: int) -> None:
    """Run the FP8 projections with up to `most` rows, every number that a library may have another kernel for. DeepGEMM chooses by how the
    blocks of a product fill the multiprocessors, and compiles what it chooses, which takes seconds: a product of 1,280 rows may need a
    kernel that 1,024 and 1,536 do not. In a group all ranks leave together: one may have had to compile what another found compiled."""
    linears = [one for one in reachable(loaded.network) if isinstance(one, Linear) and one.takes_quantized]
    for (_, width), linear in {linear.shape: linear for linear in linears}.items():
        x = torch.zeros(most, width, dtype=torch.bfloat16, device=loaded.device)
        for rows in reversed(range(PRODUCT_ROWS, most + 1, PRODUCT_ROWS)):  # the first one's memory does for the others
            linear(x[:rows])
    if loaded.share is not None:
        loaded.share.least("products compiled", 0)


def measure_workspace(loaded: LoadedModel, chunk_tokens: int, max_decode: int) -> int:
    """Bytes for a prefill step of `chunk_tokens` at the end of the longest sequence (of as many as make up so many tokens), for one of as
    many tokens as may be scored, and for all decode graphs up to `max_decode` sequences (0: none): beside what they use in turn the
    driver keeps tens of MiB for each. Compiles what these and shorter chunks need, once `warm_products` has run, so that no request waits
    for it (but for steps of several prompts of which one token each is left: they attend as decode does). Raises
    torch.OutOfMemoryError if not even one page fits beside it."""
    device, longest = loaded.device, loaded.engine.max_model_len
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info(device)[0]
    num_slots = max(1, -(-chunk_tokens // longest))
    caches = ModelCaches(Arena(loaded.layout, 1, num_slots, device), loaded.model)
    torch.cuda.synchronize(device)
    own = before - torch.cuda.mem_get_info(device)[0]
    if chunk_tokens:
        sequences = [_longest(slot_id, longest) for slot_id in range(num_slots)]
        for end in warm_contexts(longest):
            length = min(end, CONTEXT_CHUNK, chunk_tokens)
            sequences[0].num_computed = end - length
            loaded.network.forward(build_batch([Chunk(sequences[0], length)], device), caches)
        for length in warm_lengths(chunk_tokens):
            torch.cuda.empty_cache()  # what shorter chunks leave behind is not needed by the longest
            chunks = []
            for sequence, start in zip(sequences, range(0, length, longest), strict=False):
                part = min(longest, length - start)
                sequence.num_computed = longest - part
                chunks.append(Chunk(sequence, part))
            loaded.network.forward(build_batch(chunks, device), caches)
        num_scored = min(chunk_tokens, longest, SCORED_TOKENS)
        sequences[0].num_computed = longest - num_scored
        logits = loaded.network.forward(build_batch([Chunk(sequences[0], num_scored, "all")], device), caches)
        logprobs_of(logits, [0] * num_scored, 1)
        del logits
    graphs = None
    if max_decode:
        graphs = DecodeGraphs(loaded.network, caches, batch_buckets(max_decode), width_buckets(longest), loaded.device_sample)
    torch.cuda.synchronize(device)
    taken = before - own - torch.cuda.mem_get_info(device)[0]
    del graphs, caches
    gc.collect()
    torch.cuda.empty_cache()
    return int(taken * MARGIN) + MARGIN_BYTES


def _longest(slot_id: int, length: int) -> Sequence:
    request = Request(request_id=f"workspace-{slot_id}", token_ids=(0,) * length, prompt_len=length, sampling=SamplingParams(max_tokens=1))
    sequence = Sequence.from_request(request)
    sequence.slot_id, sequence.page_ids = slot_id, [0] * -(-length // PAGE_TOKENS)
    return sequence
