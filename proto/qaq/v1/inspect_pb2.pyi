from qaq.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ViewOptions(_message.Message):
    __slots__ = ("tokens", "columns", "shadow")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    columns: int
    shadow: bool
    def __init__(self, tokens: _Optional[int] = ..., columns: _Optional[int] = ..., shadow: _Optional[bool] = ...) -> None: ...

class InspectCacheRequest(_message.Message):
    __slots__ = ("session_id", "options")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    options: ViewOptions
    def __init__(self, session_id: _Optional[str] = ..., options: _Optional[_Union[ViewOptions, _Mapping]] = ...) -> None: ...

class WatchCacheRequest(_message.Message):
    __slots__ = ("session_id", "options", "interval_s")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    options: ViewOptions
    interval_s: float
    def __init__(self, session_id: _Optional[str] = ..., options: _Optional[_Union[ViewOptions, _Mapping]] = ..., interval_s: _Optional[float] = ...) -> None: ...

class CacheView(_message.Message):
    __slots__ = ("phase", "cached", "total", "exact_before", "exact_from", "first", "key_bits", "value_bits", "attention", "asked", "answered", "layers", "columns", "key_grid", "value_grid", "text_first", "text", "stats", "price", "worker_kv_bytes", "worker_budget_bytes", "shadow")
    class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PHASE_IDLE: _ClassVar[CacheView.Phase]
        PHASE_PREFILL: _ClassVar[CacheView.Phase]
        PHASE_DECODE: _ClassVar[CacheView.Phase]
        PHASE_PREEMPTED: _ClassVar[CacheView.Phase]
    PHASE_IDLE: CacheView.Phase
    PHASE_PREFILL: CacheView.Phase
    PHASE_DECODE: CacheView.Phase
    PHASE_PREEMPTED: CacheView.Phase
    PHASE_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    EXACT_BEFORE_FIELD_NUMBER: _ClassVar[int]
    EXACT_FROM_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    KEY_BITS_FIELD_NUMBER: _ClassVar[int]
    VALUE_BITS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    KEY_GRID_FIELD_NUMBER: _ClassVar[int]
    VALUE_GRID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIRST_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    WORKER_KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    WORKER_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    phase: CacheView.Phase
    cached: int
    total: int
    exact_before: int
    exact_from: int
    first: int
    key_bits: _containers.RepeatedScalarFieldContainer[float]
    value_bits: _containers.RepeatedScalarFieldContainer[float]
    attention: _containers.RepeatedScalarFieldContainer[float]
    asked: _containers.RepeatedScalarFieldContainer[int]
    answered: _containers.RepeatedScalarFieldContainer[int]
    layers: int
    columns: int
    key_grid: bytes
    value_grid: bytes
    text_first: int
    text: _containers.RepeatedCompositeFieldContainer[ViewedToken]
    stats: _common_pb2.CacheStats
    price: Price
    worker_kv_bytes: int
    worker_budget_bytes: int
    shadow: Shadow
    def __init__(self, phase: _Optional[_Union[CacheView.Phase, str]] = ..., cached: _Optional[int] = ..., total: _Optional[int] = ..., exact_before: _Optional[int] = ..., exact_from: _Optional[int] = ..., first: _Optional[int] = ..., key_bits: _Optional[_Iterable[float]] = ..., value_bits: _Optional[_Iterable[float]] = ..., attention: _Optional[_Iterable[float]] = ..., asked: _Optional[_Iterable[int]] = ..., answered: _Optional[_Iterable[int]] = ..., layers: _Optional[int] = ..., columns: _Optional[int] = ..., key_grid: _Optional[bytes] = ..., value_grid: _Optional[bytes] = ..., text_first: _Optional[int] = ..., text: _Optional[_Iterable[_Union[ViewedToken, _Mapping]]] = ..., stats: _Optional[_Union[_common_pb2.CacheStats, _Mapping]] = ..., price: _Optional[_Union[Price, _Mapping]] = ..., worker_kv_bytes: _Optional[int] = ..., worker_budget_bytes: _Optional[int] = ..., shadow: _Optional[_Union[Shadow, _Mapping]] = ...) -> None: ...

class Shadow(_message.Message):
    __slots__ = ("state", "cached", "kv_bytes", "compared", "missed", "kl_mean", "kl_recent", "kl_max", "same_top", "same_top_recent", "positions", "kl", "same")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_CATCHING_UP: _ClassVar[Shadow.State]
        STATE_COMPARING: _ClassVar[Shadow.State]
        STATE_BUSY: _ClassVar[Shadow.State]
        STATE_TOO_LONG: _ClassVar[Shadow.State]
        STATE_FAILED: _ClassVar[Shadow.State]
    STATE_CATCHING_UP: Shadow.State
    STATE_COMPARING: Shadow.State
    STATE_BUSY: Shadow.State
    STATE_TOO_LONG: Shadow.State
    STATE_FAILED: Shadow.State
    STATE_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPARED_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    KL_MEAN_FIELD_NUMBER: _ClassVar[int]
    KL_RECENT_FIELD_NUMBER: _ClassVar[int]
    KL_MAX_FIELD_NUMBER: _ClassVar[int]
    SAME_TOP_FIELD_NUMBER: _ClassVar[int]
    SAME_TOP_RECENT_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    KL_FIELD_NUMBER: _ClassVar[int]
    SAME_FIELD_NUMBER: _ClassVar[int]
    state: Shadow.State
    cached: int
    kv_bytes: int
    compared: int
    missed: int
    kl_mean: float
    kl_recent: float
    kl_max: float
    same_top: int
    same_top_recent: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    kl: _containers.RepeatedScalarFieldContainer[float]
    same: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, state: _Optional[_Union[Shadow.State, str]] = ..., cached: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., compared: _Optional[int] = ..., missed: _Optional[int] = ..., kl_mean: _Optional[float] = ..., kl_recent: _Optional[float] = ..., kl_max: _Optional[float] = ..., same_top: _Optional[int] = ..., same_top_recent: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ..., kl: _Optional[_Iterable[float]] = ..., same: _Optional[_Iterable[bool]] = ...) -> None: ...

class ViewedToken(_message.Message):
    __slots__ = ("token_id", "bytes", "special")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    bytes: bytes
    special: bool
    def __init__(self, token_id: _Optional[int] = ..., bytes: _Optional[bytes] = ..., special: _Optional[bool] = ...) -> None: ...

class Price(_message.Message):
    __slots__ = ("elastic", "own", "session_floor", "worker_floor", "recovering", "bits", "own_bits")
    ELASTIC_FIELD_NUMBER: _ClassVar[int]
    LAMBDA_FIELD_NUMBER: _ClassVar[int]
    OWN_FIELD_NUMBER: _ClassVar[int]
    SESSION_FLOOR_FIELD_NUMBER: _ClassVar[int]
    WORKER_FLOOR_FIELD_NUMBER: _ClassVar[int]
    RECOVERING_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    OWN_BITS_FIELD_NUMBER: _ClassVar[int]
    elastic: bool
    own: float
    session_floor: float
    worker_floor: float
    recovering: bool
    bits: float
    own_bits: float
    def __init__(self, elastic: _Optional[bool] = ..., own: _Optional[float] = ..., session_floor: _Optional[float] = ..., worker_floor: _Optional[float] = ..., recovering: _Optional[bool] = ..., bits: _Optional[float] = ..., own_bits: _Optional[float] = ..., **kwargs) -> None: ...

class CacheReport(_message.Message):
    __slots__ = ("session_id", "worker", "moves", "view", "unreachable")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    UNREACHABLE_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    worker: str
    moves: int
    view: CacheView
    unreachable: bool
    def __init__(self, session_id: _Optional[str] = ..., worker: _Optional[str] = ..., moves: _Optional[int] = ..., view: _Optional[_Union[CacheView, _Mapping]] = ..., unreachable: _Optional[bool] = ...) -> None: ...

class SetPrecisionRequest(_message.Message):
    __slots__ = ("session_id", "lambda_floor", "target_bits")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LAMBDA_FLOOR_FIELD_NUMBER: _ClassVar[int]
    TARGET_BITS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    lambda_floor: float
    target_bits: float
    def __init__(self, session_id: _Optional[str] = ..., lambda_floor: _Optional[float] = ..., target_bits: _Optional[float] = ...) -> None: ...

class SetPrecisionReply(_message.Message):
    __slots__ = ("lambda_floor",)
    LAMBDA_FLOOR_FIELD_NUMBER: _ClassVar[int]
    lambda_floor: float
    def __init__(self, lambda_floor: _Optional[float] = ...) -> None: ...

class ListWorkersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("address", "running", "waiting", "sessions", "max_sequences", "kv_bytes", "kv_budget_bytes", "lambda_floor", "model")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAMBDA_FLOOR_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    address: str
    running: int
    waiting: int
    sessions: int
    max_sequences: int
    kv_bytes: int
    kv_budget_bytes: int
    lambda_floor: float
    model: str
    def __init__(self, address: _Optional[str] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., sessions: _Optional[int] = ..., max_sequences: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., kv_budget_bytes: _Optional[int] = ..., lambda_floor: _Optional[float] = ..., model: _Optional[str] = ...) -> None: ...

class ListWorkersReply(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerInfo]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerInfo, _Mapping]]] = ...) -> None: ...

class SetWorkerBudgetRequest(_message.Message):
    __slots__ = ("worker", "kv_budget_bytes")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    KV_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    worker: str
    kv_budget_bytes: int
    def __init__(self, worker: _Optional[str] = ..., kv_budget_bytes: _Optional[int] = ...) -> None: ...

class SetWorkerBudgetReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("session_id", "tenant", "options", "known_text")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    KNOWN_TEXT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    tenant: str
    options: ViewOptions
    known_text: int
    def __init__(self, session_id: _Optional[str] = ..., tenant: _Optional[str] = ..., options: _Optional[_Union[ViewOptions, _Mapping]] = ..., known_text: _Optional[int] = ...) -> None: ...

class SetFloorRequest(_message.Message):
    __slots__ = ("session_id", "tenant", "lambda_floor", "target_bits")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    LAMBDA_FLOOR_FIELD_NUMBER: _ClassVar[int]
    TARGET_BITS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    tenant: str
    lambda_floor: float
    target_bits: float
    def __init__(self, session_id: _Optional[str] = ..., tenant: _Optional[str] = ..., lambda_floor: _Optional[float] = ..., target_bits: _Optional[float] = ...) -> None: ...

class SetFloorReply(_message.Message):
    __slots__ = ("lambda_floor",)
    LAMBDA_FLOOR_FIELD_NUMBER: _ClassVar[int]
    lambda_floor: float
    def __init__(self, lambda_floor: _Optional[float] = ...) -> None: ...

class SetBudgetRequest(_message.Message):
    __slots__ = ("kv_budget_bytes",)
    KV_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    kv_budget_bytes: int
    def __init__(self, kv_budget_bytes: _Optional[int] = ...) -> None: ...

class SetBudgetReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
