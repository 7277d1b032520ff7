"""Which entries the indexer selects, against transformers, where scores tie.

With 4 index heads 5.5 % of the visible scores here are exactly 0 (the products of all heads are negative), and torch.topk breaks such
ties by the width of the row. The engine takes the lowest index. So sets are compared up to ties; and once transformers breaks its ties
in the same way, all logits agree again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.engine import LoadedModel
from engine.score import score
from tests.support.checkpoints import TINY, float_tensors, write_random
from tests.support.transformers_model import logits_of, transformers_model

CONFIG: dict[str, Any] = TINY | {"index_n_heads": 4}
NUM_TOKENS, TOPK = 600, TINY["index_topk"]
TOLERANCE = 1e-4
"""Of logits, as in test_transformers.py."""
NOISE = 1e-5
"""Of scores, which reach about 1: float32 products there, float64 ones here."""


@dataclass
class Selection:
    """What the indexers of transformers saw and took, layer by layer."""

    scores: list[torch.Tensor] = field(default_factory=list)
    """float32 [T, S], -inf where not visible."""
    picks: list[torch.Tensor] = field(default_factory=list)
    """int64 [T, k], -1 unused."""


def masked(scores: torch.Tensor) -> torch.Tensor:
    visible = (torch.arange(len(scores)) + 1) // 4
    return scores.masked_fill(torch.arange(scores.shape[1]) >= visible[:, None], -torch.inf)


def lowest_of_equals(scores: torch.Tensor) -> torch.Tensor:
    best = torch.sort(scores, dim=1, descending=True, stable=True)
    return best.indices.masked_fill(best.values == -torch.inf, -1)[:, :TOPK]


@contextlib.contextmanager
def watched(model: torch.nn.Module, *, ties_to_lowest: bool) -> Iterator[Selection]:
    seen = Selection()

    def on_pick(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        picked = lowest_of_equals(seen.scores[-1])[None] if ties_to_lowest else output
        seen.picks.append(picked[0])
        return picked

    indexers: list[Any] = [module for module in model.modules() if type(module).__name__ == "DeepseekV4Indexer"]
    handles = [m.scorer.register_forward_hook(lambda _m, _i, output: seen.scores.append(masked(output[0]))) for m in indexers]
    handles += [module.register_forward_hook(on_pick) for module in indexers]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(0, CONFIG["vocab_size"], (NUM_TOKENS,), generator=torch.Generator().manual_seed(11)).tolist()


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return transformers_model(CONFIG, float_tensors(CONFIG))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_random(tmp_path_factory.mktemp("four_heads"), CONFIG, quantized=False)
    return LoadedModel.load(folder, EngineConfig(device="cpu", dtype="float32", kv_format="fp32", index_format="fp32", max_model_len=4096))


@pytest.fixture
def picks(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every selection that the engine makes from now on, int64 [T, k], in order."""
    made: list[torch.Tensor] = []
    select = loaded.ops.index_topk

    def record(*args: Any) -> torch.Tensor:
        made.append(select(*args))
        return made[-1]

    monkeypatch.setattr(loaded.ops, "index_topk", record)
    return made


def assert_equal_up_to_ties(ours: torch.Tensor, theirs: torch.Tensor, scores: torch.Tensor) -> int:
    """Entries in one set and not in the other must score what the last one taken scores. Returns how many rows differ."""
    num_differing = 0
    for row in range(len(ours)):
        mine, other = ({int(i) for i in picked[row] if i >= 0} for picked in (ours, theirs))
        assert len(mine) == len(other), f"{row=}"
        if mine != other:
            num_differing += 1
            last = scores[row, sorted(other)].min()
            assert ((scores[row, sorted(mine ^ other)] - last).abs() <= NOISE).all(), f"{row=} {mine ^ other}"
    return num_differing


def test_sets_are_those_of_transformers_up_to_ties(
    loaded: LoadedModel, model: torch.nn.Module, ids: list[int], picks: list[torch.Tensor]
) -> None:
    score(loaded, ids)
    with watched(model, ties_to_lowest=False) as theirs:
        logits_of(model, ids)
    zeros = (theirs.scores[0] == 0).sum() / theirs.scores[0].isfinite().sum()
    assert zeros > 0.01, "no ties: this test shows nothing"
    # Only the first of the two layers: there a tie broken otherwise has not yet changed what goes into the scores.
    assert len(picks) == len(theirs.picks) == 2
    assert assert_equal_up_to_ties(picks[0], theirs.picks[0], theirs.scores[0]) > 0, "no tie was broken otherwise: is the rule tested?"


@pytest.fixture(scope="module")
def ties_to_lowest(model: torch.nn.Module, ids: list[int]) -> tuple[np.ndarray, Selection]:
    with watched(model, ties_to_lowest=True) as theirs:
        return logits_of(model, ids), theirs


def test_sets_are_equal_in_every_layer_if_transformers_takes_the_lowest_of_equals(
    loaded: LoadedModel, ids: list[int], picks: list[torch.Tensor], ties_to_lowest: tuple[np.ndarray, Selection]
) -> None:
    logits, theirs = ties_to_lowest
    assert np.abs(score(loaded, ids) - logits).max() <= TOLERANCE
    assert len(picks) == len(theirs.picks) == 2
    for ours, other, scores in zip(picks, theirs.picks, theirs.scores, strict=True):
        assert_equal_up_to_ties(ours, other, scores)


@pytest.mark.parametrize(("chunk", "decode_from"), [(50, None), (137, None), (None, 511)])
def test_so_are_all_logits_however_the_tokens_are_cut(
    loaded: LoadedModel, ids: list[int], ties_to_lowest: tuple[np.ndarray, Selection], chunk: int | None, decode_from: int | None
) -> None:
    assert np.abs(score(loaded, ids, chunk=chunk, decode_from=decode_from) - ties_to_lowest[0]).max() <= TOLERANCE
