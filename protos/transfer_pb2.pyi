from protos import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Region(_message.Message):
    __slots__ = ("address", "num_pieces", "piece_bytes", "device_id", "memory")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_PIECES_FIELD_NUMBER: _ClassVar[int]
    PIECE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    address: int
    num_pieces: int
    piece_bytes: int
    device_id: int
    memory: str
    def __init__(self, address: _Optional[int] = ..., num_pieces: _Optional[int] = ..., piece_bytes: _Optional[int] = ..., device_id: _Optional[int] = ..., memory: _Optional[str] = ...) -> None: ...

class SenderHello(_message.Message):
    __slots__ = ("hello", "kv_layout", "transport", "address", "link")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.Hello
    kv_layout: str
    transport: str
    address: str
    link: str
    def __init__(self, hello: _Optional[_Union[_common_pb2.Hello, _Mapping]] = ..., kv_layout: _Optional[str] = ..., transport: _Optional[str] = ..., address: _Optional[str] = ..., link: _Optional[str] = ...) -> None: ...

class ReceiverHello(_message.Message):
    __slots__ = ("hello", "kv_layout", "agent", "pages", "slots", "machine")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.Hello
    kv_layout: str
    agent: bytes
    pages: Region
    slots: Region
    machine: str
    def __init__(self, hello: _Optional[_Union[_common_pb2.Hello, _Mapping]] = ..., kv_layout: _Optional[str] = ..., agent: _Optional[bytes] = ..., pages: _Optional[_Union[Region, _Mapping]] = ..., slots: _Optional[_Union[Region, _Mapping]] = ..., machine: _Optional[str] = ...) -> None: ...

class SenderMessage(_message.Message):
    __slots__ = ("hello", "renew", "last_write_out", "ping")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    LAST_WRITE_OUT_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    hello: SenderHello
    renew: _containers.RepeatedScalarFieldContainer[int]
    last_write_out: _containers.RepeatedScalarFieldContainer[int]
    ping: int
    def __init__(self, hello: _Optional[_Union[SenderHello, _Mapping]] = ..., renew: _Optional[_Iterable[int]] = ..., last_write_out: _Optional[_Iterable[int]] = ..., ping: _Optional[int] = ...) -> None: ...

class ReceiverMessage(_message.Message):
    __slots__ = ("hello", "refused", "released", "revoked", "pong", "live")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    hello: ReceiverHello
    refused: _common_pb2.Error
    released: _containers.RepeatedScalarFieldContainer[int]
    revoked: _containers.RepeatedScalarFieldContainer[int]
    pong: int
    live: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, hello: _Optional[_Union[ReceiverHello, _Mapping]] = ..., refused: _Optional[_Union[_common_pb2.Error, _Mapping]] = ..., released: _Optional[_Iterable[int]] = ..., revoked: _Optional[_Iterable[int]] = ..., pong: _Optional[int] = ..., live: _Optional[_Iterable[int]] = ...) -> None: ...

class EndRequest(_message.Message):
    __slots__ = ("incarnation", "link")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    link: str
    def __init__(self, incarnation: _Optional[int] = ..., link: _Optional[str] = ...) -> None: ...

class EndReply(_message.Message):
    __slots__ = ("incarnation", "is_over")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    IS_OVER_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    is_over: bool
    def __init__(self, incarnation: _Optional[int] = ..., is_over: _Optional[bool] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("epoch", "decode_incarnation", "sender_incarnation", "request_id", "num_tokens", "num_pages", "first_token", "checksums")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DECODE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SENDER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    decode_incarnation: int
    sender_incarnation: int
    request_id: str
    num_tokens: int
    num_pages: int
    first_token: int
    checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epoch: _Optional[int] = ..., decode_incarnation: _Optional[int] = ..., sender_incarnation: _Optional[int] = ..., request_id: _Optional[str] = ..., num_tokens: _Optional[int] = ..., num_pages: _Optional[int] = ..., first_token: _Optional[int] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...
