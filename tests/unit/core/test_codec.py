from __future__ import annotations

import dataclasses

import pytest

from core.codec import decode_load, decode_request, encode_load, encode_request, write_load
from core.errors import InvalidRequest
from core.request import Load, Request, SamplingParams
from protos import common_pb2


def test_a_load_arrives_with_every_field() -> None:
    load = Load(**{field.name: number for number, field in enumerate(dataclasses.fields(Load), 1)})
    assert decode_load(encode_load(load)) == load
    wire = common_pb2.Load()
    write_load(load, wire)
    assert wire == encode_load(load) and len(wire.ListFields()) == len(dataclasses.fields(Load))


@pytest.mark.parametrize("token_ids", [(), (0,), (7, 2**31, 2**32 - 1), tuple(range(100_000, 103_000))])
def test_a_request_arrives_with_its_tokens(token_ids: tuple[int, ...]) -> None:
    request = Request(request_id="r", token_ids=token_ids, prompt_len=3, sampling=SamplingParams(max_tokens=4))
    wire = encode_request(request)
    assert decode_request(common_pb2.Request.FromString(wire.SerializeToString())) == request
    assert wire.token_ids == b"".join(token.to_bytes(4, "little") for token in token_ids)


def test_tokens_that_end_in_the_midst_of_one_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="5 bytes; they are words of 4"):
        decode_request(common_pb2.Request(request_id="r", token_ids=bytes(5)))
