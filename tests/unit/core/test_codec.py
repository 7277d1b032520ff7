from __future__ import annotations

import dataclasses

from core.codec import decode_load, encode_load, write_load
from core.request import Load
from protos import common_pb2


def test_a_load_arrives_with_every_field() -> None:
    load = Load(**{field.name: number for number, field in enumerate(dataclasses.fields(Load), 1)})
    assert decode_load(encode_load(load)) == load
    wire = common_pb2.Load()
    write_load(load, wire)
    assert wire == encode_load(load) and len(wire.ListFields()) == len(dataclasses.fields(Load))
