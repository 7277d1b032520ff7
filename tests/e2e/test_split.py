"""Split equals whole: prompts that go through router, prefill rank, NIXL and decode rank give the tokens that one engine gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.serving import Serving
from tests.support.split_prompts import BORDERS, ENGINE, NUM_PROMPTS, requests, serve, spelling, tokens_of_one_engine

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def whole() -> dict[str, list[int]]:
    return tokens_of_one_engine(requests())


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    with Serving(engine=ENGINE) as serving:
        yield serving


def test_two_hundred_prompts_at_once_give_the_tokens_of_one_engine(serving: Serving, whole: dict[str, list[int]]) -> None:
    found = serve(serving, requests(), at_once=16)
    wrong = [name for name, tokens in found.items() if tokens != spelling(whole[name])]
    assert len(found) == NUM_PROMPTS
    assert not wrong, f"{len(wrong)} of {NUM_PROMPTS} differ: {wrong[:10]}"
    serving.wait(serving.is_empty)


def test_prompts_at_every_border_one_by_one_give_the_same(serving: Serving, whole: dict[str, list[int]]) -> None:
    for name, tokens in serve(serving, requests()[: len(BORDERS)], at_once=1).items():
        assert tokens == spelling(whole[name]), name
    serving.wait(serving.is_empty)


def test_the_sampled_streams_are_not_all_alike(whole: dict[str, list[int]]) -> None:
    assert len({tuple(tokens) for tokens in whole.values()}) > NUM_PROMPTS // 2
