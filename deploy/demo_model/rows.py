"""Rows for training: token ids, weights in the loss, and how far back each answer was stated."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from deploy.demo_model import chats, text

WORDS_PER_TOKEN = 0.8
"""About, with the demo tokenizer; a document that comes out too long is cut."""


class Rows(IterableDataset[tuple[Tensor, Tensor, Tensor]]):
    """Endless batches of rows of `length` + 1 tokens: (ids int64, weights float32, distances int32), each [batch, length + 1].

    A distance is counted in tokens back to the value that an answer repeats; 0 where there is none. Most rows are one document of
    records, since facts of another document under the same name would only confuse; the rest are chats and stories.
    """

    def __init__(self, tokenizer: str, length: int, batch: int, seed: int) -> None:
        self._tokenizer, self._length, self._batch, self._seed = tokenizer, length, batch, seed
        self._rendered = chats.Rendered.read()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        worker = get_worker_info()
        rng = random.Random(f"{self._seed}/{worker.id if worker else 0}")
        tokenizer = Tokenizer.from_str(self._tokenizer)
        while True:
            ids, weights, distances = zip(*(self._row(rng, tokenizer) for _ in range(self._batch)), strict=True)
            yield torch.tensor(ids), torch.tensor(weights), torch.tensor(distances, dtype=torch.int32)

    def _row(self, rng: random.Random, tokenizer: Tokenizer) -> tuple[list[int], list[float], list[int]]:
        ids: list[int] = []
        weights: list[float] = []
        distances: list[int] = []
        is_records = rng.random() < 0.7
        has_start = rng.random() < 0.8  # a prompt of a completion need not begin with the begin-of-sentence token
        while len(ids) <= self._length:
            room = max(20, round(WORDS_PER_TOKEN * (self._length - len(ids))))
            stated: dict[int, int] = {}
            for piece in self._document(rng, room, is_records and not ids):
                if piece.text == text.BOS and not ids and not has_start:
                    continue
                tokens = tokenizer.encode(piece.text, add_special_tokens=False).ids
                back = len(ids) - stated[piece.fact] if piece.is_question else 0
                if piece.fact >= 0:
                    stated[piece.fact] = len(ids)
                ids += tokens
                weights += [piece.weight] * len(tokens)
                distances += [back] * len(tokens)
        end = self._length + 1
        return ids[:end], weights[:end], distances[:end]

    def _document(self, rng: random.Random, room: int, is_records: bool) -> list[text.Piece]:
        if is_records:
            return text.records(rng, room)
        if rng.random() < 0.2:
            return [text.Piece(text.BOS), text.Piece(text.story(rng, rng.randint(0, 8)), 0.3), text.Piece(text.EOS)]
        return chats.chat(rng, self._rendered, room)
