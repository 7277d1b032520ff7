"""Text that comes in pieces: nothing lost, nothing doubled, nothing held back without need."""

from __future__ import annotations

import pathlib
import random

import pytest

from router.tokens import MAX_PENDING, Detokenizer, StopMatcher, TextCodec

MODEL = pathlib.Path(__file__).resolve().parents[3] / "deploy" / "demo_model" / "checkpoint"


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(MODEL)


@pytest.mark.parametrize("text", ["Hello, how are you?", "naïve façade — déjà vu", "🦊🦊 和 狐狸 🇫🇷", "\n\n  a\t b", "a" * 50])
def test_token_by_token_is_the_whole_text(codec: TextCodec, text: str) -> None:
    stream = Detokenizer(codec)
    parts = [stream.add(token) for token in codec.encode(text)]
    assert "".join(parts) + stream.finish() == text
    assert not any("\ufffd" in part for part in parts)


def test_a_character_cut_off_at_the_end_shows_as_broken(codec: TextCodec) -> None:
    stream = Detokenizer(codec)
    ids = codec.encode("🦊")[:-1]
    assert "".join(stream.add(token) for token in ids) == ""
    assert "\ufffd" in stream.finish()


@pytest.mark.parametrize("seed", range(5))
def test_broken_characters_are_let_go_before_the_end_and_whole_ones_among_them_stay_whole(codec: TextCodec, seed: int) -> None:
    broken = next(token for token in range(codec.vocab_size) if codec.spelling(token) == "\ufffd")
    end, texts = codec.tokenizer.token_to_id("<｜end▁of▁sentence｜>"), [codec.encode(text) for text in ("🦊", "狐", "a", "é")]
    rng = random.Random(seed)
    pieces = [[broken] * rng.choice([1, 40]) if rng.random() < 0.5 else rng.choice([*texts, [end] * 40]) for _ in range(100)]
    ids, stream, longest = [token for piece in pieces for token in piece], Detokenizer(codec), 0
    parts = []
    for token in ids:
        parts.append(stream.add(token))
        longest = max(longest, len(stream._pending))
    assert "".join(parts) + stream.finish() == codec.decode(ids)
    assert longest < MAX_PENDING, "else each token costs more than the one before it"


def test_a_token_that_the_tokenizer_does_not_know_has_no_text(codec: TextCodec) -> None:
    stream, ids = Detokenizer(codec), codec.encode("fox and 狐")
    unknown = [codec.vocab_size, 129_279]
    parts = [stream.add(token) for known in ids for token in (known, *unknown)]
    assert "".join(parts) + stream.finish() == "fox and 狐"


@pytest.mark.parametrize("seed", range(100))
def test_what_comes_out_ends_before_a_stop_string_however_it_was_cut(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(40))
    stops = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 3))]
    matcher, out, rest = StopMatcher(stops), "", text
    while rest:
        size = rng.randint(1, 5)
        out += matcher.add(rest[:size])
        rest = rest[size:]
    out += matcher.finish()
    if any(stop in text for stop in stops):
        assert matcher.matched in stops
        assert text.startswith(out + (matcher.matched or ""))
        assert not any(stop in out for stop in stops)
    else:
        assert (out, matcher.matched) == (text, None)


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["<end>"])
    assert matcher.add("hello <") == "hello "
    assert matcher.add("b> <en") == "<b> "
    assert matcher.add("d> more") == ""
    assert matcher.matched == "<end>"
    assert matcher.finish() == ""
