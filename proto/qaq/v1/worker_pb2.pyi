from qaq.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RunRequest(_message.Message):
    __slots__ = ("session_id", "token_ids", "sampling", "stop", "cache", "keep", "choices", "output", "held", "generated", "branch_of", "tenant", "page_ids")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    GENERATED_FIELD_NUMBER: _ClassVar[int]
    BRANCH_OF_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _common_pb2.SamplingParams
    stop: _common_pb2.StopParams
    cache: _common_pb2.CacheParams
    keep: bool
    choices: int
    output: _common_pb2.OutputParams
    held: int
    generated: int
    branch_of: str
    tenant: str
    page_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, session_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., stop: _Optional[_Union[_common_pb2.StopParams, _Mapping]] = ..., cache: _Optional[_Union[_common_pb2.CacheParams, _Mapping]] = ..., keep: _Optional[bool] = ..., choices: _Optional[int] = ..., output: _Optional[_Union[_common_pb2.OutputParams, _Mapping]] = ..., held: _Optional[int] = ..., generated: _Optional[int] = ..., branch_of: _Optional[str] = ..., tenant: _Optional[str] = ..., page_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class RunReply(_message.Message):
    __slots__ = ("progress", "token", "done", "prompt", "pages")
    class Pages(_message.Message):
        __slots__ = ("first", "ids")
        FIRST_FIELD_NUMBER: _ClassVar[int]
        IDS_FIELD_NUMBER: _ClassVar[int]
        first: int
        ids: _containers.RepeatedScalarFieldContainer[bytes]
        def __init__(self, first: _Optional[int] = ..., ids: _Optional[_Iterable[bytes]] = ...) -> None: ...
    class Progress(_message.Message):
        __slots__ = ("tokens_done", "tokens_total")
        TOKENS_DONE_FIELD_NUMBER: _ClassVar[int]
        TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
        tokens_done: int
        tokens_total: int
        def __init__(self, tokens_done: _Optional[int] = ..., tokens_total: _Optional[int] = ...) -> None: ...
    class Token(_message.Message):
        __slots__ = ("token_id", "text", "choice", "info", "chosen_at")
        TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
        TEXT_FIELD_NUMBER: _ClassVar[int]
        CHOICE_FIELD_NUMBER: _ClassVar[int]
        INFO_FIELD_NUMBER: _ClassVar[int]
        CHOSEN_AT_FIELD_NUMBER: _ClassVar[int]
        token_id: int
        text: str
        choice: int
        info: _common_pb2.TokenInfo
        chosen_at: float
        def __init__(self, token_id: _Optional[int] = ..., text: _Optional[str] = ..., choice: _Optional[int] = ..., info: _Optional[_Union[_common_pb2.TokenInfo, _Mapping]] = ..., chosen_at: _Optional[float] = ...) -> None: ...
    class Done(_message.Message):
        __slots__ = ("reason", "usage", "text", "choice", "stop_string", "stop_token_id")
        REASON_FIELD_NUMBER: _ClassVar[int]
        USAGE_FIELD_NUMBER: _ClassVar[int]
        TEXT_FIELD_NUMBER: _ClassVar[int]
        CHOICE_FIELD_NUMBER: _ClassVar[int]
        STOP_STRING_FIELD_NUMBER: _ClassVar[int]
        STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
        reason: _common_pb2.FinishReason
        usage: _common_pb2.Usage
        text: str
        choice: int
        stop_string: str
        stop_token_id: int
        def __init__(self, reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., usage: _Optional[_Union[_common_pb2.Usage, _Mapping]] = ..., text: _Optional[str] = ..., choice: _Optional[int] = ..., stop_string: _Optional[str] = ..., stop_token_id: _Optional[int] = ...) -> None: ...
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    progress: RunReply.Progress
    token: RunReply.Token
    done: RunReply.Done
    prompt: _common_pb2.PromptTokens
    pages: RunReply.Pages
    def __init__(self, progress: _Optional[_Union[RunReply.Progress, _Mapping]] = ..., token: _Optional[_Union[RunReply.Token, _Mapping]] = ..., done: _Optional[_Union[RunReply.Done, _Mapping]] = ..., prompt: _Optional[_Union[_common_pb2.PromptTokens, _Mapping]] = ..., pages: _Optional[_Union[RunReply.Pages, _Mapping]] = ...) -> None: ...

class DropRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("model", "running", "waiting", "sessions", "kv_bytes", "max_sequences", "kv_budget_bytes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    KV_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelInfo
    running: int
    waiting: int
    sessions: int
    kv_bytes: int
    max_sequences: int
    kv_budget_bytes: int
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelInfo, _Mapping]] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., sessions: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., max_sequences: _Optional[int] = ..., kv_budget_bytes: _Optional[int] = ...) -> None: ...
