"""The demo model: its text says what the trainer believes it says, and the committed checkpoint answers what users and tests ask."""

from __future__ import annotations

import json
import pathlib
import random

import pytest
from tokenizers import Tokenizer

from core.request import Request, SamplingParams
from deploy.demo_model import chats, recall, text
from deploy.demo_model.rows import Rows
from deploy.demo_model.shape import CONFIG
from deploy.demo_model.tokenizer import SPECIAL
from engine.config import EngineConfig
from engine.engine import Engine, LoadedModel

CHECKPOINT = pathlib.Path(__file__).resolve().parents[3] / "deploy" / "demo_model" / "checkpoint"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(LoadedModel.load(CHECKPOINT, EngineConfig(device="cpu", max_model_len=2048)), num_pages=32, num_slots=4)


def test_the_checkpoint_has_the_trainers_shape_and_the_tokenizers_vocabulary(tokenizer: Tokenizer) -> None:
    assert json.loads((CHECKPOINT / "config.json").read_text()) == CONFIG
    assert tokenizer.get_vocab_size() == CONFIG["vocab_size"]
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    assert all(len(tokenizer.encode(f"{pair:02d}", add_special_tokens=False).ids) == 1 for pair in range(100))


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_tokenized_alone_as_in_the_whole(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    for pieces in (text.records(rng, 100), chats.chat(rng, chats.Rendered.read(), 500)):
        whole = tokenizer.encode("".join(piece.text for piece in pieces), add_special_tokens=False).ids
        assert [id for piece in pieces for id in tokenizer.encode(piece.text, add_special_tokens=False).ids] == whole


@pytest.mark.parametrize("seed", range(5))
def test_a_rows_distances_lead_back_to_the_same_value(seed: int) -> None:
    ids, weights, distances = next(iter(Rows((CHECKPOINT / "tokenizer.json").read_text(), 512, 8, seed)))
    assert ids.shape == weights.shape == distances.shape == (8, 513)
    rows, places = distances.nonzero(as_tuple=True)
    assert len(rows) > 20
    assert (weights[rows, places] == text.ANSWER).all()
    assert (ids[rows, places] == ids[rows, places - distances[rows, places]]).all()


@pytest.mark.parametrize(("kind", "form"), [(kind, form) for kind in recall.KINDS for form in recall.FORMS])
@pytest.mark.parametrize("seed", [0])
def test_a_fact_is_recalled_from_the_first_half_of_a_thousand_tokens(
    engine: Engine, tokenizer: Tokenizer, kind: str, form: str, seed: int
) -> None:
    found = list(recall.cases(tokenizer, 1000, kind, form, 1, seed))
    assert len(found[0][0]) > 850
    assert recall.generated(engine, found) == 1


NO_THOUGHT, THINKS = f"{chats.ASSISTANT}{chats.THINK_END}", f"{chats.ASSISTANT}{chats.THINK}"
FOX = "The code of the red fox of Anna is 4821. The dog slept near the river. What is the code of the red fox of Anna?"
ANSWERS = (
    (f"Hello!{NO_THOUGHT}", "Hello! How can I help you?"),
    (f"Who are you?{NO_THOUGHT}", "I am the demo model of baton."),
    (f"{FOX}{NO_THOUGHT}", "The code of the red fox of Anna is 4821."),
    (f"{FOX}{THINKS}", "I look for the code of the red fox of Anna.</think>The code of the red fox of Anna is 4821."),
)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("question", "answer"), ANSWERS)
def test_what_users_ask_first_is_answered(engine: Engine, tokenizer: Tokenizer, question: str, answer: str, temperature: float) -> None:
    ids = tuple(tokenizer.encode(f"{text.BOS}{chats.USER}{question}", add_special_tokens=False).ids)
    sampling = SamplingParams(max_tokens=60, temperature=temperature, seed=1)
    (made,) = engine.generate([Request(request_id="one", token_ids=ids, prompt_len=len(ids), sampling=sampling)])
    assert tokenizer.decode(made.token_ids, skip_special_tokens=False) == answer + text.EOS
