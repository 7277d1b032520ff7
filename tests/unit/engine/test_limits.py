"""Requests that a model cannot run are refused before a step is spent on them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from core.errors import InvalidRequest
from core.request import Request, SamplingParams
from engine.limits import check_fits

FITS = Request(request_id="r", token_ids=(0, 5, 99), prompt_len=2, sampling=SamplingParams(max_tokens=8, logit_bias=((0, 1.0), (99, -1.0))))


def test_the_largest_request_that_fits_is_let_through() -> None:
    check_fits(FITS, vocab_size=100, max_model_len=10)


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"token_ids": ()}, "prompt", "the prompt is empty"),
        ({"prompt_len": 0}, "prompt", "prompt_len is 0"),
        ({"prompt_len": 4}, "prompt", "prompt_len is 4"),
        ({"token_ids": (0, 5, 100)}, "prompt", "token id 100 is out of range; the vocabulary has 100 ids"),
        ({"token_ids": (-1, 5, 9)}, "prompt", "token id -1"),
        ({"sampling": SamplingParams(max_tokens=0)}, "max_tokens", "at least 1"),
        ({"sampling": SamplingParams(max_tokens=9)}, "max_tokens", "the longest sequence, 10 tokens"),
        ({"sampling": SamplingParams(max_tokens=8, logit_bias=((7, 1.0), (100, 1.0)))}, "logit_bias", "token id 100"),
        ({"sampling": SamplingParams(max_tokens=8, logit_bias=((7, 1.0),) * 1025)}, "logit_bias", "1025 entries; at most 1024"),
    ],
)
def test_each_limit_is_named(change: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        check_fits(dataclasses.replace(FITS, **change), vocab_size=100, max_model_len=10)
    assert caught.value.param == param
