from protos import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Order(_message.Message):
    __slots__ = ("cleared", "arrivals", "num_collected", "parts", "budget")
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    ARRIVALS_FIELD_NUMBER: _ClassVar[int]
    NUM_COLLECTED_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    cleared: _containers.RepeatedScalarFieldContainer[int]
    arrivals: _containers.RepeatedCompositeFieldContainer[Arrival]
    num_collected: int
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    budget: int
    def __init__(self, cleared: _Optional[_Iterable[int]] = ..., arrivals: _Optional[_Iterable[_Union[Arrival, _Mapping]]] = ..., num_collected: _Optional[int] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., budget: _Optional[int] = ...) -> None: ...

class Arrival(_message.Message):
    __slots__ = ("page_ids", "slot_id")
    PAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    SLOT_ID_FIELD_NUMBER: _ClassVar[int]
    page_ids: _containers.RepeatedScalarFieldContainer[int]
    slot_id: int
    def __init__(self, page_ids: _Optional[_Iterable[int]] = ..., slot_id: _Optional[int] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("whole", "place", "page_ids", "num_tokens", "last_token", "length", "logits")
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    PAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    whole: Whole
    place: int
    page_ids: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: int
    last_token: int
    length: int
    logits: str
    def __init__(self, whole: _Optional[_Union[Whole, _Mapping]] = ..., place: _Optional[int] = ..., page_ids: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[int] = ..., last_token: _Optional[int] = ..., length: _Optional[int] = ..., logits: _Optional[str] = ...) -> None: ...

class Whole(_message.Message):
    __slots__ = ("request", "token_ids", "num_computed", "slot_id")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    SLOT_ID_FIELD_NUMBER: _ClassVar[int]
    request: _common_pb2.Request
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_computed: int
    slot_id: int
    def __init__(self, request: _Optional[_Union[_common_pb2.Request, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_computed: _Optional[int] = ..., slot_id: _Optional[int] = ...) -> None: ...
