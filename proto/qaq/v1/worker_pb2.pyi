from qaq.v1 import common_pb2 as _common_pb2
from qaq.v1 import inspect_pb2 as _inspect_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RunRequest(_message.Message):
    __slots__ = ("session_id", "token_ids", "sampling", "stop", "cache", "keep", "choices", "output", "history_tokens", "generated_tokens", "branch_of", "tenant", "constraint", "fence", "page_ids", "lambda_floor")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    HISTORY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BRANCH_OF_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CONSTRAINT_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    PAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    LAMBDA_FLOOR_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _common_pb2.SamplingParams
    stop: _common_pb2.StopParams
    cache: _common_pb2.CacheParams
    keep: bool
    choices: int
    output: _common_pb2.OutputParams
    history_tokens: int
    generated_tokens: int
    branch_of: str
    tenant: str
    constraint: _common_pb2.Constraint
    fence: int
    page_ids: _containers.RepeatedScalarFieldContainer[bytes]
    lambda_floor: float
    def __init__(self, session_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., stop: _Optional[_Union[_common_pb2.StopParams, _Mapping]] = ..., cache: _Optional[_Union[_common_pb2.CacheParams, _Mapping]] = ..., keep: _Optional[bool] = ..., choices: _Optional[int] = ..., output: _Optional[_Union[_common_pb2.OutputParams, _Mapping]] = ..., history_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., branch_of: _Optional[str] = ..., tenant: _Optional[str] = ..., constraint: _Optional[_Union[_common_pb2.Constraint, _Mapping]] = ..., fence: _Optional[int] = ..., page_ids: _Optional[_Iterable[bytes]] = ..., lambda_floor: _Optional[float] = ...) -> None: ...

class RunReply(_message.Message):
    __slots__ = ("prefill", "token", "finished", "prompt", "pages")
    class Pages(_message.Message):
        __slots__ = ("first", "ids", "page_tokens")
        FIRST_FIELD_NUMBER: _ClassVar[int]
        IDS_FIELD_NUMBER: _ClassVar[int]
        PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
        first: int
        ids: _containers.RepeatedScalarFieldContainer[bytes]
        page_tokens: int
        def __init__(self, first: _Optional[int] = ..., ids: _Optional[_Iterable[bytes]] = ..., page_tokens: _Optional[int] = ...) -> None: ...
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    prefill: _common_pb2.PrefillProgress
    token: _common_pb2.Token
    finished: _common_pb2.Finished
    prompt: _common_pb2.PromptTokens
    pages: RunReply.Pages
    def __init__(self, prefill: _Optional[_Union[_common_pb2.PrefillProgress, _Mapping]] = ..., token: _Optional[_Union[_common_pb2.Token, _Mapping]] = ..., finished: _Optional[_Union[_common_pb2.Finished, _Mapping]] = ..., prompt: _Optional[_Union[_common_pb2.PromptTokens, _Mapping]] = ..., pages: _Optional[_Union[RunReply.Pages, _Mapping]] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("session_id", "tenant", "fence")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    tenant: str
    fence: int
    def __init__(self, session_id: _Optional[str] = ..., tenant: _Optional[str] = ..., fence: _Optional[int] = ...) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DropRequest(_message.Message):
    __slots__ = ("session_id", "tenant")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    tenant: str
    def __init__(self, session_id: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class DropReply(_message.Message):
    __slots__ = ("existed",)
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    existed: bool
    def __init__(self, existed: _Optional[bool] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("moved",)
    MOVED_FIELD_NUMBER: _ClassVar[int]
    moved: int
    def __init__(self, moved: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("model", "running", "waiting", "sessions", "kv_bytes", "max_sequences", "kv_budget_bytes", "lambda_floor", "kv_bytes_fp16", "bits", "exceptions", "rows_requantized")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    KV_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAMBDA_FLOOR_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FP16_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    EXCEPTIONS_FIELD_NUMBER: _ClassVar[int]
    ROWS_REQUANTIZED_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelInfo
    running: int
    waiting: int
    sessions: int
    kv_bytes: int
    max_sequences: int
    kv_budget_bytes: int
    lambda_floor: float
    kv_bytes_fp16: int
    bits: float
    exceptions: int
    rows_requantized: int
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelInfo, _Mapping]] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., sessions: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., max_sequences: _Optional[int] = ..., kv_budget_bytes: _Optional[int] = ..., lambda_floor: _Optional[float] = ..., kv_bytes_fp16: _Optional[int] = ..., bits: _Optional[float] = ..., exceptions: _Optional[int] = ..., rows_requantized: _Optional[int] = ...) -> None: ...
