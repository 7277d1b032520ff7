"""Placement, admission and sampling fields: pure decisions."""

from __future__ import annotations

from typing import Any

import pytest

from core.errors import InvalidRequest, Mismatch, Unavailable
from core.request import Load, Member, Request, SamplingParams
from router.placement import Candidate, place
from router.sampling import sampling_params

REQUEST = Request(request_id="r", token_ids=(1,) * 300, prompt_len=300, sampling=SamplingParams(max_tokens=100))


def candidate(role: str, replica: int, fingerprint: str = "f", tokens: int = 0, requests: int = 0, **load: int) -> Candidate:
    member = Member(role=role, replica=replica, rank=0, address="a:1", incarnation=replica + 1, fingerprint=fingerprint)
    return Candidate(member, Load(**{"pages_free": 100, "pages_total": 100, "slots_free": 8, "slots_total": 8, **load}), requests, tokens)


class TestPlacement:
    def test_the_least_loaded_of_each_role(self) -> None:
        prefills = [candidate("prefill", 0, waiting_tokens=900), candidate("prefill", 1, waiting_tokens=10)]
        decodes = [candidate("decode", 0, num_running=7), candidate("decode", 1, num_running=3)]
        prefill, decode = place(REQUEST, prefills, decodes)
        assert (prefill.replica, decode.replica) == (1, 1)

    def test_requests_placed_since_the_last_report_count(self) -> None:
        prefills = [candidate("prefill", 0, tokens=5000), candidate("prefill", 1, tokens=100)]
        decodes = [candidate("decode", 0, requests=9), candidate("decode", 1, requests=1)]
        prefill, decode = place(REQUEST, prefills, decodes)
        assert (prefill.replica, decode.replica) == (1, 1)

    def test_a_full_rank_comes_last(self) -> None:
        decodes = [candidate("decode", 0, pages_free=1), candidate("decode", 1, num_running=6)]
        assert place(REQUEST, [candidate("prefill", 0)], decodes)[1].replica == 1

    def test_an_avoided_rank_is_used_only_if_there_is_no_other(self) -> None:
        decodes = [candidate("decode", 0), candidate("decode", 1, num_running=6)]
        assert place(REQUEST, [candidate("prefill", 0)], decodes, [("decode/0.0", 1)])[1].replica == 1
        assert place(REQUEST, [candidate("prefill", 0)], decodes[:1], [("decode/0.0", 1)])[1].replica == 0

    def test_only_equal_layouts_are_paired_and_a_misfit_is_named(self) -> None:
        prefills = [candidate("prefill", 0, "old"), candidate("prefill", 1, "new", waiting_tokens=10**6)]
        assert place(REQUEST, prefills, [candidate("decode", 0, "new")])[0].replica == 1
        with pytest.raises(Mismatch, match=r"prefill/0\.0 has old.*decode/0\.0 has new"):
            place(REQUEST, prefills[:1], [candidate("decode", 0, "new")])

    def test_a_missing_role_is_named(self) -> None:
        with pytest.raises(Unavailable, match="decode"):
            place(REQUEST, [candidate("prefill", 0)], [])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": True}, "min_p"),
        ({"seed": 2**65}, "seed"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"stop_token_ids": [1000]}, "stop_token_ids"),
    ],
)
def test_a_bad_sampling_field_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match=param) as caught:
        sampling_params(body, max_tokens=1, num_logprobs=None, num_prompt_logprobs=None, vocab_size=1000)
    assert caught.value.param == param


def test_good_sampling_fields_arrive() -> None:
    body = {"temperature": 0.5, "top_k": -1, "seed": -1, "logit_bias": {"7": -2}}
    params = sampling_params(body, max_tokens=9, num_logprobs=2, num_prompt_logprobs=None, vocab_size=1000)
    assert (params.temperature, params.top_k, params.seed, params.logit_bias) == (0.5, 0, 2**64 - 1, ((7, -2.0),))
