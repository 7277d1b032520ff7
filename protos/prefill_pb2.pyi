from protos import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillCommand(_message.Message):
    __slots__ = ("hello", "runs", "cancels", "hand_ons")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    HAND_ONS_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.Hello
    runs: _containers.RepeatedCompositeFieldContainer[PrefillRun]
    cancels: _containers.RepeatedScalarFieldContainer[str]
    hand_ons: _containers.RepeatedCompositeFieldContainer[HandOn]
    def __init__(self, hello: _Optional[_Union[_common_pb2.Hello, _Mapping]] = ..., runs: _Optional[_Iterable[_Union[PrefillRun, _Mapping]]] = ..., cancels: _Optional[_Iterable[str]] = ..., hand_ons: _Optional[_Iterable[_Union[HandOn, _Mapping]]] = ...) -> None: ...

class PrefillRun(_message.Message):
    __slots__ = ("request", "reservation")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    request: _common_pb2.Request
    reservation: _common_pb2.Reservation
    def __init__(self, request: _Optional[_Union[_common_pb2.Request, _Mapping]] = ..., reservation: _Optional[_Union[_common_pb2.Reservation, _Mapping]] = ...) -> None: ...

class HandOn(_message.Message):
    __slots__ = ("request_id", "reservation")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reservation: _common_pb2.Reservation
    def __init__(self, request_id: _Optional[str] = ..., reservation: _Optional[_Union[_common_pb2.Reservation, _Mapping]] = ...) -> None: ...

class PrefillUpdate(_message.Message):
    __slots__ = ("hello", "first_tokens", "prompt_logprobs", "handed_off", "failures", "load", "draining", "hand_offs_failed")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    HANDED_OFF_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    HAND_OFFS_FAILED_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.Hello
    first_tokens: _containers.RepeatedCompositeFieldContainer[FirstToken]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PromptLogprobs]
    handed_off: _containers.RepeatedCompositeFieldContainer[HandedOff]
    failures: _containers.RepeatedCompositeFieldContainer[_common_pb2.Failure]
    load: _common_pb2.Load
    draining: bool
    hand_offs_failed: _containers.RepeatedCompositeFieldContainer[HandOffFailed]
    def __init__(self, hello: _Optional[_Union[_common_pb2.Hello, _Mapping]] = ..., first_tokens: _Optional[_Iterable[_Union[FirstToken, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PromptLogprobs, _Mapping]]] = ..., handed_off: _Optional[_Iterable[_Union[HandedOff, _Mapping]]] = ..., failures: _Optional[_Iterable[_Union[_common_pb2.Failure, _Mapping]]] = ..., load: _Optional[_Union[_common_pb2.Load, _Mapping]] = ..., draining: _Optional[bool] = ..., hand_offs_failed: _Optional[_Iterable[_Union[HandOffFailed, _Mapping]]] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("tokens", "stages")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    tokens: _common_pb2.Tokens
    stages: _containers.RepeatedCompositeFieldContainer[_common_pb2.Stage]
    def __init__(self, tokens: _Optional[_Union[_common_pb2.Tokens, _Mapping]] = ..., stages: _Optional[_Iterable[_Union[_common_pb2.Stage, _Mapping]]] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("request_id", "start", "logprobs")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    start: int
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    def __init__(self, request_id: _Optional[str] = ..., start: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class HandedOff(_message.Message):
    __slots__ = ("request_id", "stages", "reserved_as")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_AS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    stages: _containers.RepeatedCompositeFieldContainer[_common_pb2.Stage]
    reserved_as: str
    def __init__(self, request_id: _Optional[str] = ..., stages: _Optional[_Iterable[_Union[_common_pb2.Stage, _Mapping]]] = ..., reserved_as: _Optional[str] = ...) -> None: ...

class HandOffFailed(_message.Message):
    __slots__ = ("request_id", "reserved_as", "error")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RESERVED_AS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reserved_as: str
    error: _common_pb2.Error
    def __init__(self, request_id: _Optional[str] = ..., reserved_as: _Optional[str] = ..., error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ...) -> None: ...
