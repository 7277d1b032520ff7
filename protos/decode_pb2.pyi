from protos import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DecodeCommand(_message.Message):
    __slots__ = ("hello", "reserves", "cancels")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESERVES_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.Hello
    reserves: _containers.RepeatedCompositeFieldContainer[_common_pb2.Request]
    cancels: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, hello: _Optional[_Union[_common_pb2.Hello, _Mapping]] = ..., reserves: _Optional[_Iterable[_Union[_common_pb2.Request, _Mapping]]] = ..., cancels: _Optional[_Iterable[str]] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("request_id", "reservation")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reservation: _common_pb2.Reservation
    def __init__(self, request_id: _Optional[str] = ..., reservation: _Optional[_Union[_common_pb2.Reservation, _Mapping]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("request_id", "stages")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    stages: _containers.RepeatedCompositeFieldContainer[_common_pb2.Stage]
    def __init__(self, request_id: _Optional[str] = ..., stages: _Optional[_Iterable[_Union[_common_pb2.Stage, _Mapping]]] = ...) -> None: ...

class DecodeUpdate(_message.Message):
    __slots__ = ("hello", "reserved", "tokens", "failures", "finished", "load", "draining")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.Hello
    reserved: _containers.RepeatedCompositeFieldContainer[Reserved]
    tokens: _containers.RepeatedCompositeFieldContainer[_common_pb2.Tokens]
    failures: _containers.RepeatedCompositeFieldContainer[_common_pb2.Failure]
    finished: _containers.RepeatedCompositeFieldContainer[Finished]
    load: _common_pb2.Load
    draining: bool
    def __init__(self, hello: _Optional[_Union[_common_pb2.Hello, _Mapping]] = ..., reserved: _Optional[_Iterable[_Union[Reserved, _Mapping]]] = ..., tokens: _Optional[_Iterable[_Union[_common_pb2.Tokens, _Mapping]]] = ..., failures: _Optional[_Iterable[_Union[_common_pb2.Failure, _Mapping]]] = ..., finished: _Optional[_Iterable[_Union[Finished, _Mapping]]] = ..., load: _Optional[_Union[_common_pb2.Load, _Mapping]] = ..., draining: _Optional[bool] = ...) -> None: ...
