from protos import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Members(_message.Message):
    __slots__ = ("members",)
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[_common_pb2.Member]
    def __init__(self, members: _Optional[_Iterable[_Union[_common_pb2.Member, _Mapping]]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankStatus(_message.Message):
    __slots__ = ("member", "node", "pid", "uptime_s", "restarts", "load", "note")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    member: _common_pb2.Member
    node: str
    pid: int
    uptime_s: float
    restarts: int
    load: _common_pb2.Load
    note: str
    def __init__(self, member: _Optional[_Union[_common_pb2.Member, _Mapping]] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., uptime_s: _Optional[float] = ..., restarts: _Optional[int] = ..., load: _Optional[_Union[_common_pb2.Load, _Mapping]] = ..., note: _Optional[str] = ...) -> None: ...

class ClusterStatus(_message.Message):
    __slots__ = ("name", "model", "ranks", "routers", "desired_replicas", "controller_uptime_s", "events", "settled", "problems", "spec_yaml", "quiet")
    class DesiredReplicasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    DESIRED_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    SPEC_YAML_FIELD_NUMBER: _ClassVar[int]
    QUIET_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    ranks: _containers.RepeatedCompositeFieldContainer[RankStatus]
    routers: _containers.RepeatedCompositeFieldContainer[RankStatus]
    desired_replicas: _containers.ScalarMap[str, int]
    controller_uptime_s: float
    events: _containers.RepeatedScalarFieldContainer[str]
    settled: bool
    problems: _containers.RepeatedScalarFieldContainer[str]
    spec_yaml: str
    quiet: bool
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., ranks: _Optional[_Iterable[_Union[RankStatus, _Mapping]]] = ..., routers: _Optional[_Iterable[_Union[RankStatus, _Mapping]]] = ..., desired_replicas: _Optional[_Mapping[str, int]] = ..., controller_uptime_s: _Optional[float] = ..., events: _Optional[_Iterable[str]] = ..., settled: _Optional[bool] = ..., problems: _Optional[_Iterable[str]] = ..., spec_yaml: _Optional[str] = ..., quiet: _Optional[bool] = ...) -> None: ...

class ApplyRequest(_message.Message):
    __slots__ = ("spec_yaml", "replicas", "dry_run")
    class ReplicasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    SPEC_YAML_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    spec_yaml: str
    replicas: _containers.ScalarMap[str, int]
    dry_run: bool
    def __init__(self, spec_yaml: _Optional[str] = ..., replicas: _Optional[_Mapping[str, int]] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class ApplyReply(_message.Message):
    __slots__ = ("changes", "error")
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedScalarFieldContainer[str]
    error: _common_pb2.Error
    def __init__(self, changes: _Optional[_Iterable[str]] = ..., error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("member",)
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    member: str
    def __init__(self, member: _Optional[str] = ...) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
