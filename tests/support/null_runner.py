"""NullRunner: a runner without a model, for tests of workers, transfer and router.

The next token is a hash of the history, so every correct path gives the same stream and a wrong history another one. Pages and slot
are filled with a pattern of the tokens they cover, and every step first checks all of it: a page that was not transferred, was
transferred twice to different places, or was written by a late sender raises at the next step of the sequence that it hurts.

    page      256 rows of page_bytes / 256 bytes, row r: the first bytes of the prefix hash of its token, repeated
    slot      u64 number of computed tokens, then the prefix hash of the last one, repeated
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from core.errors import InternalError
from core.kv_layout import PAGE_TOKENS, Field, KVLayout
from core.request import SamplingParams, TokenLogprobs
from engine.batch import Chunk
from engine.cache.arena import Arena
from engine.runner import ChunkResult, Launched, finish_reason_of
from engine.sequence import Sequence

Hashes = npt.NDArray[np.uint64]


def _mix(x: Hashes) -> Hashes:
    """The finaliser of splitmix64: a bijection of 64-bit words that spreads every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


EOS_TOKEN_ID = 1


def prefix_hashes(token_ids: list[int]) -> Hashes:
    """uint64 [len + 1]: element n stands for the first n tokens in their order."""
    tokens = np.asarray(token_ids, dtype=np.uint64)
    places = np.arange(1, len(tokens) + 1, dtype=np.uint64)
    each = _mix(_mix(tokens) + places * np.uint64(0xD1342543DE82EF95))
    return np.cumsum(np.concatenate((np.zeros(1, np.uint64), each)), dtype=np.uint64)


def null_layout(page_bytes: int, slot_bytes: int) -> KVLayout:
    """page_bytes: a multiple of 256. slot_bytes: a multiple of 8, at least 16."""
    assert page_bytes % PAGE_TOKENS == 0 and page_bytes > 0, f"{page_bytes=}"
    assert slot_bytes % 8 == 0 and slot_bytes >= 16, f"{slot_bytes=}"
    return KVLayout(
        model="null",
        kv_format="fp8",
        index_format="fp8",
        page_bytes=page_bytes,
        slot_bytes=slot_bytes,
        page_fields=(Field(name="null.0", offset=0, num_bytes=page_bytes, rows=PAGE_TOKENS, row_bytes=page_bytes // PAGE_TOKENS),),
        slot_fields=(Field(name="null.0", offset=0, num_bytes=slot_bytes, rows=slot_bytes // 8, row_bytes=8),),
    )


class NullRunner:
    """See the top. Fulfils `Runner`; its arena is ordinary memory of this process."""

    def __init__(
        self,
        *,
        num_pages: int,
        num_slots: int,
        page_bytes: int = 16 * PAGE_TOKENS,
        slot_bytes: int = 1024,
        vocab_size: int = 512,
        max_model_len: int = 65536,
        step_s: float = 0.0,
        token_s: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
        overlap: bool = False,
    ) -> None:
        """A step takes `step_s` and `token_s` for each of its tokens, spent in `sleep`. Runners that serve together need equal
        `vocab_size` and layouts. `overlap`: a step may be launched before the last one is collected."""
        self.layout = null_layout(page_bytes, slot_bytes)
        self.arena = Arena(self.layout, num_pages, num_slots)
        self.vocab_size, self.max_model_len = vocab_size, max_model_len
        self._step_s, self._token_s, self._sleep, self._overlap = step_s, token_s, sleep, overlap
        self._pages: npt.NDArray[np.uint8] = self.arena.pages.numpy().reshape(num_pages, PAGE_TOKENS, page_bytes // PAGE_TOKENS)
        self._slots: Hashes = self.arena.slots.numpy().view(np.uint64)
        for slot_id in range(num_slots):
            self._slots[slot_id] = np.uint64(2**64 - 1)  # a slot that nobody cleared is not an empty one

    def clear_slot(self, slot_id: int) -> None:
        self._write_slot(slot_id, 0, np.uint64(0))

    def next_token(self, token_ids: list[int], sampling: SamplingParams) -> int:
        """The token after `token_ids`: what any correct path must produce. Greedy requests ignore their seed."""
        salt = 0 if sampling.is_greedy else sampling.seed % 2**64
        last = prefix_hashes(token_ids)[-1:]
        return int(_mix(last ^ _mix(np.full(1, salt, np.uint64)))[0] % np.uint64(self.vocab_size))

    def continuation(self, token_ids: list[int], sampling: SamplingParams) -> list[int]:
        """The whole output that a request with this prompt must get, its end token included."""
        ids = list(token_ids)
        while len(ids) - len(token_ids) < sampling.max_tokens:
            ids.append(self.next_token(ids, sampling))
            if ids[-1] in sampling.stop_token_ids or (ids[-1] == EOS_TOKEN_ID and not sampling.ignore_eos):
                break
        return ids[len(token_ids) :]

    def step(self, chunks: list[Chunk], budget: int = 0) -> list[ChunkResult]:
        return self.collect(self.launch(chunks, budget))

    def launch(self, chunks: list[Chunk], budget: int = 0) -> Launched:
        assert chunks, "a step needs at least one chunk"
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.slot_id >= 0 and len(sequence.page_ids) * PAGE_TOKENS >= chunk.end, f"{sequence.request_id}: no room"
            sequence.num_computed = chunk.end
        return Launched(chunks)

    def arrived(self, page_ids: tuple[int, ...], slot_id: int) -> None:
        """They lie where they are read."""

    def may_lead(self, launched: Launched) -> bool:
        return self._overlap

    def collect(self, launched: Launched) -> list[ChunkResult]:
        """All happens here, as late as it may. Raises InternalError naming the request and the page or slot whose bytes are not those of
        its tokens."""
        delay = self._step_s + self._token_s * sum(chunk.length for chunk in launched.chunks)
        if delay > 0:
            self._sleep(delay)
        results = [self._run(chunk) for chunk in launched.chunks]
        return [result for result in results if result is not None]

    def _run(self, chunk: Chunk) -> ChunkResult | None:
        sequence, start, end = chunk.sequence, chunk.start, chunk.end
        assert chunk.length >= 1 and end <= len(sequence.token_ids), f"{sequence.request_id}: {start=} {end=}"
        hashes = prefix_hashes(sequence.token_ids[:end])
        self._check(sequence, start, hashes)
        rows = self._rows(hashes[start + 1 : end + 1])
        for index in range(start // PAGE_TOKENS, -(-end // PAGE_TOKENS)):
            first, last = max(start, index * PAGE_TOKENS), min(end, (index + 1) * PAGE_TOKENS)
            page = self._pages[sequence.page_ids[index]]
            page[first - index * PAGE_TOKENS : last - index * PAGE_TOKENS] = rows[first - start : last - start]
        self._write_slot(sequence.slot_id, end, hashes[end])
        if sequence.finish_reason is not None:
            return None
        sampling = sequence.request.sampling
        prompt: tuple[TokenLogprobs, ...] = ()
        if sampling.num_prompt_logprobs is not None and chunk.logits == "all":
            targets = sequence.token_ids[start + 1 : min(end + 1, sequence.request.prompt_len)]
            prompt = tuple(self._logprobs(token, sampling.num_prompt_logprobs) for token in targets)
        if end < len(sequence.token_ids):
            return ChunkResult(sequence, None, None, prompt, start + 1)
        token = self.next_token(sequence.token_ids, sampling)
        sequence.token_ids.append(token)
        sequence.finish_reason = finish_reason_of(sequence, EOS_TOKEN_ID)
        logprobs = None if sampling.num_logprobs is None else self._logprobs(token, sampling.num_logprobs)
        return ChunkResult(sequence, token, logprobs, prompt, start + 1)

    def _check(self, sequence: Sequence, num_computed: int, hashes: Hashes) -> None:
        slot = self._slots[sequence.slot_id]
        if slot[0] != num_computed or (slot[1:] != hashes[num_computed]).any():
            raise InternalError(
                f"{sequence.request_id}: slot {sequence.slot_id} is not that of the first {num_computed} tokens (it says {int(slot[0])})"
            )
        rows = self._rows(hashes[1 : num_computed + 1])
        for index in range(-(-num_computed // PAGE_TOKENS)):
            expected = rows[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS]
            page_id = sequence.page_ids[index]
            wrong = (self._pages[page_id, : len(expected)] != expected).any(axis=1)
            if wrong.any():
                raise InternalError(
                    f"{sequence.request_id}: page {page_id} (number {index} of the sequence) is wrong from row {int(wrong.argmax())} on"
                )

    def _rows(self, hashes: Hashes) -> npt.NDArray[np.uint8]:
        """[n] -> uint8 [n, row bytes]."""
        row_bytes = self._pages.shape[2]
        words = np.repeat(hashes[:, None], -(-row_bytes // 8), axis=1)
        return words.view(np.uint8)[:, :row_bytes]

    def _write_slot(self, slot_id: int, num_computed: int, newest: np.uint64) -> None:
        self._slots[slot_id, 0] = num_computed
        self._slots[slot_id, 1:] = newest

    def _logprobs(self, token: int, num_top: int) -> TokenLogprobs:
        """Made up, but the same wherever the token comes from: it is the most likely one, each next id half as likely."""
        tops = tuple((token + place) % self.vocab_size for place in range(num_top))
        return TokenLogprobs(logprob=-0.5, top_ids=tops, top_logprobs=tuple(-0.5 - 0.7 * place for place in range(num_top)))
