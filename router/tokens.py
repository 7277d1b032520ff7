"""Token ids and text: the tokenizer, incremental decoding, stop strings."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from core.errors import CheckpointError, PromptTooLong

PIECE_CHARS = 65_536
"""Of a text that may be too long, tokenised at a time."""

MAX_PENDING = 16
"""Tokens that wait for the end of a character. It has 4 bytes at most, and a token one at least: with so many something is broken."""


def context_length(max_tokens: int) -> str:
    """The end of a sentence on a prompt that is too long. Its words, and "prompt is too long", are what clients look for."""
    return f"this model's maximum context length is {max_tokens} tokens, prompt and answer together"


class TextCodec:
    """The model's tokenizer. Decoding keeps special tokens out of the text."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.path = folder / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises plain Exception for missing and malformed files alike
            raise CheckpointError(f"{self.path}: cannot be loaded as a tokenizer: {error}") from error
        self.vocab_size = int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """The text as it is, nothing added; spellings of special tokens become those tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def refuse_overlong(self, text: str, max_tokens: int, param: str) -> None:
        """Raises PromptTooLong for a text that surely has more than max_tokens tokens, before all of it is tokenised.

        Only a text of more than 8 characters a token is looked at, piece by piece. A cut between pieces changes a few tokens beside it:
        twice max_tokens is certain. What passes is still to be counted."""
        if len(text) <= 8 * max_tokens:
            return
        count = 0
        for start in range(0, len(text), PIECE_CHARS):
            count += len(self.tokenizer.encode(text[start : start + PIECE_CHARS], add_special_tokens=False))
            if count > 2 * max_tokens:
                raise PromptTooLong(f"prompt is too long: {len(text)} characters; {context_length(max_tokens)}", param=param)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def spelling(self, token_id: int) -> str:
        """One token on its own, special ones included; broken UTF-8 shows as the replacement character."""
        return self.decode([token_id], skip_special_tokens=False)


class Detokenizer:
    """Text of a growing list of tokens. Never emits half a character: bytes wait until they are whole."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        """The text that the token completes. A token that the tokenizer does not know has none."""
        if token_id >= self._codec.vocab_size:
            return ""
        self._pending.append(token_id)
        text: str | None = self._stream.step(self._codec.tokenizer, token_id)
        if text:
            self._pending.clear()
            return text
        return self._let_go() if len(self._pending) >= MAX_PENDING else ""

    def finish(self) -> str:
        """What was held back; broken characters show as replacement characters."""
        rest = self._codec.decode(self._pending)
        self._pending.clear()
        return rest

    def _let_go(self) -> str:
        """Text of what is pending, but for a last character that may yet become whole. The stream, which would decode all of it again with
        each token, begins anew."""
        pending, decode = self._pending, self._codec.decode
        whole, last = decode(pending), len(pending) - 3
        cut = next((at for at in range(last, 0, -1) if decode(pending[:at]) + decode(pending[at:]) == whole), last)
        self._pending, self._stream = [], DecodeStream(skip_special_tokens=True)
        return decode(pending[:cut]) + "".join(self.add(token) for token in pending[cut:])


class StopMatcher:
    """Cuts a stream of text before the first stop string. Holds back only what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def add(self, text: str) -> str:
        """The text that is certain now. After a match: nothing more."""
        if self.matched is not None:
            return ""
        self._held += text
        places = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            place, self.matched = min(places, key=lambda found: (found[0], -len(found[1])))
            sure, self._held = self._held[:place], ""
            return sure
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        sure, self._held = self._held[:cut], self._held[cut:]
        return sure

    def finish(self) -> str:
        """The stream has ended: what was held back is text after all."""
        rest, self._held = self._held, ""
        return "" if self.matched is not None else rest

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
