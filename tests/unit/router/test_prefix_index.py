from __future__ import annotations

from core.kv_layout import PAGE_TOKENS
from router.prefix_index import PrefixIndex

A, B = ("decode/0.0", 1), ("decode/1.0", 2)
TURN_1 = list(range(3 * PAGE_TOKENS + 7))
TURN_2 = [*TURN_1, *range(PAGE_TOKENS)]


def test_the_next_turn_finds_who_ran_the_last_one() -> None:
    index = PrefixIndex()
    assert index.find(TURN_2) is None
    index.note(TURN_1, A)
    assert index.find(TURN_2) == (A, 0.75)
    index.note(TURN_2, B)
    assert index.find(TURN_2) == (B, 1.0)
    assert index.find(TURN_1) == (A, 1.0)


def test_another_conversation_and_a_prompt_of_less_than_a_page_find_nobody() -> None:
    index = PrefixIndex()
    index.note(TURN_1, A)
    index.note([1, 2, 3], A)
    assert index.find([9, *TURN_1]) is None and index.find([1, 2, 3]) is None


def test_what_was_noted_first_is_forgotten_first() -> None:
    index = PrefixIndex(max_prompts=2)
    prompts = [[k] * PAGE_TOKENS for k in range(3)]
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        index.note(prompt, A)
    assert [index.find(prompt) is not None for prompt in prompts] == [True, False, True]
